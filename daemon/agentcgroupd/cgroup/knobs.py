"""Interface files of cgroup v2, with the type of what each holds.

Names and formats are those of Documentation/admin-guide/cgroup-v2.rst. A `Knob` knows only how text
becomes a value and back; reading and writing are in `tree.Cgroup`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Knob(Generic[T]):
    """An interface file: its name, and how its text becomes a value and a value its text."""

    file: str
    parse: Callable[[str], T]
    format: Callable[[T], str] = str


def _lines(text: str) -> list[str]:
    # The kernel ends a line with \n alone; str.splitlines() would also split at \r and others.
    return [line for line in text.split("\n") if line]


def parse_limit(text: str) -> int | None:
    """Parse a number, or `max` as None. Raises ValueError, like every parser here."""
    word = text.strip()
    return None if word == "max" else int(word)


def format_limit(value: int | None) -> str:
    """Text of a limit: the inverse of `parse_limit`."""
    return "max" if value is None else str(value)


def parse_flat_keyed(text: str) -> dict[str, int]:
    """Parse lines of `key value`, as in memory.events or cpu.stat."""
    pairs = (line.split() for line in _lines(text))
    return {key: int(value) for key, value in pairs}


def parse_nested_keyed(text: str) -> dict[str, dict[str, int]]:
    """Parse lines of `name key=value key=value`, as in io.stat."""
    result = {}
    for line in _lines(text):
        name, *pairs = line.split()
        result[name] = {key: int(value) for key, _, value in (p.partition("=") for p in pairs)}
    return result


def parse_words(text: str) -> tuple[str, ...]:
    """Parse words between blanks or line ends, as in cgroup.controllers."""
    return tuple(text.split())


def parse_pids(text: str) -> tuple[int, ...]:
    """Parse lines of one number, as in cgroup.procs. 0 stands for a process of another pid
    namespace."""
    return tuple(int(line) for line in text.split())


def parse_flag(text: str) -> bool:
    """Parse `0` or `1`."""
    return text.strip() == "1"


def format_flag(value: bool) -> str:
    """Text of a flag: the inverse of `parse_flag`."""
    return "1" if value else "0"


@dataclass(frozen=True, slots=True)
class CpuMax:
    """Value of cpu.max: at most quota_usec of CPU time (None: no limit) in each period_usec."""

    quota_usec: int | None
    period_usec: int = 100_000


def parse_cpu_max(text: str) -> CpuMax:
    """Parse `max 100000` or `50000 100000`: quota and period."""
    quota, period = text.split()
    return CpuMax(parse_limit(quota), int(period))


def format_cpu_max(value: CpuMax) -> str:
    """Text of cpu.max: the inverse of `parse_cpu_max`."""
    return f"{format_limit(value.quota_usec)} {value.period_usec}"


@dataclass(frozen=True, slots=True)
class Pressure:
    """A line of a PSI file: averages in percent, total stall time in microseconds."""

    avg10: float
    avg60: float
    avg300: float
    total_usec: int


def parse_pressure(text: str) -> dict[str, Pressure]:
    """Parse the lines `some` and `full` of a PSI file (Documentation/accounting/psi.rst)."""
    result = {}
    for line in _lines(text):
        kind, *pairs = line.split()
        fields = dict(pair.split("=", 1) for pair in pairs)
        avg10, avg60, avg300 = (float(fields[key]) for key in ("avg10", "avg60", "avg300"))
        result[kind] = Pressure(avg10, avg60, avg300, int(fields["total"]))
    return result


def parse_stalled(text: str) -> dict[str, int]:
    """Parse the total time of each line of a PSI file, in microseconds."""
    return {line.partition(" ")[0]: int(line.rpartition(" total=")[2]) for line in _lines(text)}


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Value of memory.reclaim: how much is to leave memory, and to what degree anonymous memory is
    taken before file memory (swappiness, 0 to 200; None: the host's setting; "max": nothing but
    anonymous memory)."""

    size_bytes: int
    swappiness: int | Literal["max"] | None = None


def format_reclaim(value: Reclaim) -> str:
    """Text of memory.reclaim: `16777216`, or `16777216 swappiness=200` (since Linux 6.9), or
    `16777216 swappiness=max` (since Linux 6.16)."""
    if value.swappiness is None:
        return str(value.size_bytes)
    return f"{value.size_bytes} swappiness={value.swappiness}"


def _write_only(text: str) -> Reclaim:
    raise ValueError(f"memory.reclaim cannot be read, yet gave {text!r}")


