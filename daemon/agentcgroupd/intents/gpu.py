"""What of the GPUs a call asks for, and what a session may have of them. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentcgroupd.errors import InvalidField
from agentcgroupd.units import show_bytes

if TYPE_CHECKING:
    from agentcgroupd.intents.parse import Intent

DEVICE_ALLOWED = "any, any:2, an index such as 0, a UUID such as GPU-..., or several with commas"
DEVICES_MOST = 64
_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Fa-f-]{8,64}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which devices: so many of any, or these. `str` gives the text back in its plain form."""

    any: int = 1
    these: tuple[str, ...] = ()
    """Indices and UUIDs."""

    def __str__(self) -> str:
        return ",".join(self.these) or ("any" if self.any == 1 else f"any:{self.any}")

    @property
    def count(self) -> int:
        """How many devices."""
        return len(self.these) or self.any


def parse_device(field: str, text: str) -> Wanted:
    """`any`, `any:2`, `0`, `GPU-...`, `0,1`. Raises InvalidField."""
    word = text.strip()
    kind, colon, number = word.partition(":")
    if kind.lower() == "any":
        if not colon:
            return Wanted()
        if not re.fullmatch(r"[0-9]{1,2}", number) or not 1 <= int(number) <= DEVICES_MOST:
            raise InvalidField(field, text, DEVICE_ALLOWED)
        return Wanted(int(number))
    parts = [part.strip() for part in word.split(",")]
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,3}", part) and not _UUID.fullmatch(part):
            raise InvalidField(field, text, DEVICE_ALLOWED)
    these = tuple(str(int(part)) if part.isdigit() else part for part in parts)
    if len(set(these)) != len(these) or len(these) > DEVICES_MOST:
        raise InvalidField(field, text, DEVICE_ALLOWED, "a device is named twice")
    return Wanted(these=these)


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as it is known to admission."""

    index: int
    uuid: str
    minor: int
    name: str
    memory_bytes: int
    """What may be granted of it."""
    lost: bool = False

    def answers_to(self, name: str) -> bool:
        """Whether it is meant by an index or a UUID."""
        return name in (str(self.index), self.uuid)


@dataclass(frozen=True, slots=True)
class GpuCeiling:
    """What there is to ask for."""

    devices: tuple[Device, ...] = ()
    why_none: str = "GPUs are not looked after here"
    """Where there are no devices."""

    def matching(self, wanted: Wanted) -> list[Device]:
        """Devices that are meant, or that may be chosen from."""
        if not wanted.these:
            return list(self.devices)
        return [d for name in wanted.these for d in self.devices if d.answers_to(name)]


@dataclass(frozen=True, slots=True)
class Part:
    """Of each of some devices."""

    percent: int
    memory_bytes: int
    priority: int
    devices: Wanted


def gpu_part(
    intent: Intent, above: GpuCeiling, priority: int, priority_most: int, advice: list[str]
) -> Part | None:
    """The part that an intent asks for, with what it leaves out filled in: memory in proportion to
    the share, or the share to the memory. None: it asks for none. Raises InvalidField where it can
    never be had."""
    asked = {"gpu": intent.gpu, "gpu_memory": intent.gpu_memory}
    if not any(asked.values()):
        for field in ("gpu_priority", "gpu_device"):
            value = getattr(intent, field)
            if value is not None:
                raise InvalidField(field, str(value), "this only beside gpu or gpu_memory")
        return None
    field, value = next((f, v) for f, v in asked.items() if v is not None)
    shown = f"{value}%" if field == "gpu" else show_bytes(value or 0)
    if not above.devices:
        raise InvalidField(field, shown, "nothing", f"there is no GPU for calls: {above.why_none}")
    wanted = parse_device("gpu_device", intent.gpu_device or "any")
    fit = above.matching(wanted)
    if len(fit) < wanted.count:
        names = ", ".join(f"{d.index} ({d.uuid})" for d in above.devices)
        raise InvalidField("gpu_device", str(wanted), f"some of the devices here: {names}",
                           "there is no such device" if wanted.these else
                           f"there are {len(fit)} only")  # fmt: skip
    # Of `any` the largest will do, of several all have to.
    sizes = sorted((d.memory_bytes for d in fit), reverse=True)
    least = sizes[wanted.count - 1]
    if intent.gpu_memory is not None and intent.gpu_memory > least:
        raise InvalidField("gpu_memory", show_bytes(intent.gpu_memory),
                           f"at most {show_bytes(least)}", "no device has so much")  # fmt: skip
    percent = intent.gpu or max(1, min(100, -(-(intent.gpu_memory or 0) * 100 // least)))
    memory = intent.gpu_memory or max(1 << 20, least * percent // 100)
    chosen = priority if intent.gpu_priority is None else intent.gpu_priority
    if chosen > priority_most:
        advice.append(
            f"gpu_priority: you asked for {chosen}; this session has {priority_most}, which is "
            "what the call got."
        )
        chosen = priority_most
    return Part(percent, memory, chosen, wanted)
