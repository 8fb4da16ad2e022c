"""What a session is guaranteed holds against memory that is taken from the whole host."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import cgroup2_mount
from tests.conftest import StartDaemon
from tests.harness import ROOT, AgentProcess, DaemonProcess

pytestmark = pytest.mark.controllers

MIB = 1 << 20
LARGE = ROOT / ".venv/bin/ruff"
"""A file of more than 24 MB that no test has open."""
PART = 11 * MIB
READ = """
with open(path, "rb", 0) as file:
    file.seek(start)
    result = len(file.read(size))
"""


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon whose guard is off: what is shown here is the kernel's."""
    return start_daemon('[pool]\nmemory_max = "512M"\n[guard]\nenabled = false\n')


def low(directory: Path) -> int:
    """Read memory.low of a cgroup."""
    return int((directory / "memory.low").read_text())


def cache(directory: Path) -> int:
    """File cache that is charged there or below, in bytes."""
    lines = (directory / "memory.stat").read_text().splitlines()
    return int(dict(line.split() for line in lines)["file"])


def read(agent: AgentProcess, start: int) -> None:
    """Have an agent fill file cache."""
    assert agent.run(READ, path=str(LARGE), start=start, size=PART) == PART


def test_the_pool_is_guaranteed_what_its_sessions_are(daemon: DaemonProcess) -> None:
    assert low(daemon.cgroup_dir) == 0
    daemon.open("a", memory_low="64M")
    daemon.open("b", memory_low="32M")
    daemon.open("c")
    assert low(daemon.cgroup_dir) == 96 * MIB
    daemon.kill()
    (daemon.cgroup_dir / "memory.low").write_text("0")
    daemon.start()
    assert low(daemon.cgroup_dir) == 96 * MIB, "a restarted daemon sees to it"
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="b"))
    assert low(daemon.cgroup_dir) == 64 * MIB


def test_what_is_guaranteed_is_not_reclaimed(daemon: DaemonProcess) -> None:
    # What is guaranteed and not used protects the others too (memory_recursiveprot), so it is used.
    kept, other = daemon.open("kept", memory_low="16M"), daemon.open("other")
    read(kept, 0)
    read(other, PART)
    sessions = daemon.cgroup_dir / "kept", daemon.cgroup_dir / "other"
    before = [cache(session) for session in sessions]
    assert min(before) >= 10 * MIB, "the file was not in memory before"
    # A little at a time: for want of anything else the kernel takes what is guaranteed, too.
    for _ in range(400):
        with contextlib.suppress(BlockingIOError):
            (cgroup2_mount() / "memory.reclaim").write_text(str(2 * MIB))
        if cache(sessions[1]) <= before[1] * 0.5:
            break
    after = [cache(session) for session in sessions]
    assert after[1] <= before[1] * 0.5, "not guaranteed"
    assert after[0] >= before[0] * 0.85, "guaranteed"