def parse_default_weight(text: str) -> int:
    """Parse the line `default 100` of io.weight; lines of single devices are left out."""
    words = dict(line.split() for line in _lines(text))
    return int(words["default"])


def format_default_weight(value: int) -> str:
    """Text of io.weight: the inverse of `parse_default_weight`."""
    return f"default {value}"


CGROUP_CONTROLLERS = Knob("cgroup.controllers", parse_words)
CGROUP_SUBTREE_CONTROL = Knob("cgroup.subtree_control", parse_words)
CGROUP_EVENTS = Knob("cgroup.events", parse_flat_keyed)
CGROUP_PROCS = Knob("cgroup.procs", parse_pids)
CGROUP_FREEZE = Knob("cgroup.freeze", parse_flag, format_flag)
CGROUP_STAT_LOCAL = Knob("cgroup.stat.local", parse_flat_keyed)
"""`frozen_usec`: the time between freezing and thawing, by the cgroup itself or one above it."""
CGROUP_MAX_DEPTH = Knob("cgroup.max.depth", parse_limit, format_limit)
CGROUP_MAX_DESCENDANTS = Knob("cgroup.max.descendants", parse_limit, format_limit)
CGROUP_KILL = Knob("cgroup.kill", parse_flag, format_flag)

MEMORY_CURRENT = Knob("memory.current", int)
MEMORY_PEAK = Knob("memory.peak", int)
MEMORY_LOW = Knob("memory.low", parse_limit, format_limit)
MEMORY_HIGH = Knob("memory.high", parse_limit, format_limit)
MEMORY_MAX = Knob("memory.max", parse_limit, format_limit)
MEMORY_OOM_GROUP = Knob("memory.oom.group", parse_flag, format_flag)
MEMORY_EVENTS = Knob("memory.events", parse_flat_keyed)
MEMORY_EVENTS_LOCAL = Knob("memory.events.local", parse_flat_keyed)
MEMORY_STAT = Knob("memory.stat", parse_flat_keyed)
MEMORY_PRESSURE = Knob("memory.pressure", parse_pressure)
CPU_PRESSURE = Knob("cpu.pressure", parse_pressure)
IO_PRESSURE = Knob("io.pressure", parse_pressure)
MEMORY_STALLED = Knob("memory.pressure", parse_stalled)
CPU_STALLED = Knob("cpu.pressure", parse_stalled)
IO_STALLED = Knob("io.pressure", parse_stalled)
MEMORY_RECLAIM = Knob("memory.reclaim", _write_only, format_reclaim)
"""Linux 5.19. A write blocks while the kernel reclaims. It fails with EAGAIN if the kernel got less
than was asked for; what it got stays reclaimed."""
MEMORY_SWAP_CURRENT = Knob("memory.swap.current", int)
MEMORY_SWAP_MAX = Knob("memory.swap.max", parse_limit, format_limit)
MEMORY_SWAP_EVENTS = Knob("memory.swap.events", parse_flat_keyed)
MEMORY_SWAP_PEAK = Knob("memory.swap.peak", int)
"""Linux 6.5."""

CPU_STAT = Knob("cpu.stat", parse_flat_keyed)
CPU_WEIGHT = Knob("cpu.weight", int)
CPU_MAX = Knob("cpu.max", parse_cpu_max, format_cpu_max)

PIDS_CURRENT = Knob("pids.current", int)
PIDS_PEAK = Knob("pids.peak", int)
PIDS_MAX = Knob("pids.max", parse_limit, format_limit)
PIDS_EVENTS = Knob("pids.events", parse_flat_keyed)
PIDS_EVENTS_LOCAL = Knob("pids.events.local", parse_flat_keyed)
"""Linux 6.11, which also changed what pids.events counts: refusals at the cgroup's own limit and at
those below it; before, refusals of the cgroup's own processes at whatever limit."""

IO_STAT = Knob("io.stat", parse_nested_keyed)
IO_WEIGHT = Knob("io.weight", parse_default_weight, format_default_weight)
"""There only with the cost model of CONFIG_BLK_CGROUP_IOCOST."""
IO_BFQ_WEIGHT = Knob("io.bfq.weight", parse_default_weight, format_default_weight)
"""There only where the I/O scheduler bfq is built in or loaded. 1 to 1000."""
IO_LATENCY = Knob("io.latency", parse_nested_keyed)
"""There only with CONFIG_BLK_CGROUP_IOLATENCY. Written one device at a time."""
