"""The daemon's answers, as frozen dataclasses.

Fields have the names and units of the protocol's messages. An optional field that the daemon left
out is None: not limited, or not measured here; a zero is always a measured zero. `from_proto` takes
a message of the same name, `to_dict` gives plain data for JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

M = TypeVar("M", bound="_Answer")


class Verdict(str, Enum):
    """The way in which a call ended."""

    UNSPECIFIED = "unspecified"
    OK = "ok"
    FAILED = "failed"
    SIGNALED = "signaled"
    OOM_CALL = "oom_call"
    OOM_SESSION = "oom_session"
    OOM_POOL = "oom_pool"
    OOM_HOST = "oom_host"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    ABANDONED = "abandoned"
    UNKNOWN = "unknown"

    __str__ = str.__str__


class Evidence(str, Enum):
    """The source of the wait status behind a verdict."""

    UNSPECIFIED = "unspecified"
    KERNEL = "kernel"
    CLIENT = "client"
    NONE = "none"

    __str__ = str.__str__


class CallState(str, Enum):
    """The state of an open call."""

    UNSPECIFIED = "unspecified"
    PENDING = "pending"
    RUNNING = "running"
    FROZEN = "frozen"
    ENDING = "ending"
    WAITING = "waiting"

    __str__ = str.__str__


class FeedbackCode(str, Enum):
    """The subject of a piece of feedback."""

    UNSPECIFIED = "unspecified"
    OOM = "oom"
    TIMEOUT = "timeout"
    PIDS_LIMIT = "pids_limit"
    CPU_THROTTLED = "cpu_throttled"
    MEMORY_THROTTLED = "memory_throttled"
    FROZEN = "frozen"
    THAWED = "thawed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    OVERSTATED = "overstated"
    KILLED = "killed"
    LEFTOVERS = "leftovers"
    GROWTH_DENIED = "growth_denied"
    GROWTH_ALLOWED = "growth_allowed"
    NOT_IN_CALL = "not_in_call"
    WAITING = "waiting"
    STARTED = "started"
    UNDERSTATED = "understated"
    CPU_LOWERED = "cpu_lowered"
    CPU_RESTORED = "cpu_restored"
    LEFT_CALL = "left_call"
    LEFTOVERS_KEPT = "leftovers_kept"
    NESTED = "nested"
    FEWER_CPUS = "fewer_cpus"
    GPU_CLOSED = "gpu_closed"
    GPU_MEMORY_DENIED = "gpu_memory_denied"
    GPU_MEMORY_OVER = "gpu_memory_over"
    GPU_FAULT = "gpu_fault"
    GPU_LOST = "gpu_lost"
    GPU_UNSHARED = "gpu_unshared"
    IO_LOWERED = "io_lowered"
    IO_RESTORED = "io_restored"

    __str__ = str.__str__


class Level(str, Enum):
    """A level of the tree at which a limit or an event stands, from a cgroup that the tool made
    below its call up to the host."""

    UNSPECIFIED = "unspecified"
    NESTED = "nested"
    CALL = "call"
    OUTER = "outer"
    SESSION = "session"
    POOL = "pool"
    HOST = "host"

    __str__ = str.__str__


@dataclass(frozen=True, repr=False, eq=False)
class _Answer:
    """Base: conversion from the message of the same name and to plain data."""

    __slots__ = ()

    @classmethod
    def from_proto(cls: type[M], message: Message) -> M:
        """Return the dataclass for `message`, a protobuf message with fields of the same names."""
        absent, maps, readers = _readers(cls, message.DESCRIPTOR)  # type: ignore[arg-type]
        values = dict(absent)
        for name in maps:
            values[name] = {}
        # Only what is there: most fields of most reports are not.
        for field, value in message.ListFields():
            read = readers.get(field.name)
            if read is not None:
                values[field.name] = read(value)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: keys as in the protocol, enums as lower-case words, absent as None."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    # Written once for all of them: made anew for each class, they are a tenth of what a command
    # that asks one question takes.

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        shown = (f"{f.name}={value!r}" for f, value in zip(fields, self._values(), strict=True))
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Grant(_Answer):
    """The limits of a call. None means: no limit of its own. Bytes, microseconds, millicores."""

    memory_expected_bytes: int
    memory_high_bytes: int | None
    memory_max_bytes: int | None
    cpu_weight: int
    cpu_max_millicores: int | None
    pids_max: int | None
    timeout_usec: int | None
    priority: int
    on_pressure: str
    advice: tuple[str, ...]
    not_enforced: tuple[str, ...]
    leftovers: str = "end"
    """What becomes of processes that live on after the command: "end" or "keep"."""
    gpu_percent: int | None = None
    """Share of each of `gpu_devices` (UUIDs); gpu_memory_bytes is meant for each of them too."""
    gpu_memory_bytes: int | None = None
    gpu_priority: int | None = None
    gpu_devices: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables that the launcher sets for the tool."""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Text of interface files that take a field of the intent as it is, by the field's name."""
    disk_max_bytes: int | None = None
    """Bytes that it may write to disks in all."""
    net_send_bytes_per_s: int | None = None
    """Bytes a second that its sockets may send."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class NetUsage(_Answer):
    """What the sockets of a cgroup have received and sent, loopback included."""

    receive_bytes: int
    receive_packets: int
    send_bytes: int
    send_packets: int
    refused_packets: int = 0
    """Packets above what it may send (net_send_max)."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Usage(_Answer):
    """The present use of a cgroup. None means: this kernel does not measure it here."""

    memory_current_bytes: int | None
    memory_peak_bytes: int | None
    cpu_usage_usec: int
    pids_current: int | None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    net: NetUsage | None = None
    """Absent where nothing counts it."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Place(_Answer):
    """A call's place in the queue for room."""

    position: int
    """1: the next."""
    waiting: int
    waited_usec: int
    estimate_usec: int | None
    """Time until the call begins, by how fast the queue has moved; None: it has not moved yet."""
    deadline_usec: int
    """Time until the call begins all the same or, where its intent names the time, is refused."""
    expected_bytes: int
    room_bytes: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class CallInfo(_Answer):
    """An open call."""

    id: str
    session_id: str
    name: str
    argv: tuple[str, ...]
    state: CallState
    grant: Grant | None
    cgroup_id: int
    cgroup_path: str
    began_unix_usec: int
    usage: Usage | None
    observed: bool = False
    """True: nobody declared the call; the daemon saw the agent execute a tool."""
    place: Place | None = None
    """Set while the call waits for room; it has no cgroup then."""
    waited_usec: int = 0
    """Time spent waiting for room before the call began."""
    parent_call_id: str = ""
    """The call that this one was begun in."""
    paused_why: str = ""
    """The sentence of its last pause, while it is paused."""
    frozen_usec: int = 0
    memory_high_bytes: int | None = None
    """What it may reach now without asking for more."""
    held: bool = False
    """Whether the operator holds it paused."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Feedback(_Answer):
    """Something that happened to a call: a code, numbers (names end in their unit), a sentence."""

    call_id: str
    session_id: str
    code: FeedbackCode
    sentence: str
    numbers: Mapping[str, float]
    at_unix_usec: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Delays(_Answer):
    """What a call waited for: parts of its wall time in which some task of it did. `full`: in
    which none of them went on."""

    cpu_usec: int
    io_usec: int
    memory_usec: int
    """For memory to be taken back, or to come back from swap."""
    io_full_usec: int
    memory_full_usec: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class DeviceIo(_Answer):
    """What a call read from a block device and wrote to it."""

    device: str
    read_bytes: int
    write_bytes: int
    reads: int
    writes: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class GpuUsage(_Answer):
    """Use that a call made of its part of the GPUs. None means: not measured here."""

    memory_peak_bytes: int | None
    sm_percent: float | None
    energy_mj: int | None
    held_back_usec: int
    """Time for which the call was paused because it was another's turn."""
    refused: int
    """Number of allocations that were refused because they exceeded the quota."""
    memory_held_by: str
    """Name of the means that held the quota: probes, mps or counting."""
    share_held_by: str
    """Name of the means that held the share: mps or turns."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class CpuNumbers(_Answer):
    """The CPU scheduler's counts for a cgroup and all below it."""

    run_usec: int
    wait_usec: int
    """Time for which tasks were ready to run and did not run, summed over all tasks."""
    wait_max_usec: int
    slices: int
    boosts: int
    """Slices that the cgroup was given ahead of others."""
    boosted_usec: int
    penalties: int
    """Times that the cgroup sat out because its memory had grown above its mark."""
    penalty_usec: int
    stalls: int
    """Times that the cgroup had used up its cpu.max."""
    stalled_usec: int
    rescues: int
    """Slices that the cgroup was given because it had waited too long."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Fact(_Answer):
    """A fact about the end of a call, as a plain clause, and the source that tells it."""

    what: str
    source: str
    at_unix_usec: int
    """0: when is not known."""
    level: Level


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class TryNext(_Answer):
    """What to do about the way in which a call ended."""

    steps: tuple[str, ...]
    """A sentence each, the likeliest to help first."""
    enough: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Fields of the intent, and what is likely to be enough for each."""
    admitted_now: bool | None = None
    """Whether such a call would have started at once when this one ended; None: not known."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Report(_Answer):
    """The end of a call, and what the call used."""

    call_id: str
    session_id: str
    name: str
    argv: tuple[str, ...]
    grant: Grant | None
    verdict: Verdict
    sentence: str
    evidence: Evidence
    exit_code: int | None
    term_signal: int | None
    began_unix_usec: int
    wall_usec: int
    memory_peak_bytes: int | None
    cpu_usage_usec: int
    cpu_user_usec: int
    cpu_system_usec: int
    cpu_throttled_usec: int | None
    pids_peak: int | None
    io_read_bytes: int | None
    io_write_bytes: int | None
    memory_throttled_usec: int | None
    memory_high_events: int | None
    oom_kills: int | None
    pids_max_events: int | None
    frozen_usec: int
    feedback: tuple[Feedback, ...]
    observed: bool = False
    waited_usec: int = 0
    """Time spent waiting for room before the call began; not counted in wall_usec."""
    gpu: GpuUsage | None = None
    """None: the call had no part of a GPU."""
    cpu: CpuNumbers | None = None
    """None where the kernel's own scheduler runs."""
    facts: tuple[Fact, ...] = ()
    """What the verdict was judged from, oldest first."""
    parent_call_id: str = ""
    """The call that this one was begun in."""
    inner_call_ids: tuple[str, ...] = ()
    """Calls that were begun in this one."""
    went_on_as: str = ""
    """The call that its main process asked for and went on as."""
    command: str = ""
    """What the model asked for, without what its agent puts around it."""
    tool_use_id: str = ""
    """The agent's own name for the tool call, where it tells its tools."""
    in_call_id: str = ""
    """The observed call from inside which this one was declared."""
    try_next: TryNext | None = None
    """None: there is nothing to try."""
    net: NetUsage | None = None
    """None where nothing counted it."""
    delays: Delays | None = None
    """None where the kernel does not tell."""
    devices: tuple[DeviceIo, ...] = ()
    """Block devices that it read or wrote, the busiest first."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class GpuBudget(_Answer):
    """The part of a GPU that is left."""

    index: int
    uuid: str
    name: str
    percent_available: int
    memory_total_bytes: int
    memory_available_bytes: int
    lost: bool


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Budget(_Answer):
    """The part of the caller's session that is left, and one sentence saying so."""

    memory_limit_bytes: int | None
    memory_used_bytes: int | None
    memory_available_bytes: int | None
    cpu_limit_millicores: int
    cpu_available_millicores: int
    pids_limit: int | None
    pids_available: int | None
    calls_open: int
    calls_max: int
    sentence: str
    gpus: tuple[GpuBudget, ...] = ()


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SessionInfo(_Answer):
    """A session: its limits and what it uses."""

    id: str
    cgroup_path: str
    cgroup_id: int
    adopted: bool
    priority: int
    memory_low_bytes: int | None
    memory_high_bytes: int | None
    memory_max_bytes: int | None
    cpu_weight: int
    cpu_max_millicores: int | None
    pids_max: int | None
    calls_max: int
    calls_open: int
    calls_ended: int
    usage: Usage | None
    not_enforced: tuple[str, ...]
    opened_unix_usec: int
    owner_pid: int
    exec_is_call: bool = False
    """Whether what is executed in it from outside is a call."""
    cpu: CpuNumbers | None = None
    """None where the kernel's own scheduler runs."""
    container: str = ""
    """Runtime and id of the container that it was made of, as `docker:ID`; empty for agents, and
    where no runtime has told of it."""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What its use is added up by: whose it is, what it is for."""
    io_weight: int = 100
    io_latency_usec: int | None = None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PoolInfo(_Answer):
    """The pool as a whole, and the daemon that keeps it."""

    cgroup_path: str
    memory_max_bytes: int | None
    memory_current_bytes: int | None
    cpu_millicores: int
    sessions_open: int
    calls_open: int
    calls_begun: int
    calls_ended: int
    leftovers_removed: int
    controllers: tuple[str, ...]
    not_enforced: tuple[str, ...]
    version: str
    kernel: str
    started_unix_usec: int
    calls_waiting: int = 0
    calls_paused: int = 0
    usage: Usage | None = None
    memory_some_percent: float | None = None
    """Share of the last 10 s in which some tasks of the pool waited for memory; `full`: all."""
    memory_full_percent: float | None = None
    cpu_some_percent: float | None = None
    io_some_percent: float | None = None
    memory_held_bytes: int | None = None
    """The part of the memory that the kernel cannot simply drop, as it does with file cache; some
    seconds old."""

    @property
    def used_bytes(self) -> int | None:
        """Bytes that count of the limit: without file cache, or with it where the daemon does not
        tell."""
        held = self.memory_held_bytes
        return self.memory_current_bytes if held is None else held


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SessionSums(_Answer):
    """Sums over the ended calls of a session. What a call inside another one used, is in the outer
    one's numbers."""

    calls: int
    calls_not_ok: int
    """Calls with another verdict than `ok`."""
    wall_usec: int
    waited_usec: int
    frozen_usec: int
    cpu_usage_usec: int
    memory_peak_bytes: int | None
    """The largest peak of a call."""
    memory_byte_seconds: float | None
    """Peaks times wall times: at most this much was held."""
    io_read_bytes: int | None = None
    """Measured for `usage` alone, as is what follows; None where none of the calls was measured."""
    io_write_bytes: int | None = None
    net_receive_bytes: int | None = None
    net_send_bytes: int | None = None
    gpu_energy_mj: int | None = None
    gpu_memory_byte_seconds: float | None = None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Usages(_Answer):
    """Sums over the ended calls of a session name, a tool, a day (2026-01-31, in UTC) or a label
    (team=web; empty: of sessions without any)."""

    key: str
    sums: SessionSums | None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PastSession(_Answer):
    """A session as the store has it, open or closed."""

    session: SessionInfo | None
    closed_unix_usec: int
    """0: it is open."""
    closed_why: str
    sums: SessionSums | None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Step(_Answer):
    """A thing that happened to a call, or to its session while it ran."""

    at_unix_usec: int
    what: str
    """`asked`, `granted`, `fact`, `ended`, or an event as the audit log names it."""
    sentence: str
    numbers: Mapping[str, float]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Story(_Answer):
    """What happened to a call, oldest first.

    report: None while the call is open, and where nobody saw it end. advice: what to try next time.
    state: of a call that is open or waits.
    """

    call_id: str
    session_id: str
    name: str
    steps: tuple[Step, ...]
    steps_left_out: int
    report: Report | None
    advice: tuple[str, ...]
    state: CallState = CallState.UNSPECIFIED


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class RulesetState(_Answer):
    """A ruleset of the policy: what it does, and whether its conditions hold."""

    name: str
    action: str
    dry_run: bool
    holds: bool
    detectors: tuple[str, ...]
    decisions: int
    acted_usec_ago: int | None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PolicyState(_Answer):
    """The policy in force.

    error: why the files, as they are now, cannot be used; empty where they are in force.
    """

    name: str
    document: str
    sources: tuple[str, ...]
    loaded_unix_usec: int
    error: str
    rulesets: tuple[RulesetState, ...]
    dry_run: bool


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Explanation(_Answer):
    """The policy's view of a call, what it did to it (oldest first), and what it would do next."""

    call_id: str
    sentence: str
    numbers: Mapping[str, float]
    history: tuple[Feedback, ...]
    outlook: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Event(_Answer):
    """Something that happened in the pool: exactly one field is set."""

    begun: CallInfo | None = None
    ended: Report | None = None
    feedback: Feedback | None = None
    session_opened: SessionInfo | None = None
    session_closed: SessionInfo | None = None
    session_changed: SessionInfo | None = None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SessionEnd(_Answer):
    """What was found out when a session was closed.

    agent_oom_kills: processes of the agent itself, in no call, that the kernel killed for want of
    memory; agent_sentence: why.
    """

    calls_ended: int
    agent_oom_kills: int | None
    agent_sentence: str


