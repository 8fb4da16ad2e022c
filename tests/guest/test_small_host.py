"""A host of 2 GB with zram, where nothing compresses: nobody dies, and the important session is not
swapped out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.host import zram
from agentcgroupd.host.memory import host_memory_bytes
from tests.conftest import StartDaemon
from tests.harness import EXEC, wait_until

pytestmark = [pytest.mark.controllers, pytest.mark.full_kernel]

LOAD = str(Path(EXEC).with_name("agentcg-load"))
"""Fills pages with random bytes: zram takes as much for them as they took."""
MIB = 1 << 20
WORK = """
tool = subprocess.Popen([EXEC, "--name", name, "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(f"8000 {mib << 20} 0\\n{hold_ms} {mib << 20} 0\\n")
tool.stdin.close()
"""


def global_oom_kills() -> int:
    """The processes that the kernel has killed for want of memory, of all limits and the host."""
    lines = dict(line.split(" ") for line in Path("/proc/vmstat").read_text().splitlines())
    return int(lines["oom_kill"])


@pytest.fixture
def no_device_after() -> Iterator[None]:
    """Take the daemon's swap away once its daemon and agents are gone: it outlives both."""
    yield
    zram.prepare("off", 0)


@pytest.mark.usefixtures("no_device_after")
def test_more_than_fits_and_nothing_compresses(start_daemon: StartDaemon) -> None:
    assert host_memory_bytes() < 2 << 30, "the point is a small host"
    kills = global_oom_kills()
    daemon = start_daemon('[pool]\nzram = "auto"\n')
    vip = daemon.open("vip", priority="important")
    others = [daemon.open(f"b{number}", priority="batch") for number in range(4)]
    for agent in (*others, vip):
        # Cold memory of agents that wait for their calls: what is to leave first.
        agent.run("held = os.urandom(64 << 20)")
    vip.run(WORK, name="work", LOAD=LOAD, mib=300, hold_ms=20_000)
    for agent in others:
        agent.run(WORK, name="work", LOAD=LOAD, mib=450, hold_ms=2000)
    session = daemon.cgroup_dir / "vip"
    assert vip.run("result = tool.wait()") == 0
    assert (session / "memory.swap.peak").read_text().strip() == "0"
    assert [agent.run("result = tool.wait()") for agent in others] == [0] * 4
    wait_until("all have ended", lambda: not daemon.call_dirs())
    reports = daemon.admin.ListReports(pb.ListReportsRequest()).reports
    assert {report.verdict for report in reports} == {pb.VERDICT_OK}
    assert global_oom_kills() == kills
    device = zram.find()
    assert device is not None
    print(f"zram holds {device.stat().held_bytes / MIB:.0f} MiB")
