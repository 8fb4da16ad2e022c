"""A call's share of disks, lowered for a while beside what was granted, and put back."""

from __future__ import annotations

import logging

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.disk_share import (
    DEFAULT_WEIGHT,
    NO_SUCH_DEVICE,
    write_weight,
)
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.errors import KnobError
from agentcgroupd.state.session import Call, boottime_usec

log = logging.getLogger(__name__)

DEVICES_MOST = 64
IO_MAX = Knob("io.max", str)


def lower_weight(call: Call, percent: int) -> bool:
    """Leave a call this part of its weight. Returns whether it has one here. Raises KnobError."""
    weight = max(1, (call.grant.io_weight or DEFAULT_WEIGHT) * percent // 100)
    if not write_weight(call.cgroup, weight):
        return False
    call.disks.weight_since_usec = boottime_usec()
    return True


def restore_weight(call: Call) -> None:
    """Give a call the weight of its grant. Raises KnobError."""
    call.disks.weight_since_usec = None
    write_weight(call.cgroup, call.grant.io_weight or DEFAULT_WEIGHT)


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
    write_weight(call.cgroup, call.grant.io_weight or DEFAULT_WEIGHT)
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
        if error.errno not in NO_SUCH_DEVICE:
            raise
        log.debug("%s", error)
        return False
    return True
