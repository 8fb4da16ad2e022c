"""Which devices a call gets, and whether there is room: pure arithmetic over what was granted.

Shares of a device add up to at most 100 %, memory to at most what may be granted of it. Nothing is
kept beside the grants themselves, so a restarted daemon knows what its calls hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentcgroupd.intents.gpu import Device, DeviceSelection

AGE_PRIORITY = 10
AGE_STEP_USEC = 10_000_000
"""A call that waits gains ten steps of priority every ten seconds. The policy's age_step is for
memory alone."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A part that a call or a session has, of each of some devices."""

    devices: tuple[str, ...]
    percent: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Free:
    """What of a device is granted to nobody."""

    percent: int
    memory_bytes: int


def free_of(device: Device, holdings: Iterable[Holding]) -> Free:
    """Subtract what is granted from a device; of one that is lost nothing is left."""
    percent, memory = (0, 0) if device.lost else (100, device.memory_bytes)
    for holding in holdings:
        if device.uuid in holding.devices:
            percent -= holding.percent
            memory -= holding.memory_bytes
    return Free(max(0, percent), max(0, memory))


def place(
    selection: DeviceSelection,
    percent: int,
    memory_bytes: int,
    devices: Sequence[Device],
    holdings: Sequence[Holding],
) -> tuple[str, ...] | None:
    """Find the devices for a part: their UUIDs, or None if not enough of them is free now. Of
    several that fit the fullest is taken, so that large parts fit elsewhere."""
    free = {d.uuid: free_of(d, holdings) for d in devices}

    def fits(device: Device) -> bool:
        left = free[device.uuid]
        return not device.lost and left.percent >= percent and left.memory_bytes >= memory_bytes

    if selection.named:
        named = [d for name in selection.named for d in devices if d.answers_to(name)]
        whole = len(named) == len(selection.named) and all(map(fits, named))
        return tuple(d.uuid for d in named) if whole else None
    fitting = sorted(
        filter(fits, devices), key=lambda d: (free[d.uuid].percent, free[d.uuid].memory_bytes)
    )
    if len(fitting) < selection.any:
        return None
    return tuple(d.uuid for d in sorted(fitting[: selection.any], key=lambda d: d.index))


@dataclass(frozen=True, slots=True)
class Asking:
    """A call that waits for a part."""

    id: str
    priority: int
    since_usec: int
    deadline_usec: int
    devices: DeviceSelection
    percent: int
    memory_bytes: int


def in_order(now_usec: int, asking: Iterable[Asking]) -> list[Asking]:
    """Sort by priority and age, the next to start first."""

    def key(a: Asking) -> tuple[float, int, str]:
        aged = AGE_PRIORITY * max(0, now_usec - a.since_usec) / AGE_STEP_USEC
        return -(a.priority + aged), a.since_usec, a.id

    return sorted(asking, key=key)


def admit(
    now_usec: int, asking: Iterable[Asking], devices: Sequence[Device], holdings: Sequence[Holding]
) -> dict[str, tuple[str, ...]]:
    """Choose who may start now: UUIDs of its devices by id. Once a call has waited for half of its
    time, no later one passes it on the devices that it could use."""
    taken = list(holdings)
    started: dict[str, tuple[str, ...]] = {}
    for a in in_order(now_usec, asking):
        found = place(a.devices, a.percent, a.memory_bytes, devices, taken)
        if found is not None:
            started[a.id] = found
            taken.append(Holding(found, a.percent, a.memory_bytes))
        elif now_usec >= a.since_usec + (a.deadline_usec - a.since_usec) // 2:
            blocked = tuple(d.uuid for d in devices if a.devices.may_use(d))
            taken.append(Holding(blocked, a.percent, a.memory_bytes))
    return started
