"""File cache that is in use: the kernel takes it back where memory is short, and nobody is paused
or ended for it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from tests.conftest import StartDaemon
from tests.guest.container import adopt, container
from tests.harness import EXEC, ROOT, AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
CACHE = 100 * MIB
READ = """
import time
data = open(PATH, "rb", buffering=0)
buffer = bytearray(1 << 20)
while True:
    data.seek(0)
    while data.readinto(buffer):
        pass
    time.sleep(0.02)
"""
"""Reads a file again and again, so that its pages are in use."""
START_READER = """
reader = subprocess.Popen([EXEC, "--name", "reader", "--", sys.executable, "-S", "-c", script])
"""
GROW = """
tool = subprocess.Popen(
    [EXEC, "--name", "grower", *options, "--", LOAD], stdin=subprocess.PIPE, text=True
)
tool.stdin.write(f"{usec} {size} 0\\n1500 {size} 0\\n")
tool.stdin.close()
"""


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with a pool of 220 MiB."""
    return start_daemon('[pool]\nmemory_max = "220M"\n')


@pytest.fixture
def file() -> Iterator[Path]:
    """A file of 100 MiB on a disk. It has holes only, which take page cache as data does."""
    path = ROOT / "build" / f"file-cache-{secrets.token_hex(4)}"
    with path.open("wb") as made:
        made.truncate(CACHE)
    yield path
    path.unlink()


def in_use(daemon: DaemonProcess) -> int:
    """File cache of the pool that is in use, in bytes."""
    lines = (daemon.cgroup_dir / "memory.stat").read_bytes().split(b"\n")
    return int(dict(line.split() for line in lines if line)[b"active_file"])


@pytest.fixture
def reader(daemon: DaemonProcess, file: Path) -> Iterator[AgentProcess]:
    """An agent whose call holds the file in cache, and uses it all the time."""
    agent = daemon.open("reader", priority="batch")
    agent.run(START_READER, script=READ.replace("PATH", repr(str(file))))
    wait_until("the file is in use", lambda: in_use(daemon) > CACHE * 0.8, 60)
    yield agent
    agent.run("reader.kill(); result = reader.wait()")


def reports(daemon: DaemonProcess, count: int) -> dict[str, pb.Report]:
    """The newest report of each session, once there are so many."""

    def growers() -> dict[str, pb.Report]:
        listed = daemon.admin.ListReports(pb.ListReportsRequest()).reports
        return {r.session_id: r for r in listed if r.name == "grower"}

    wait_until("the calls have been reported", lambda: len(growers()) == count)
    return growers()


def paused(daemon: DaemonProcess) -> set[str]:
    """Calls that are paused now."""
    found = (p for p in daemon.cgroup_dir.glob("*/call-*") if (p / "cgroup.freeze").exists())
    return {p.name for p in found if (p / "cgroup.freeze").read_bytes() == b"1\n"}


def ended(report: pb.Report) -> int:
    """When a call ended, in usec."""
    return report.began_unix_usec + report.waited_usec + report.wall_usec


@pytest.mark.parametrize("mib", [130, 170])
def test_a_call_grows_into_cache_that_another_one_uses(
    daemon: DaemonProcess, reader: AgentProcess, mib: int
) -> None:
    """130 MiB and the file do not fit side by side; 170 leave next to nothing for it."""
    grower = daemon.open("grower", priority="batch")
    grower.run(GROW, LOAD=LOAD, options=[], usec=4_000, size=mib * MIB)
    seen: set[str] = set()
    end = time.monotonic() + 60
    while grower.run("result = tool.poll()") is None and time.monotonic() < end:
        seen |= paused(daemon)
        time.sleep(0.1)
    assert grower.run("result = tool.poll()") == 0
    report = reports(daemon, 1)["grower"]
    assert report.verdict == pb.VERDICT_OK
    assert report.frozen_usec < 100_000
    assert not seen, "nobody is paused for cache that can go"
    assert "oom_kill 0" in (daemon.cgroup_dir / "memory.events").read_text()
    assert reader.run("result = reader.poll()") is None


def test_what_an_adopted_session_has_in_cache_is_free_as_well(
    daemon: DaemonProcess, file: Path
) -> None:
    """The cgroup lies beside the pool's, and nothing above it has the kernel take cache back."""
    with container(daemon, READ.replace("PATH", repr(str(file)))) as (made, _):
        wait_until(
            "the file is in use",
            lambda: made.read(knobs.MEMORY_STAT)["active_file"] > CACHE * 0.8,
            60,
        )
        adopt(daemon, made, "box")
        grower = daemon.open("grower", priority="batch")
        grower.run(GROW, LOAD=LOAD, options=["--memory", "130M"], usec=4_000, size=130 * MIB)
        assert grower.run("result = tool.wait()") == 0
        report = reports(daemon, 1)["grower"]
        assert (report.verdict, report.waited_usec) == (pb.VERDICT_OK, 0)
        assert report.frozen_usec < 100_000
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="box"))


def test_cache_in_use_changes_no_order_among_those_that_grow(
    daemon: DaemonProcess, reader: AgentProcess
) -> None:
    """Two that do not fit beside each other end one after the other, the important one first."""
    important = daemon.open("important", priority="important")
    batch = daemon.open("batch", priority="batch")
    for agent in (batch, important):
        agent.run(GROW, LOAD=LOAD, options=[], usec=6_000, size=120 * MIB)
    assert important.run("result = tool.wait()") == 0
    assert batch.run("result = tool.wait()") == 0
    told = reports(daemon, 2)
    assert {r.verdict for r in told.values()} == {pb.VERDICT_OK}
    assert told["important"].frozen_usec < 100_000
    assert ended(told["important"]) < ended(told["batch"])
    assert "oom_kill 0" in (daemon.cgroup_dir / "memory.events").read_text()
    assert reader.run("result = reader.poll()") is None
