"""A call's share of disks, lowered for a while beside what was granted, and put back."""

from __future__ import annotations

import errno
import logging

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.errors import KnobError
from agentcgroupd.state.session import Call, boottime_usec

log = logging.getLogger(__name__)

DEFAULT_WEIGHT = 100
"""What the kernel gives a cgroup (block/blk-cgroup.h: CGROUP_WEIGHT_DFL)."""
DEVICES_MOST = 64
IO_MAX = Knob("io.max", str)


def lower_weight(call: Call, percent: int) -> bool:
    """Leave a call this part of its weight. Returns whether it has one here. Raises KnobError."""
    if knobs.IO_WEIGHT.file not in call.session.offered:
        return False
    weight = max(1, (call.grant.io_weight or DEFAULT_WEIGHT) * percent // 100)
    call.cgroup.write(knobs.IO_WEIGHT, weight)
    call.disks.weight_since_usec = boottime_usec()
    return True


def restore_weight(call: Call) -> None:
    """Give a call the weight of its grant. Raises KnobError."""
    call.disks.weight_since_usec = None
    call.cgroup.write(knobs.IO_WEIGHT, call.grant.io_weight or DEFAULT_WEIGHT)


def hold(call: Call, rate: int) -> bool:
    """Hold a call to so many bytes a second of each disk that it has used, reads and writes each.
    Returns whether there is one. Raises KnobError."""
    if IO_MAX.file not in call.session.offered:
        return False
    used = [*(call.cgroup.read_if(knobs.IO_STAT) or {})][:DEVICES_MOST]
    call.disks.held_devices = tuple(d for d in used if _write(call, d, rate))
    if call.disks.held_devices:
        call.disks.held_since_usec = boottime_usec()
    return bool(call.disks.held_devices)


def let_go(call: Call) -> None:
    """Hold a call to what its grant says. Raises KnobError."""
    devices, call.disks.held_devices = call.disks.held_devices, ()
    call.disks.held_since_usec = None
    for device in devices:
        _write(call, device, None)


def take_up(call: Call) -> None:
    """Give a call that was found again what its grant says: an earlier daemon may have been killed
    while it had lowered that. Raises KnobError."""
    offered = call.session.offered
    if knobs.IO_WEIGHT.file in offered:
        granted = call.grant.io_weight or DEFAULT_WEIGHT
        if call.cgroup.read_if(knobs.IO_WEIGHT) not in (None, granted):
            call.cgroup.write(knobs.IO_WEIGHT, granted)
    if IO_MAX.file not in offered:
        return
    for line in (call.cgroup.read_if(IO_MAX) or "").split("\n")[:DEVICES_MOST]:
        if line:
            _write(call, line.partition(" ")[0], None)


def _write(call: Call, device: str, rate: int | None) -> bool:
    """Hold a call to a rate on one device, or to less where its grant says so; None: as granted.
    Returns whether the device is there. Raises KnobError."""
    limits = []
    for key, name in (("rbps", "io_read_max"), ("wbps", "io_write_max")):
        granted = call.grant.settings.get(name)
        rates = [r for r in (rate, int(granted) if granted else None) if r is not None]
        limits.append(f"{key}={min(rates, default='max')}")
    try:
        call.cgroup.write_text(IO_MAX.file, f"{device} {' '.join(limits)}")
    except KnobError as error:
        if error.errno not in (errno.ENODEV, errno.EOPNOTSUPP):
            raise
        log.debug("%s", error)  # removed meanwhile, or one that the kernel keeps no limits of
        return False
    return True
