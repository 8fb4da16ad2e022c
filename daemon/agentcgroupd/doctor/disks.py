"""What the kernel keeps of disks' time for cgroups: weights, and how long requests may take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agentcgroup.text import printable
from agentcgroupd.cgroup import knobs
from agentcgroupd.doctor.diagnosis import Check, Feature, State
from agentcgroupd.host.block_devices import SYS_BLOCK, device_name

COST = "io.cost.qos"
"""In the root of the cgroup2 mount: a line `8:0 enable=1 ...` for each device that has the cost
model, which io.weight goes by."""
BFQ = "[bfq]"
"""How `queue/scheduler` of a device shows that bfq is the one in use."""
DISKS_SHOWN = 4
LATENCY = Check(
    name="latency of disks",
    yes="io.latency is there",
    no="the kernel has no io.latency",
    remedy="use a kernel with CONFIG_BLK_CGROUP_IOLATENCY, where sessions ask for io_latency",
    fallback="weights and rates alone keep important sessions from waiting for disks",
)


def disk_features(mount: Path, sys_block: Path = SYS_BLOCK) -> Iterator[Feature]:
    """Whether shares of disks are kept. `mount`: of cgroup2."""
    weighed = [*_with_cost_model(mount), *_with_bfq(sys_block)]
    fallback = "calls that use disks most are held to rates (io.max) while important ones wait"
    if weighed:
        more = f" and {len(weighed) - DISKS_SHOWN} more" if len(weighed) > DISKS_SHOWN else ""
        reason = printable(f"weights count on {', '.join(weighed[:DISKS_SHOWN])}{more}")
        yield Feature("shares of disks", State.WORKS, reason)
    else:
        reason = "no disk has io.cost or the I/O scheduler bfq, so weights (io.weight) do nothing"
        remedy = (
            "for each disk: echo bfq > /sys/block/DISK/queue/scheduler, or, which costs less, "
            f'echo "MAJOR:MINOR enable=1" > {mount / COST}'
        )
        yield Feature("shares of disks", State.MISSING, reason, remedy, fallback)
    yield _latency(mount)


def _latency(mount: Path) -> Feature:
    """Look for the file where the io controller is: not in the root, which has no limits."""
    try:
        has_io = next(mount.glob(f"*/{knobs.IO_STAT.file}"), None)
    except OSError:
        has_io = None
    if has_io is None:
        reason = "no cgroup has the io controller yet, so its files are not to be seen"
        return Feature(LATENCY.name, State.UNKNOWN, reason, fallback=LATENCY.fallback)
    return LATENCY.answered(has_io.with_name(knobs.IO_LATENCY.file).exists())


def _with_cost_model(mount: Path) -> list[str]:
    try:
        lines = (mount / COST).read_text(encoding="ascii").split("\n")
    except OSError:
        return []
    on = [line.split(" ", 1)[0] for line in lines if "enable=1" in line.split()]
    return [f"{device_name(device)} (io.cost)" for device in on]


def _with_bfq(sys_block: Path) -> list[str]:
    try:
        disks = sorted(sys_block.iterdir())
    except OSError:
        return []
    return [f"{disk.name} (bfq)" for disk in disks if _scheduler_is_bfq(disk)]


def _scheduler_is_bfq(disk: Path) -> bool:
    try:
        return BFQ in (disk / "queue" / "scheduler").read_text(encoding="ascii").split()
    except OSError:
        return False  # removed meanwhile
