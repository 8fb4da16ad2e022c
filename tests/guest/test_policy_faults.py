"""What goes wrong around a policy's decisions, provoked on a real kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import EXEC, SLOW, AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
START = """
global tool
tool = subprocess.Popen([EXEC, "--name", name, "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""


def events(daemon: DaemonProcess, event: str, call: str = "") -> list[dict[str, Any]]:
    """Entries of the audit log."""
    lines = map(json.loads, daemon.audit_lines())
    return [e for e in lines if e["event"] == event and call in ("", e.get("call"))]


def report_of(daemon: DaemonProcess, session: str) -> pb.Report:
    """Return the newest report of a session."""
    reports = daemon.admin.ListReports(pb.ListReportsRequest(session_id=session)).reports
    return reports[0]


def short_of_memory(daemon: DaemonProcess) -> tuple[AgentProcess, AgentProcess]:
    """An important call that takes half of the pool and holds it, and a batch call that has been
    paused meanwhile: the pool's 640 MiB are less than what the two would take."""
    vip, batch = daemon.open("vip", priority="important"), daemon.open("b", priority="batch")
    hold = int(120_000 * SLOW)
    vip.run(START, name="vip", LOAD=LOAD, schedule=f"8000 {320 * MIB} 0\n{hold} {320 * MIB} 0\n")
    batch.run(START, name="batch", LOAD=LOAD, schedule=f"8000 {340 * MIB} 0\n100 {340 * MIB} 0\n")
    wait_until("the batch call is paused", lambda: bool(events(daemon, "freeze")), 60)
    return vip, batch


def test_a_paused_call_can_be_killed_by_its_user(start_daemon: StartDaemon) -> None:
    daemon = start_daemon('[pool]\nmemory_max = "640M"\n')
    vip, batch = short_of_memory(daemon)
    assert batch.run("tool.kill(); result = tool.wait()") == -9
    wait_until("its cgroup is gone", lambda: len(daemon.call_dirs()) == 1)
    report = report_of(daemon, "b")
    assert (report.verdict, report.term_signal) == (pb.VERDICT_SIGNALED, 9)
    assert report.frozen_usec > 0
    vip.run("tool.kill(); tool.wait()")


STALLS = """
name = "stalls"
[[rulesets]]
name = "slow"
when = [{ detector = "stalled", above = 0.01, until = 0.0 }]
do = { action = "slow", percent = 10, above = 0.01 }
"""


def stalls(directory: Path) -> str:
    """A pool under a policy that slows whoever stalls."""
    policy = directory / "stalls.toml"
    policy.write_text(STALLS)
    return f'[pool]\nmemory_max = "640M"\n[policy]\npath = "{policy}"\n'


@pytest.mark.psi
def test_a_session_that_was_slowed_is_not_left_so(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Also when the daemon stops while none of its calls is open."""
    daemon = start_daemon(stalls(tmp_path))
    agent = daemon.open("s")
    weight = daemon.cgroup_dir / "s/cpu.weight"
    before = int(weight.read_text())
    options = '"--on-pressure", "throttle", "--memory-max", "40M", "--name"'
    hold = int(60_000 * SLOW)
    schedule = f"1000 {60 * MIB} 0\n{hold} {60 * MIB} 0\n"
    start = START.replace('"--name"', options)
    agent.run(start, name="stalls", LOAD=LOAD, schedule=schedule)
    wait_until("it is slowed", lambda: bool(events(daemon, "slow")), 60)
    assert int(weight.read_text()) == before // 10
    agent.run("tool.kill(); tool.wait()")
    wait_until("no call is open", lambda: not daemon.call_dirs())
    daemon.stop()
    assert int(weight.read_text()) == before


@pytest.mark.psi
def test_a_detector_on_a_file_that_this_kernel_does_not_keep(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """PSI can be turned off for a cgroup: no pressure is then not taken for none."""
    daemon = start_daemon(stalls(tmp_path))
    (daemon.cgroup_dir / "cgroup.pressure").write_text("0")
    agent = daemon.open("s")
    schedule = f"10 {60 * MIB} 0\n1000 {60 * MIB} 0\n"
    run_to_its_end = START + "result = tool.wait()"
    assert agent.run(run_to_its_end, name="t", LOAD=LOAD, schedule=schedule) == 0
    state = daemon.admin.GetPolicy(pb.GetPolicyRequest())
    (slow,) = state.rulesets
    assert not slow.holds and "does not tell" in slow.detectors[0]
    assert not events(daemon, "slow")


def test_another_policy_lets_go_what_the_first_had_paused(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(f'[pool]\nmemory_max = "640M"\n[policy]\ndrop_in = "{tmp_path}"\n')
    vip, batch = short_of_memory(daemon)
    off = "".join(
        f'[[rulesets]]\nname = "{name}"\nenabled = false\n' for name in ("freeze", "freeze-fast")
    )
    (tmp_path / "off.toml").write_text(off)
    daemon.admin.ReloadPolicy(pb.ReloadPolicyRequest())
    wait_until("it goes on", lambda: bool(events(daemon, "thaw")))
    for agent in (vip, batch):
        agent.run("tool.kill(); tool.wait()")


@pytest.mark.programs
def test_a_tool_that_retries_for_ever_what_it_is_refused_is_paused(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon('[pool]\nmemory_max = "640M"\n')
    if "deny growth" not in daemon.log.read_text().partition("in the kernel: ")[2].split("\n")[0]:
        pytest.skip("this kernel cannot deny growth")
    vip, batch = daemon.open("vip", priority="important"), daemon.open("b", priority="batch")
    script = """
import time
held = []
while len(held) < 20:
    try:
        held.append(bytearray(12 << 20))
        time.sleep(PAUSE)
    except MemoryError:
        pass
""".replace("PAUSE", str(0.05 * SLOW))
    start_stubborn = """
global tool
tool = subprocess.Popen([EXEC, "--name", "stubborn", "--on-pressure", "deny", "--", sys.executable,
                         "-S", "-c", script])
"""
    batch.run(start_stubborn, script=script)
    hold = int(20_000 * SLOW)
    vip.run(START, name="vip", LOAD=LOAD, schedule=f"15000 {400 * MIB} 0\n{hold} {400 * MIB} 0\n")

    def paused_for_asking() -> bool:
        return any("goes on asking" in e["why"] for e in events(daemon, "freeze"))

    wait_until("it is paused", paused_for_asking, 60)
    assert len(events(daemon, "deny")) >= 1
    vip.run("tool.kill(); tool.wait()")
    assert batch.run("result = tool.wait()") == 0, "with room it gets what it asked for"
    assert report_of(daemon, "b").verdict == pb.VERDICT_OK
