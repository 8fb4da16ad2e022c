"""The part of GPUs that an intent asks for, completed and checked against the devices. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.gpu import DeviceSelection, GpuCeiling
from agentcgroupd.intents.parse import Intent
from agentcgroupd.units import show_bytes

PART_MEMORY_LEAST = 1 << 20
"""Bytes: a share so small that its memory rounds to nothing still gets this much."""


@dataclass(frozen=True, slots=True)
class Part:
    """A share and an amount of memory, both of each of the selected devices."""

    percent: int
    memory_bytes: int
    priority: int
    devices: DeviceSelection


def _refuse_device_fields(intent: Intent) -> None:
    """Refuse fields that make sense only beside a part. Raises InvalidField."""
    for field in ("gpu_priority", "gpu_device"):
        value = getattr(intent, field)
        if value is not None:
            raise InvalidField(field, str(value), "this only beside gpu or gpu_memory")


def _least_memory(selection: DeviceSelection, above: GpuCeiling) -> int:
    """Bytes that each selected device has at least. Raises InvalidField if there are too few
    devices."""
    fit = above.matching(selection)
    if len(fit) < selection.count:
        names = ", ".join(f"{d.index} ({d.uuid})" for d in above.devices)
        allowed = f"some of the devices here: {names}"
        why = "there is no such device" if selection.named else f"there are {len(fit)} only"
        raise InvalidField("gpu_device", str(selection), allowed, why)
    # Of `any` the largest will do, of several all have to.
    sizes = sorted((d.memory_bytes for d in fit), reverse=True)
    return sizes[selection.count - 1]


def gpu_part(
    intent: Intent, above: GpuCeiling, priority: int, priority_most: int, advice: list[str]
) -> Part | None:
    """Complete the part that an intent asks for: memory follows from the share, or the share from
    the memory, where only one of them is given.

    `priority`: the call's own, which its part has unless gpu_priority says otherwise.
    `priority_most`: the session's. A sentence is added to `advice` where less is given than was
    asked for. Returns None where no part is asked for. Raises InvalidField where it can never be
    had.
    """
    share, memory = intent.gpu, intent.gpu_memory
    if share is None and memory is None:
        _refuse_device_fields(intent)
        return None
    if not above.devices:
        field = "gpu_memory" if share is None else "gpu"
        shown = show_bytes(memory or 0) if share is None else f"{share}%"
        raise InvalidField(field, shown, "nothing", f"there is no GPU for calls: {above.why_none}")
    selection = intent.gpu_device or DeviceSelection()
    least = _least_memory(selection, above)
    if memory is not None and memory > least:
        allowed = f"at most {show_bytes(least)}"
        raise InvalidField("gpu_memory", show_bytes(memory), allowed, "no device has so much")
    if share is None:
        rounded_up = -(-(memory or 0) * 100 // least)
        share = max(1, min(100, rounded_up))
    if memory is None:
        memory = max(PART_MEMORY_LEAST, least * share // 100)
    chosen = priority if intent.gpu_priority is None else intent.gpu_priority
    if chosen > priority_most:
        advice.append(
            f"gpu_priority: you asked for {chosen}; this session has {priority_most}, which is "
            "what the call got."
        )
        chosen = priority_most
    return Part(share, memory, chosen, selection)
