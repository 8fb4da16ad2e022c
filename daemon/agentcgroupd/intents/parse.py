"""Intents as typed values, and the one table that reads them from text.

An intent comes as a protobuf message or as words of the attach protocol. Both are text by field
name, and both are read by `parse_intent`, so that a value means the same and fails with the same
sentence wherever it came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from agentcgroup.text import printable
from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.gpu import DeviceSelection, parse_device
from agentcgroupd.units import (
    bare,
    lowered,
    parse_bytes,
    parse_cores,
    parse_count,
    parse_duration,
    parse_net_rate,
    parse_percent,
    parse_priority,
    parse_rate,
    parse_word,
    show_bytes,
    show_usec,
    suggestion,
)

NAME_CHARS_MAX = 128
ARGV_BYTES_MAX = 4096
ON_PRESSURE = ("freeze", "deny", "throttle", "kill")
LEFTOVERS = ("end", "keep")
HINT_ALLOWED = "memory:high, memory:low or memory:<size>, such as memory:2g"
WAIT_MOST_USEC = 3_600_000_000
PIDS_MOST = 4_194_304
"""PID_MAX_LIMIT, include/linux/threads.h."""


def _parse_weight(field: str, text: str) -> int:
    return parse_count(field, text, 1, 10_000)


def _parse_pids(field: str, text: str) -> int:
    return parse_count(field, text, 1, PIDS_MOST)


def _parse_on_pressure(field: str, text: str) -> str:
    return parse_word(field, text, ON_PRESSURE)


def _parse_leftovers(field: str, text: str) -> str:
    return parse_word(field, text, LEFTOVERS)


def _parse_hint(field: str, text: str) -> str | int:
    kind, _, value = bare(text).partition(":")
    if lowered(kind) != "memory" or not value:
        raise InvalidField(field, text, HINT_ALLOWED)
    if lowered(value) in ("high", "low"):
        return lowered(value)
    try:
        return parse_bytes(field, value)
    except InvalidField:
        raise InvalidField(field, text, HINT_ALLOWED) from None


def _parse_wait(field: str, text: str) -> int:
    if bare(text) == "0":
        return 0
    wait = parse_duration(field, text)
    if wait > WAIT_MOST_USEC:
        raise InvalidField(field, text, f"0, or a time of at most {show_usec(WAIT_MOST_USEC)}")
    return wait


CPUS_MOST = 8192
"""The most CPUs that a Linux kernel is built for (arch/x86/Kconfig: NR_CPUS)."""
CPU_LIST_CHARS_MAX = 1024
CPUS_ALLOWED = (
    f"CPUs as a list such as 0-3,8, with numbers below {CPUS_MOST} and at most "
    f"{CPU_LIST_CHARS_MAX} characters"
)
_CPU_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


@dataclass(frozen=True, slots=True)
class CpuList:
    """CPUs by number. `str` gives them as the kernel writes them (cpuset.cpus): `0-3,8`."""

    cpus: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> CpuList:
        """Read `0-3,8`, in any order, parts that overlap among them. Raises ValueError."""
        mask = 0  # a bit for each CPU, so that a list of many wide ranges costs no more than one
        for part in text.split(","):
            match = _CPU_RANGE.fullmatch(bare(part))
            if match is None:
                raise ValueError(text)
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < CPUS_MOST:
                raise ValueError(text)
            mask |= (1 << (last + 1)) - (1 << first)
        return cls(frozenset(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1))

    def __str__(self) -> str:
        parts: list[list[int]] = []
        for cpu in sorted(self.cpus):
            if parts and cpu == parts[-1][-1] + 1:
                parts[-1][1:] = [cpu]
            else:
                parts.append([cpu])
        return ",".join("-".join(map(str, part)) for part in parts)


def _parse_cpus(field: str, text: str) -> CpuList:
    if len(text) > CPU_LIST_CHARS_MAX:
        raise InvalidField(field, f"{text[:32]}...", CPUS_ALLOWED)
    try:
        return CpuList.parse(text)
    except ValueError:
        raise InvalidField(field, text, CPUS_ALLOWED) from None


SETTING = "setting"
"""Marks a field that no limit stands above: its value, as text, goes to an interface file of the
call (enforce.limits.SETTINGS)."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What a caller asks for, every text read. None: the caller did not say it.

    Each field of the message Intent has its line here, with the parser that reads it.
    """

    memory: Annotated[int | None, parse_bytes] = None
    memory_max: Annotated[int | None, parse_bytes] = None
    cpu_weight: Annotated[int | None, _parse_weight] = None
    cpu_max: Annotated[int | None, parse_cores] = None
    pids_max: Annotated[int | None, _parse_pids] = None
    timeout: Annotated[int | None, parse_duration] = None
    priority: Annotated[int | None, parse_priority] = None
    on_pressure: Annotated[str | None, _parse_on_pressure] = None
    hint: Annotated[str | int | None, _parse_hint] = None
    """`high`, `low`, or bytes."""
    wait: Annotated[int | None, _parse_wait] = None
    """Microseconds; 0: not at all."""
    cpuset: Annotated[CpuList | None, _parse_cpus, SETTING] = None
    leftovers: Annotated[str | None, _parse_leftovers] = None
    gpu: Annotated[int | None, parse_percent] = None
    gpu_memory: Annotated[int | None, parse_bytes] = None
    gpu_priority: Annotated[int | None, parse_priority] = None
    gpu_device: Annotated[DeviceSelection | None, parse_device] = None
    io_read_max: Annotated[int | None, parse_rate, SETTING] = None
    """Bytes a second of each block device."""
    io_write_max: Annotated[int | None, parse_rate, SETTING] = None
    io_weight: Annotated[int | None, _parse_weight] = None
    disk_max: Annotated[int | None, parse_bytes] = None
    """Bytes that it may write to disks in all."""
    net_send_max: Annotated[int | None, parse_net_rate] = None
    """Bytes a second that its sockets may send."""


NOTHING_SAID = Intent()
_MARKS: Mapping[str, tuple[Any, ...]] = {
    name: hint.__metadata__ for name, hint in get_type_hints(Intent, include_extras=True).items()
}
PARSERS: Mapping[str, Callable[[str, str], object]] = {
    name: marks[0] for name, marks in _MARKS.items()
}
"""From the name of a field to what reads its text; it takes the name and the text."""


_SHOWN: Mapping[object, Callable[[Any], str]] = {
    parse_bytes: show_bytes,
    parse_cores: lambda millicores: f"{millicores / 1000:g}",
    parse_duration: show_usec,
    _parse_wait: show_usec,
    parse_rate: lambda rate: f"{show_bytes(rate)}/s",
    parse_net_rate: lambda rate: f"{show_bytes(rate)}/s",
    parse_percent: lambda percent: f"{percent} %",
}


def said_in(intent: Intent) -> dict[str, str]:
    """Give the fields that were said, as people read them, by name."""
    if intent == NOTHING_SAID:
        return {}
    said = ((name, getattr(intent, name)) for name in PARSERS)
    return {
        name: _SHOWN.get(PARSERS[name], str)(value) for name, value in said if value is not None
    }


def settings_of(intent: Intent) -> dict[str, str]:
    """Give the fields that are marked SETTING and said, as text by name."""
    marked = (name for name, marks in _MARKS.items() if SETTING in marks)
    said = {name: getattr(intent, name) for name in marked}
    return {name: str(value) for name, value in said.items() if value is not None}


def parse_intent(texts: Mapping[str, str]) -> Intent:
    """Read an intent from text by field name; an empty text says nothing. Raises InvalidField for
    the first field that is unknown or wrong."""
    if not texts:
        return NOTHING_SAID
    for name, text in texts.items():
        if name not in PARSERS:
            why = suggestion(name, PARSERS) or "there is no such field"
            raise InvalidField(name, text, f"one of the fields {', '.join(PARSERS)}", why)
    values: dict[str, Any] = {
        name: parse(name, texts[name]) for name, parse in PARSERS.items() if texts.get(name)
    }
    intent = Intent(**values)
    if intent.memory and intent.memory_max and intent.memory > intent.memory_max:
        allowed = f"at most memory_max, which is {texts['memory_max']!r}"
        raise InvalidField("memory", texts["memory"], allowed, "it is above memory_max")
    return intent


def check_name(name: str) -> str:
    """Return a call's name if it is 1 to 128 printable characters. Raises InvalidField."""
    if not 1 <= len(name) <= NAME_CHARS_MAX or printable(name) != name:
        allowed = (
            f"1 to {NAME_CHARS_MAX} characters, none of them a control, invisible, or one that "
            "changes the direction of text"
        )
        raise InvalidField("name", name, allowed)
    return name


def name_of_program(argv: Sequence[str]) -> str:
    """Name a call by the file name of its program, whatever characters that has."""
    program = argv[0] if argv else ""
    return printable(os.path.basename(program) or program)[:NAME_CHARS_MAX] or "tool"


def cut_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """Keep the first 4,096 bytes of a command line; a cut argument ends in an ellipsis."""
    kept: list[str] = []
    left = ARGV_BYTES_MAX
    for argument in argv:
        raw = argument.encode("utf-8", "replace")
        if len(raw) > left:
            kept.append(raw[:left].decode("utf-8", "ignore") + "…")
            break
        kept.append(argument)
        left -= len(raw) + 1
        if left <= 0:
            break
    return tuple(kept)
