"""GPUs as an intent and a grant speak of them: devices that are asked for, and those there are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from agentcgroupd.errors import InvalidField
from agentcgroupd.units import bare, lowered

DEVICE_ALLOWED = "any, any:2, an index such as 0, a UUID such as GPU-..., or several with commas"
DEVICES_MOST = 64
_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Fa-f-]{8,64}")


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU that parts can be granted of."""

    index: int
    uuid: str
    minor: int
    name: str
    memory_bytes: int
    """What may be granted of its memory."""
    lost: bool = False

    def answers_to(self, name: str) -> bool:
        """Tell whether an index or a UUID means this device."""
        return name in (str(self.index), self.uuid)


@dataclass(frozen=True, slots=True)
class DeviceSelection:
    """Devices that an intent asks for: `any` so many, or the ones that it names.

    `str` gives the text that `parse_device` reads back into the same selection.
    """

    any: int = 1
    named: tuple[str, ...] = ()
    """Indices and UUIDs; empty: any device will do."""

    def __str__(self) -> str:
        if self.named:
            return ",".join(self.named)
        return "any" if self.any == 1 else f"any:{self.any}"

    @property
    def count(self) -> int:
        """How many devices are asked for."""
        return len(self.named) or self.any

    def may_use(self, device: Device) -> bool:
        """Tell whether a device is among those that would do."""
        return not self.named or any(device.answers_to(name) for name in self.named)


def parse_device(field: str, text: str) -> DeviceSelection:
    """Read `any`, `any:2`, `0`, `GPU-...` or `0,1`. Raises InvalidField."""
    word = bare(text)
    kind, colon, number = word.partition(":")
    if lowered(kind) == "any":
        if not colon:
            return DeviceSelection()
        if not re.fullmatch(r"[0-9]{1,2}", number) or not 1 <= int(number) <= DEVICES_MOST:
            raise InvalidField(field, text, DEVICE_ALLOWED)
        return DeviceSelection(int(number))
    parts = [bare(part) for part in word.split(",")]
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,3}", part) and not _UUID.fullmatch(part):
            raise InvalidField(field, text, DEVICE_ALLOWED)
    named = tuple(str(int(part)) if part.isdigit() else part for part in parts)
    if len(set(named)) != len(named) or len(named) > DEVICES_MOST:
        raise InvalidField(field, text, DEVICE_ALLOWED, "a device is named twice")
    return DeviceSelection(named=named)


@dataclass(frozen=True, slots=True)
class GpuCeiling:
    """The devices of this host, or why there are none to ask for."""

    devices: tuple[Device, ...] = ()
    why_none: str = "GPUs are not looked after here"

    def matching(self, selection: DeviceSelection) -> list[Device]:
        """List the devices that are named, or all where any will do."""
        if not selection.named:
            return list(self.devices)
        return [d for name in selection.named for d in self.devices if d.answers_to(name)]
