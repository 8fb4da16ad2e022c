"""What a call gets that is begun inside another one: at most what is left of that. Pure.

The kernel holds the sum of both within the outer call's limits in any case, because the inner
cgroup lies in the outer one. The grant says so beforehand, so that a tool can plan by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.grant import CALL_MEMORY_LEAST, Ceiling, Grant, grant_for, memory_high
from agentcgroupd.intents.parse import Intent
from agentcgroupd.units import show_bytes, show_usec

GPU_FIELDS = ("gpu", "gpu_memory", "gpu_priority", "gpu_device")


@dataclass(frozen=True, slots=True)
class Room:
    """What is left of a call for one inside it. None: that has no limit there."""

    outer_id: str
    outer: Grant
    memory_bytes: int | None
    pids: int | None
    timeout_usec: int | None
    """The longest that the inner call's timeout may be, counted from when that began."""

    @property
    def call(self) -> str:
        """How sentences name the outer call."""
        return f"call {self.outer_id} that this one is in"


def without_gpu(intent: Intent) -> Intent:
    """The intent without its part of a GPU, which is the outer call's."""
    return replace(intent, gpu=None, gpu_memory=None, gpu_priority=None, gpu_device=None)


def inner_grant(intent: Intent, above: Ceiling, room: Room) -> tuple[Grant, tuple[str, ...]]:
    """Decide what a call gets for its intent inside another one, and list what it got less of than
    it asked for, a sentence each; they are among the grant's advice too. `above`: the limits of the
    session. Raises InvalidField where it asks for what the outer call has nothing of."""
    check_gpu(intent, room)
    return cut(grant_for(without_gpu(intent), above), intent, room)


def cut(grant: Grant, intent: Intent, room: Room) -> tuple[Grant, tuple[str, ...]]:
    """Cut a grant to the room that is left; returns it with a sentence for each field that was
    asked for and is less."""
    outer, said = room.outer, list[str]()
    most = _memory_max(grant, intent, room, said)
    expected = grant.memory_expected_bytes
    if most is not None and expected > most:
        said.append(_of_memory("memory", expected, most, room))
        expected = most
    timeout = grant.timeout_usec
    if room.timeout_usec is not None and (timeout is None or timeout > room.timeout_usec):
        timeout = room.timeout_usec
        if intent.timeout is not None:
            left = show_usec(max(0, timeout))
            said.append(_got("timeout", show_usec(intent.timeout), f"has {left} left", room))
    cpu_max, pids_max = grant.cpu_max_millicores, grant.pids_max
    cores = outer.cpu_max_millicores
    if cores is not None and (cpu_max is None or cpu_max > cores):
        if intent.cpu_max is not None:
            asked = f"{intent.cpu_max / 1000:g} cores"
            said.append(_got("cpu_max", asked, f"has {cores / 1000:g}", room))
        cpu_max = cores
    if room.pids is not None and (pids_max is None or pids_max > room.pids):
        if intent.pids_max is not None:
            left = _left(str(room.pids), str(outer.pids_max))
            said.append(_got("pids_max", str(intent.pids_max), left, room))
        pids_max = room.pids
    priority = min(grant.priority, outer.priority)
    if intent.priority is not None and intent.priority > priority:
        has = f"has {outer.priority}"
        said.append(_got("priority", str(intent.priority), has, room))
    if intent.on_pressure not in (None, outer.on_pressure):
        has = f"has {outer.on_pressure}, and what is done under pressure is done to it as a whole"
        said.append(_got("on_pressure", intent.on_pressure or "", has, room))
    return (
        replace(
            grant,
            memory_expected_bytes=expected,
            memory_max_bytes=most,
            memory_high_bytes=memory_high(outer.on_pressure, most),
            cpu_max_millicores=cpu_max,
            pids_max=pids_max,
            timeout_usec=timeout,
            priority=priority,
            on_pressure=outer.on_pressure,
            gpu_percent=outer.gpu_percent,
            gpu_memory_bytes=outer.gpu_memory_bytes,
            gpu_priority=outer.gpu_priority,
            gpu_devices=outer.gpu_devices,
            environment=outer.environment,
            advice=(*grant.advice, *said),
        ),
        tuple(said),
    )


def _memory_max(grant: Grant, intent: Intent, room: Room, said: list[str]) -> int | None:
    most, left = grant.memory_max_bytes, room.memory_bytes
    if left is None:
        return most
    left = max(CALL_MEMORY_LEAST, left)
    asked = intent.memory_max or (intent.hint if isinstance(intent.hint, int) else None)
    if asked is not None and asked > left:
        said.append(_of_memory("memory_max", asked, left, room))
    return left if most is None else min(most, left)


def _of_memory(field: str, asked: int, left: int, room: Room) -> str:
    has = _left(show_bytes(left), show_bytes(room.outer.memory_max_bytes or 0))
    return _got(field, show_bytes(asked), has, room)


def _left(left: str, most: str) -> str:
    return f"has {most}" if left == most else f"has {left} left of {most}"


def _got(field: str, asked: str, has: str, room: Room) -> str:
    return f"{field}: you asked for {asked}; {room.call} {has}, which is what the call got."


def check_gpu(intent: Intent, room: Room) -> None:
    """Refuse to ask for more of GPUs than the outer call has, whose part both share. Raises
    InvalidField."""
    outer = room.outer
    has: dict[str, tuple[int | None, int | None, Callable[[int], str]]] = {
        "gpu": (intent.gpu, outer.gpu_percent, lambda v: f"{v}%"),
        "gpu_memory": (intent.gpu_memory, outer.gpu_memory_bytes, show_bytes),
        "gpu_priority": (intent.gpu_priority, outer.gpu_priority, str),
    }
    for field, (asked, most, show) in has.items():
        if asked is None or (most is not None and asked <= most):
            continue
        if most is None:
            allowed, why = "nothing", f"{room.call} has no part of a GPU"
        else:
            allowed, why = f"at most {show(most)}", f"both share the part of {room.call}"
        raise InvalidField(field, show(asked), allowed, why)
