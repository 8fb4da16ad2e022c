"""Weights of sessions and of calls on a disk whose I/O scheduler keeps them, and on one with the
cost model.

For a guest with a disk of its own (`python -m tests.guest.vm --disk 1024:50`): its speed is that of
the device, so whoever writes without end gets what the weights give.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import Admin
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.conftest import StartDaemon
from tests.guest.disk import find_disk
from tests.harness import AgentProcess, DaemonProcess

pytestmark = [pytest.mark.controllers, pytest.mark.full_kernel]

AREA_MIB = 64
MEASURED_S = 5.0
TRIES = 3
SETTLE_S = 1.5
MORE = 0.53
"""What is clearly more than half. On an emulated CPU bfq gives 0.6 to 0.76 of 0.8: who is late
with the next request loses its turn."""
QUIET = "[guard]\nenabled = false\n"
WRITE = "while :; do dd if=/dev/zero of={disk} bs=256K count={count} seek={at} oflag=direct; done"
BEGIN = (
    "call = agent.tool_call('writer', **intent); call.begin(); call.popen(argv, stderr=-3); "
    "result = call.id"
)
BYTES, REQUESTS = 50 << 20, 800
COSTS = " ".join(
    f"{way}bps={BYTES} {way}seqiops={REQUESTS} {way}randiops={REQUESTS}" for way in ("r", "w")
)
"""What the device can do, for the cost model."""


@pytest.fixture(params=["bfq", "io.cost"])
def disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The guest's own disk, with what keeps weights on it; what it had before is put back."""
    device = find_disk()
    scheduler = Path(f"/sys/block/{device.name}/queue/scheduler")
    number = Path(f"/sys/block/{device.name}/dev").read_text().strip()
    root = cgroup2_mount()
    if request.param == "bfq":
        subprocess.run(["modprobe", "bfq"], check=True)
        scheduler.write_text("bfq")
        yield device
        scheduler.write_text("none")
        return
    scheduler.write_text("none")
    (root / "io.cost.model").write_text(f"{number} ctrl=user model=linear {COSTS}")
    (root / "io.cost.qos").write_text(f"{number} enable=1 ctrl=user min=60.00 max=60.00")
    yield device
    (root / "io.cost.qos").write_text(f"{number} enable=0")


class Writers:
    """Calls that write to the disk without end, each to an area of its own."""

    def __init__(self, daemon: DaemonProcess, disk: Path) -> None:
        self._daemon, self._disk, self._areas = daemon, disk, 0

    def begin(self, agent: AgentProcess, **intent: object) -> Path:
        """Have a session write in a call; returns the call's cgroup."""
        script = WRITE.format(disk=self._disk, count=AREA_MIB * 4, at=self._areas * AREA_MIB * 4)
        self._areas += 1
        call: str = agent.run(BEGIN, argv=["sh", "-c", script], intent=intent)
        (leaf,) = self._daemon.cgroup_dir.glob(f"*/call-{call}")
        return leaf


def shares(cgroups: list[Path]) -> list[float]:
    """Each cgroup's part of what all of them wrote in a while."""
    opened = [Cgroup.open(path) for path in cgroups]
    time.sleep(SETTLE_S)
    before = [written(cgroup) for cgroup in opened]
    time.sleep(MEASURED_S)
    wrote = [written(cgroup) - was for cgroup, was in zip(opened, before, strict=True)]
    for cgroup in opened:
        cgroup.close()
    print(f"{[round(count / MEASURED_S / 2**20, 1) for count in wrote]} MiB a second")
    return [count / sum(wrote) for count in wrote]


def share_is(cgroups: list[Path], least: float, most: float) -> bool:
    """Whether the first one's part is in this range in one of some whiles: on a busy machine an
    emulated disk stands still now and then. What is wrong for good does not become right."""
    return any(least <= shares(cgroups)[0] <= most for _ in range(TRIES))


def written(cgroup: Cgroup) -> int:
    """Bytes that a cgroup has written to disks."""
    return sum(each["wbytes"] for each in cgroup.read(knobs.IO_STAT).values())


def test_a_disk_is_shared_by_weight(start_daemon: StartDaemon, disk: Path) -> None:
    daemon = start_daemon(QUIET)
    writers = Writers(daemon, disk)
    important, normal = daemon.open("vip", priority="important"), daemon.open("hog")
    large = writers.begin(important, io_weight=300)
    writers.begin(normal)
    both = [daemon.cgroup_dir / "vip", daemon.cgroup_dir / "hog"]
    assert share_is(both, MORE, 0.95), "400 of 500"
    with Admin(str(daemon.run_dir)) as admin:
        assert admin.update_session("hog", io_weight=400).io_weight == 400
    assert share_is(both, 0.45, 0.55)
    small = writers.begin(important, io_weight=100)
    assert share_is([large, small], MORE, 0.95), "300 of 400"
