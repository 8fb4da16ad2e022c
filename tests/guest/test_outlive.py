"""What denies growth outlives a daemon that is killed, and not one that stops."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agentcgroupd.bpf import pins
from tests.conftest import StartDaemon
from tests.harness import SLOW, AgentProcess, DaemonProcess, wait_until
from tests.kernel.test_release import release

pytestmark = [pytest.mark.controllers, pytest.mark.programs]

MIB = 1 << 20
POOL = 400 * MIB
POLICY = """
name = "deny-alone"
[[rulesets]]
name = "deny"
when = [{ detector = "pool_free", below = "20%", until = "25%" }]
do = { action = "deny", whom = "willing" }
"""
TOOL = """
import sys
held = []
print("ready", flush=True)
for line in sys.stdin:
    try:
        held.append(bytearray(int(line)))
        print("ok", flush=True)
    except MemoryError:
        print("MemoryError", flush=True)
"""
START = """
tool = subprocess.Popen([EXEC, "--name", "tool", "--on-pressure", how, "--", sys.executable, "-S",
                         "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
result = tool.stdout.readline()
"""
ASK = """
tool.stdin.write(f"{size}\\n")
tool.stdin.flush()
result = tool.stdout.readline().strip()
"""


def start(agent: AgentProcess, how: str) -> None:
    """Start a tool that takes memory when it is told to."""
    assert agent.run(START, script=TOOL, how=how) == "ready\n"


def ask(agent: AgentProcess, size_mib: int) -> str:
    """Have its tool take memory; what became of that."""
    return str(agent.run(ASK, size=size_mib * MIB))


def is_refused(agent: AgentProcess) -> bool:
    """Ask slowly whether its tool is refused memory: each time that it is not, it takes 4 of the
    56 MiB that are left, beyond which the kernel ends somebody."""
    time.sleep(0.5)
    return ask(agent, 4) == "MemoryError"


def pinned(daemon: DaemonProcess) -> list[Path]:
    """What is pinned for the daemon's pool."""
    directory = pins.MOUNT / pins.DIRECTORY / str(daemon.cgroup_dir.stat().st_ino)
    return sorted(directory.iterdir()) if directory.exists() else []


def fill(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """Have a tool, which leads, take what there is up to beyond the pool's mark."""
    memory = daemon.cgroup_dir / "memory.current"
    while (left := POOL * 86 // 100 - int(memory.read_text())) > 0:
        assert ask(agent, max(1, min(32, left // 2 // MIB))) == "ok"


@pytest.fixture
def daemon(start_daemon: StartDaemon, tmp_path: Path) -> DaemonProcess:
    """A daemon that gives no credit, so that the tools are held by denial alone."""
    policy = tmp_path / "deny.toml"
    policy.write_text(POLICY)
    return start_daemon(
        f'[pool]\nmemory_max = {POOL}\n[guard]\ncredit = false\n[policy]\npath = "{policy}"\n'
    )


def test_after_a_kill_what_was_denied_is_denied_still_and_who_is_willing_as_well(
    daemon: DaemonProcess,
) -> None:
    vip, eager, calm, other = (
        daemon.open(name, priority=priority)
        for name, priority in (("vip", "important"), ("e", "batch"), ("c", "batch"), ("o", "batch"))
    )
    for agent, how in ((vip, "freeze"), (eager, "deny"), (calm, "deny"), (other, "freeze")):
        start(agent, how)
    assert len(pinned(daemon)) >= len(pins.MAPS) + 4
    fill(daemon, vip)
    wait_until("the eager one is refused", lambda: is_refused(eager), 30)
    daemon.kill()
    assert len(pinned(daemon)) >= len(pins.MAPS) + 4
    time.sleep(0.3)
    memory = daemon.cgroup_dir / "memory.current"
    before = int(memory.read_text())
    refused = [ask(agent, 4) for agent in (eager, calm) for _ in range(6)]
    assert refused == ["MemoryError"] * 12
    assert int(memory.read_text()) - before < 8 * MIB
    # Who asked to be paused rather than refused is not refused; nobody is there to pause it.
    assert ask(other, 1) == "ok"

    daemon.start()
    log = daemon.log.read_text()
    assert "another size" not in log and "end with this process" not in log
    assert len(pinned(daemon)) >= len(pins.MAPS) + 4
    audit = daemon.audit_path
    wait_until("it is told", lambda: '"event":"alone"' in audit.read_text().replace(" ", ""), 30)
    wait_until("it is refused by the next daemon", lambda: is_refused(eager), 30)
    for agent in (vip, other):
        agent.run("tool.kill(); tool.wait()")
    wait_until("it may grow again", lambda: ask(calm, 4) == "ok", 30 * SLOW)
    daemon.stop()
    assert pinned(daemon) == []


def test_release_takes_away_what_a_killed_daemon_left(daemon: DaemonProcess) -> None:
    vip, eager = daemon.open("vip", priority="important"), daemon.open("e", priority="batch")
    for agent, how in ((vip, "freeze"), (eager, "deny")):
        start(agent, how)
    fill(daemon, vip)
    daemon.kill()
    time.sleep(0.3)
    assert ask(eager, 4) == "MemoryError"
    status, said = release(daemon.run_dir)
    assert status == 0, said
    assert pinned(daemon) == []
    # The kernel lets go of what was unpinned a grace period later.
    wait_until("it may grow", lambda: ask(eager, 4) == "ok")


def test_pins_of_a_pool_that_is_gone_are_removed(
    daemon: DaemonProcess, start_daemon: StartDaemon
) -> None:
    directory = pins.MOUNT / pins.DIRECTORY / str(daemon.cgroup_dir.stat().st_ino)
    daemon.open("a").close()
    daemon.kill()
    assert directory.exists()
    daemon.close()
    assert not daemon.cgroup_dir.exists() and directory.exists()
    start_daemon("")
    assert not directory.exists()