_MESSAGES: dict[str, type[_Answer]] = {
    "Grant": Grant,
    "Usage": Usage,
    "Place": Place,
    "Call": CallInfo,
    "Feedback": Feedback,
    "GpuUsage": GpuUsage,
    "NetUsage": NetUsage,
    "Delays": Delays,
    "DeviceIo": DeviceIo,
    "Fact": Fact,
    "TryNext": TryNext,
    "Report": Report,
    "GpuBudget": GpuBudget,
    "Budget": Budget,
    "Session": SessionInfo,
    "CpuNumbers": CpuNumbers,
    "Pool": PoolInfo,
    "SessionSums": SessionSums,
    "PastSession": PastSession,
    "Usages": Usages,
    "Step": Step,
    "Story": Story,
    "RulesetState": RulesetState,
    "PolicyState": PolicyState,
    "Explanation": Explanation,
    "Event": Event,
    "CloseSessionResponse": SessionEnd,
}
_ENUMS: dict[str, type[Enum]] = {
    "Verdict": Verdict,
    "Evidence": Evidence,
    "CallState": CallState,
    "FeedbackCode": FeedbackCode,
    "Level": Level,
}

Reader = Callable[[Any], Any]


@cache
def _readers(
    cls: Any, descriptor: Any
) -> tuple[dict[str, Any], tuple[str, ...], dict[str, Reader]]:
    """Return the values of the fields of `cls` that are absent in a message, the names of those
    that are maps, and by name the functions that read the values of those that are there."""
    found = {f.name: descriptor.fields_by_name[f.name] for f in dataclasses.fields(cls)}
    maps = tuple(name for name, field in found.items() if _is_map(field))
    absent = {name: _absent(field) for name, field in found.items()}
    return absent, maps, {name: _reader(field) for name, field in found.items()}


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _absent(field: FieldDescriptor) -> Any:
    if field.is_repeated:
        return ()
    if field.has_presence:
        return None
    if field.enum_type is not None:
        return _words(field.enum_type, _ENUMS[field.enum_type.name])[0]
    return field.default_value


def _reader(field: FieldDescriptor) -> Reader:
    enum_type: EnumDescriptor | None = field.enum_type
    if enum_type is not None:
        words = _words(enum_type, _ENUMS[enum_type.name])
        # A newer daemon may send a number that this version has no word for.
        return lambda value: words.get(value, words[0])
    if _is_map(field):
        return dict
    if field.message_type is not None:
        convert = _MESSAGES[field.message_type.name].from_proto
        if field.is_repeated:
            return lambda items: tuple(convert(item) for item in items)
        return convert
    return tuple if field.is_repeated else _as_it_is


def _as_it_is(value: Any) -> Any:
    return value


def _words(descriptor: EnumDescriptor, words: type[Enum]) -> dict[int, Enum]:
    """Map enum numbers of the protocol to members here, by name: VERDICT_OOM_CALL -> OOM_CALL."""
    prefix = next(v.name for v in descriptor.values if v.number == 0)[: -len("UNSPECIFIED")]
    known = words.__members__
    found = {v.number: known.get(v.name[len(prefix) :]) for v in descriptor.values}
    return {number: member for number, member in found.items() if member is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, _Answer):
        return value.to_dict()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value
