"""Kinds of values in the configuration, each read and checked by itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from agentcgroupd.errors import InvalidField
from agentcgroupd.units import (
    bare,
    parse_bytes,
    parse_count,
    parse_duration,
    parse_net_rate,
    parse_priority,
)

T = TypeVar("T")

PAGES_PER_S_MOST = 1_000_000_000
"""More page faults a second than any host has."""
PROGRAM_CHARS_MAX = 64
"""The longest glob on a program's name, whose characters may each need a set: `[xX]`."""
AUDIT_BYTES = 64 << 20
"""Size at which the audit log is renamed, where the configuration says nothing."""


class Section(BaseModel):
    """Base of all parts: frozen, and nothing unknown is let in."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def quantity(parse: Callable[[str, str], T], field: str) -> BeforeValidator:
    """A validator that reads text (or a bare number) with one of the parsers of `units`."""

    def convert(value: object) -> object:
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InvalidField(field, repr(value), "text or a number")
        return parse(field, str(value))

    return BeforeValidator(convert)


def _count(least: int, most: int) -> Callable[[str, str], int]:
    return lambda field, text: parse_count(field, text, least, most)


def power_of_two(field: str, text: str) -> int:
    """A size that a ring buffer may have. Raises InvalidField."""
    size = parse_bytes(field, text, least=4096)
    if size & (size - 1) or not 4096 <= size <= 1 << 30:
        raise InvalidField(field, text, "a power of two from 4K to 1G, such as 16M")
    return size


EXEC_HOLD_MOST_USEC = 1_000_000


def parse_exec_hold(field: str, text: str) -> int:
    """Microseconds of a program's wait at its exec, 0 for `off`. Raises InvalidField."""
    if bare(text) == "off":
        return 0
    value = parse_duration(field, text)
    if value > EXEC_HOLD_MOST_USEC:
        raise InvalidField(field, text, "off, or a time from 1ms to 1s")
    return value


def parse_zram(field: str, text: str) -> int | Literal["off", "auto"]:
    """`off`, `auto`, or the size of the device. Raises InvalidField."""
    try:
        match text.strip().lower():
            case "off":
                return "off"
            case "auto":
                return "auto"
        return parse_bytes(field, text)
    except InvalidField:
        raise InvalidField(field, text, "off, auto, or a size such as 8G") from None


DISK_FREE_ALLOWED = "a part such as 5%, from 0.1% to 50%, a size such as 2G, or off"


def free_least(text: str, total_bytes: int) -> int:
    """Give the room that `5%`, `2G` or `off` (none) asks for on a file system of this size. Raises
    InvalidField."""
    word = text.strip().lower()
    if word == "off":
        return 0
    try:
        if not word.endswith("%"):
            return parse_bytes("disk_free", word)
        percent = float(Decimal(word[:-1].strip()))
    except (ArithmeticError, InvalidField):
        raise InvalidField("disk_free", text, DISK_FREE_ALLOWED) from None
    if not 0.1 <= percent <= 50:
        raise InvalidField("disk_free", text, DISK_FREE_ALLOWED)
    return int(total_bytes * percent / 100)


def checked_room(text: str) -> str:
    """Check what `free_least` reads. Raises InvalidField."""
    free_least(text, 0)
    return text.strip()


def audit_bytes(value: object) -> object:
    """The default for what is left empty."""
    return AUDIT_BYTES if value in (None, "") else value


def zram_size(value: object) -> object:
    """What `parse_zram` reads, from a value in TOML. Raises InvalidField."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidField("zram", repr(value), "off, auto, or a size such as 8G")
    return parse_zram("zram", str(value))


MemorySize = Annotated[int | None, quantity(parse_bytes, "size")]
NetRate = Annotated[int | None, quantity(parse_net_rate, "rate")]
OptionalDuration = Annotated[int | None, quantity(parse_duration, "duration")]
Duration = Annotated[int, quantity(parse_duration, "duration")]
Priority = Annotated[int, quantity(parse_priority, "priority")]
Pids = Annotated[int | None, quantity(_count(1, 4_194_304), "pids")]


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise InvalidField("flag", str(value), "true or false, without quotes")
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidField("number", str(value), "a whole number, without quotes")
    return value


Flag = Annotated[bool, BeforeValidator(_flag)]
Count = Annotated[int, BeforeValidator(_whole)]


def _pool_cgroup(path: str) -> str:
    parts = path.strip("/").split("/")
    if not path.strip("/") or {"", ".", ".."} & {*parts}:
        raise InvalidField("cgroup", path, "a path below the cgroup2 mount, such as /agentcg")
    return path


def _run_dir(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise InvalidField("run_dir", str(path), "an absolute path without `..`")
    return path


def _file(path: Path | None) -> Path | None:
    if path is not None and (not path.is_absolute() or ".." in path.parts or path.name == ""):
        raise InvalidField("path", str(path), "an absolute path of a file, without `..`")
    return path


def _program(glob: str) -> str:
    if not 1 <= len(glob) <= PROGRAM_CHARS_MAX:
        allowed = f"1 to {PROGRAM_CHARS_MAX} characters: what it stands for has at most 15"
        raise InvalidField("program", glob, allowed)
    return glob


GLOB_CHARS_MAX = 256


_LOOPBACK = re.compile(r"(127\.0\.0\.1|\[::1\]|localhost):(\d{1,5})")


def _metrics_address(address: str) -> str:
    found = _LOOPBACK.fullmatch(address)
    if address and (found is None or not 0 <= int(found[2]) <= 65535):
        allowed = "a loopback address with a port, such as 127.0.0.1:9464, or nothing"
        raise InvalidField("metrics_address", address, allowed)
    return address


PoolPath = Annotated[str, AfterValidator(_pool_cgroup)]
RunDir = Annotated[Path, AfterValidator(_run_dir)]
LoopbackAddress = Annotated[str, AfterValidator(_metrics_address)]
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]
FileOfOurs = Annotated[Path | None, AfterValidator(_file)]
ArgumentsGlob = Annotated[str, Field(max_length=GLOB_CHARS_MAX)]
ProgramGlob = Annotated[str, AfterValidator(_program)]
PagesPerS = Annotated[Count, Field(ge=0, le=PAGES_PER_S_MOST)]
