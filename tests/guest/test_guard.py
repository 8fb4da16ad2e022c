"""The pool guard on a real kernel: a pool too small for all, and nobody dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import EXEC, IN_GUEST, SLOW, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with a pool of 640 MiB."""
    return start_daemon('[pool]\nmemory_max = "640M"\n')


@pytest.mark.with_programs
def test_three_calls_that_do_not_fit_together_all_end_well(daemon: DaemonProcess) -> None:
    agents = {
        name: daemon.open(name, priority=priority)
        for name, priority in (("vip", "important"), ("b1", "batch"), ("b2", "batch"))
    }
    # Each grows to 220 MiB in 15 s, holds it for 5 s and ends: 660 MiB in a pool of 640.
    start = """
tool = subprocess.Popen([EXEC, "--name", name, "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(f"15000 {220 << 20} 10\\n5000 {220 << 20} 10\\n")
tool.stdin.close()
"""
    for name, agent in agents.items():
        agent.run(start, name=name, LOAD=LOAD)
    results = {name: agent.run("result = tool.wait()") for name, agent in agents.items()}
    assert results == {"vip": 0, "b1": 0, "b2": 0}
    wait_until("all have ended", lambda: not daemon.call_dirs())
    reports = {r.session_id: r for r in daemon.admin.ListReports(pb.ListReportsRequest()).reports}
    assert {r.verdict for r in reports.values()} == {pb.VERDICT_OK}
    # Waking a call that has got more credit freezes and thaws it at once.
    assert reports["vip"].frozen_usec < 100_000
    paused = max((reports["b1"], reports["b2"]), key=lambda r: r.frozen_usec)
    assert paused.frozen_usec > 100_000
    assert pb.FEEDBACK_CODE_FROZEN in {f.code for f in paused.feedback}
    events = (daemon.cgroup_dir / "memory.events").read_text()
    assert "oom_kill 0" in events
    log = [json.loads(line)["event"] for line in daemon.audit_lines()]
    assert log.count("freeze") == log.count("thaw") >= 1


KILL_EARLY = """[[rulesets]]
name = "kill"
when = [
  { detector = "pool_free", below = "5%", until = "5%" },
  { detector = "pool_fills", within = "2s" },
]
do = { action = "kill" }
cooldown = "10s"
"""


def test_when_frozen_calls_hold_what_the_leader_needs_one_of_them_goes(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """The policy's own 100 ms are less than a guest may need for a look and a kill."""
    (tmp_path / "kill.toml").write_text(KILL_EARLY if IN_GUEST else "")
    daemon = start_daemon(f'[pool]\nmemory_max = "640M"\n[policy]\ndrop_in = "{tmp_path}"\n')
    vip, batch = daemon.open("vip", priority="important"), daemon.open("b", priority="batch")
    code = """
tool = subprocess.Popen([EXEC, "--name", name, "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""
    hold = int(200_000 * SLOW)
    batch.run(code, name="batch", LOAD=LOAD, schedule=f"500 {350 * MIB} 0\n{hold} {350 * MIB} 0\n")
    memory = daemon.cgroup_dir / "b/memory.current"
    wait_until("the batch call holds its memory", lambda: int(memory.read_text()) > 350 * MIB)
    vip.run(code, name="vip", LOAD=LOAD, schedule=f"3000 {350 * MIB} 0\n")
    assert vip.run("result = tool.wait()") == 0
    assert batch.run("result = tool.wait()") == -9
    wait_until("all have ended", lambda: not daemon.call_dirs())
    reports = {r.session_id: r for r in daemon.admin.ListReports(pb.ListReportsRequest()).reports}
    assert reports["vip"].verdict == pb.VERDICT_OK
    assert reports["b"].verdict == pb.VERDICT_STOPPED
    assert "vip" in reports["b"].sentence and "MiB" in reports["b"].sentence
    assert reports["b"].feedback[0].code == pb.FEEDBACK_CODE_STOPPED


@pytest.mark.programs
def test_a_call_that_would_rather_be_refused_gets_an_error_and_lives(
    daemon: DaemonProcess,
) -> None:
    """on_pressure = deny: MemoryError in the tool instead of a pause, and the agent is told."""
    if "deny growth" not in daemon.log.read_text().partition("in the kernel: ")[2].split("\n")[0]:
        pytest.skip("this kernel cannot deny growth")
    vip, batch = daemon.open("vip", priority="important"), daemon.open("b", priority="batch")
    # 12 MiB at a time until it is refused; then what it had is given back, and it says so.
    script = """
import time
held = []
try:
    while True:
        held.append(bytearray(12 << 20))
        time.sleep(PAUSE)
except MemoryError:
    refused = len(held)
    held.clear()
print("refused at", refused)
"""
    start_eager = """
tool = subprocess.Popen([EXEC, "--name", "eager", "--on-pressure", "deny", "--", sys.executable,
                         "-S", "-c", script], stdout=subprocess.PIPE, text=True)
"""
    batch.run(start_eager, script=script.replace("PAUSE", str(0.01 * SLOW)))
    start_vip = """
tool = subprocess.Popen([EXEC, "--name", "vip", "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""
    vip.run(start_vip, LOAD=LOAD, schedule=f"20000 {260 * MIB} 10\n")
    out = batch.run("result = tool.communicate()[0], tool.returncode")
    assert out[1] == 0 and out[0].startswith("refused at"), out
    assert vip.run("result = tool.wait()") == 0
    wait_until("all have ended", lambda: not daemon.call_dirs())
    reports = {r.session_id: r for r in daemon.admin.ListReports(pb.ListReportsRequest()).reports}
    assert {r.verdict for r in reports.values()} == {pb.VERDICT_OK}
    events = [json.loads(line) for line in daemon.audit_lines()]
    actions = [e["event"] for e in events if e.get("call") == reports["b"].call_id]
    assert "deny" in actions and "denied" in actions
    why = next(e["why"] for e in events if e["event"] == "denied")
    assert "ENOMEM" in why and "MiB" in why
