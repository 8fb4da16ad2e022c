"""A cgroup's share of block devices beside others, and how long its requests may take."""

from __future__ import annotations

import errno
import logging
from collections.abc import Container

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.host.block_devices import whole_devices

log = logging.getLogger(__name__)

WEIGHTS: tuple[tuple[Knob[int], int], ...] = (
    (knobs.IO_WEIGHT, 10_000),
    (knobs.IO_BFQ_WEIGHT, 1000),
)
"""Interface files of weights, and the most that each takes. The first counts on devices with the
cost model (io.cost.qos), the second on those whose I/O scheduler is bfq."""
DEFAULT_WEIGHT = 100
"""What the kernel gives a cgroup (include/linux/cgroup.h: CGROUP_WEIGHT_DFL)."""
NO_SUCH_DEVICE = (errno.ENODEV, errno.EOPNOTSUPP)
"""What the kernel says of a device that was removed, and of one that it keeps no limits of."""


def has_weight(files: Container[str]) -> bool:
    """Tell whether a cgroup with these interface files has a weight for disks."""
    return any(knob.file in files for knob, _ in WEIGHTS)


def write_weight(cgroup: Cgroup, weight: int) -> bool:
    """Set a weight of 1 to 10000 in those interface files of a cgroup that keep one now: that of
    bfq comes and goes with its module. Returns whether there is one. Raises KnobError."""
    kept = False
    for knob, most in WEIGHTS:
        try:
            cgroup.write(knob, min(weight, most))
        except CgroupGone:
            raise
        except KnobError as error:
            if error.errno != errno.ENOENT:
                raise
        else:
            kept = True
    return kept


def write_latency(cgroup: Cgroup, target_usec: int | None) -> None:
    """Set how long a cgroup's requests may take on each block device before the kernel has others
    beside it wait; None: nobody waits for it. The file has to be there. What one device refuses is
    logged. Raises KnobError."""
    target = "max" if target_usec is None else str(target_usec)
    devices = whole_devices() if target_usec is not None else cgroup.read(knobs.IO_LATENCY)
    for device in devices:
        write_line(cgroup, knobs.IO_LATENCY.file, f"{device} target={target}")


def write_line(cgroup: Cgroup, file: str, line: str) -> None:
    """Write what holds for one device; what it refuses is logged. Raises CgroupGone."""
    try:
        cgroup.write_text(file, line)
    except CgroupGone:
        raise
    except KnobError as error:
        level = logging.DEBUG if error.errno in NO_SUCH_DEVICE else logging.WARNING
        log.log(level, "%s", error)
