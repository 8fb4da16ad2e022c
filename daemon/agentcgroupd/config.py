"""Configuration: one TOML file, checked by pydantic models before anything is touched.

Quantities are written as in an intent ("512M", "1.5", "30s"). An unknown key is an error that names
it and the nearest known one.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from agentcgroupd.errors import ConfigError, InvalidField
from agentcgroupd.units import (
    IMPORTANT_PRIORITY,
    parse_bytes,
    parse_count,
    parse_duration,
    parse_priority,
    show_usec,
    suggestion,
)

T = TypeVar("T")

AUDIT_BYTES = 64 << 20
"""Size at which the audit log is renamed, where the configuration says nothing."""


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


def _power_of_two(field: str, text: str) -> int:
    size = parse_bytes(field, text, least=4096)
    if size & (size - 1) or not 4096 <= size <= 1 << 30:
        raise InvalidField(field, text, "a power of two from 4K to 1G, such as 16M")
    return size


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


def _or_audit_bytes(value: object) -> object:
    return AUDIT_BYTES if value in (None, "") else value


def _zram(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidField("zram", repr(value), "off, auto, or a size such as 8G")
    return parse_zram("zram", str(value))


MemorySize = Annotated[int | None, quantity(parse_bytes, "size")]
OptionalDuration = Annotated[int | None, quantity(parse_duration, "duration")]
Duration = Annotated[int, quantity(parse_duration, "duration")]
Priority = Annotated[int, quantity(parse_priority, "priority")]
Pids = Annotated[int | None, quantity(_count(1, 4_194_304), "pids")]


class Section(BaseModel):
    """Base of all parts: frozen, and nothing unknown is let in."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class PoolConfig(Section):
    """The cgroup below which all sessions live."""

    cgroup: str = "/agentcg"
    """Below the cgroup2 mount; made if it is missing (its parent must exist)."""
    memory_max: MemorySize = None
    """The pool's budget; empty: 85 % of the host's memory or of the nearest limit above."""
    memory_high: MemorySize = None
    zram: Annotated[int | Literal["off", "auto"], BeforeValidator(_zram)] = "off"
    """Swap in compressed memory, made where the host has no swap (host/zram.py)."""


class SessionDefaults(Section):
    """What a session gets where its spec is silent."""

    priority: Priority = 50
    pids_max: Pids = 16_384
    calls_max: Annotated[int, Field(ge=1, le=100_000)] = 256
    cgroups_max: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """Cgroups in a session, of its calls and of what they make themselves; at least two for each
    of its calls."""
    cgroup_depth_max: Annotated[int, Field(ge=2, le=1000)] = 16
    """How deep they may lie in one another."""
    reports_kept: Annotated[int, Field(ge=1, le=100_000)] = 256
    connections_max: Annotated[int, Field(ge=1, le=10_000)] = 256


class CallDefaults(Section):
    """What a call gets where its intent is silent, and how long it may wait for what."""

    pids_max: Pids = 4096
    timeout: OptionalDuration = None
    timeout_max: Duration = 86_400_000_000
    attach_timeout: Duration = 30_000_000
    """A call that no process has entered after this time is ended as abandoned."""
    idle_timeout: Duration = 600_000_000
    """A call that is held open by its owner with no process in it is ended after this time."""
    keep_room: Duration = 1_000_000
    """How long memory that it expects is kept for a call with no process in it."""
    term_grace: Duration = 2_000_000
    """Between SIGTERM and SIGKILL when the timeout passes, and for what a command left running."""
    leftovers_grace: Duration = 250_000
    """Between the end of a command and the SIGTERM to what it left running: the last lines of
    `cmd > >(tee log)` are still on their way then."""
    depth_max: Annotated[int, Field(ge=1, le=8)] = 3
    """Most calls in one another, the outermost counted."""
    tools_may: Literal["nest", "manage"] = "nest"
    """What a process inside a declared call may do to calls of its session (rpc/callers.py): begin
    and end calls inside its own, or all that the agent may."""


class GuardConfig(Section):
    """How the pool's memory is guarded (guard/loop.py); what is done about it is the policy's."""

    enabled: bool = True
    credit: bool = True
    """Whether each call has to ask before it grows far (guard/credit.py)."""
    tick: Duration = 20_000
    """Between samples of the pool while it is short."""
    deny_allowance: Annotated[int, quantity(parse_bytes, "size")] = 16 << 20
    """Small requests that all calls whose growth is denied may still make together."""
    protect_priority: Priority = IMPORTANT_PRIORITY
    """Sessions of at least this priority are protected by the program in the kernel: when they
    stall on memory, it denies growth to less important calls by itself. Only that program goes by
    this number: for the policy and for turns on a GPU, important is what has a priority of at
    least `units.IMPORTANT_PRIORITY`."""
    stall_threshold: Duration = 10_000
    """Stalled this long within `stall_window`."""
    stall_window: Duration = 100_000
    urgent_lease: Duration = 500_000
    """How long the program denies before the daemon has confirmed it."""
    alone_after: Duration = 200_000
    """When the daemon's loop has not run for so long and the pool is above its mark, the program
    in the kernel denies growth to calls with `on_pressure = "deny"` by itself."""
    faults_per_s: Annotated[int, Field(ge=0)] = 0
    """Page faults a second of a session above which it is said so; 0: never."""
    refaults_per_s: Annotated[int, Field(ge=0)] = 1000
    """Pages that come back after they were reclaimed, a second, of a session."""


class LimitsConfig(Section):
    """What one session may ask of the daemon, or one user outside of sessions (rpc/budgets.py)."""

    connects_per_s: Annotated[int, Field(ge=1, le=100_000)] = 100
    """New gRPC connections a second."""
    packets_per_s: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    """Connections of the attach socket a second, each of which carries one request."""
    requests_per_s: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Requests a second over gRPC; more of them wait."""
    requests_burst: Annotated[int, Field(ge=1, le=100_000)] = 32
    bytes_per_s: Annotated[int, quantity(parse_bytes, "size"), Field(ge=65_536)] = 4 << 20
    """Bytes a second that are read from gRPC connections; more of them wait."""
    streams: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Requests over gRPC that are being answered at a time."""
    watchers: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Of these, streams of events."""
    attaching: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Open connections of the attach socket."""
    answer_bytes: Annotated[int, quantity(parse_bytes, "size"), Field(ge=65_536)] = 4 << 20
    """Size of the answers that have been given and not been read."""
    answer_bytes_all: Annotated[int, quantity(parse_bytes, "size"), Field(ge=65_536)] = 64 << 20
    """The same, of all together."""
    connections_all: Annotated[int, Field(ge=1, le=100_000)] = 2048
    """Open gRPC connections of all together."""
    memory: Annotated[int, quantity(parse_bytes, "size"), Field(ge=64 << 20)] = 512 << 20
    """Memory that the daemon itself may hold; above it, whoever has most open is disconnected."""


OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]


class PolicyConfig(Section):
    """What is done when memory runs short (policy/load.py)."""

    path: OptionalPath = Path("default")
    """A file, or the name of a policy that came with the daemon; empty: its default."""
    drop_in: OptionalPath = Path("/etc/agentcgroup/policy.d")
    """Directory of files that change parts of it, and need not be there; empty: none."""


class BoundaryRule(Section):
    """Which programs begin a call when an agent's own process starts them."""

    program: tuple[str, ...]
    """Globs on the program's name as in /proc/<pid>/comm: its first 15 characters."""
    first_argument: str = "*"
    """Glob on the first argument; an empty one where there is none."""
    shell_command: bool = False
    """Only with a command for a shell: `-c`, also among other options (`-lc`, `-o pipefail -c`)."""
    begins_call: bool = True


SHELL_COMMANDS = BoundaryRule(
    program=("sh", "bash", "dash", "zsh", "ash", "ksh"), shell_command=True
)


class BoundariesConfig(Section):
    """Tool calls of agents that declare none (boundaries/)."""

    enabled: bool = True
    rules: tuple[BoundaryRule, ...] = (SHELL_COMMANDS,)
    """The first that fits decides; none: no call."""


class BpfConfig(Section):
    """Programs in the kernel (bpf/plane.py)."""

    enabled: bool = True
    objects: Path | None = None
    """Directory of the compiled programs; none: those that came with the daemon."""
    events_size: Annotated[int | None, quantity(_power_of_two, "size")] = None
    """Size of each ring buffer; none: 8 MiB for processes, 1 MiB for memory."""
    pins: OptionalPath = Path("/sys/fs/bpf")
    """Where bpffs is mounted, in which what denies growth outlives a daemon that is killed
    (bpf/pins.py); empty: it ends with the daemon."""


class GpuConfig(Section):
    """GPU sharing (gpu/service.py)."""

    enabled: bool = True
    gate: bool = True
    """Device files are closed to whoever has no part of a GPU."""
    share: Literal["auto", "mps", "turns", "none"] = "auto"
    """What holds shares: NVIDIA's MPS, or turns by freezing; auto: MPS where it can be had."""
    quota: Literal["auto", "probes", "mps", "counting"] = "auto"
    """What holds quotas of memory; auto: the strongest that can be had, and counting besides."""
    over_quota: Literal["stop", "tell"] = "stop"
    """What becomes of a call that holds more than its quota in spite of that."""
    over_quota_after: Duration = 2_000_000
    context_allowance: Annotated[int, quantity(parse_bytes, "size")] = 1 << 30
    """What the driver itself may hold for each process on each device beside the quota."""
    reserve: Annotated[int, quantity(parse_bytes, "size")] = 1 << 30
    """Memory of each device that is granted to nobody."""
    wait: Duration = 600_000_000
    """How long a call waits for its part where its intent says nothing; then it is refused."""
    period: Duration = 200_000
    """Everyone has a turn within this time."""
    least_turn: Duration = 10_000
    batch_percent: Annotated[int, Field(ge=1, le=50)] = 5
    """Share of a device's time for calls that make room for important ones."""
    sample: Duration = 200_000
    """Between samples of the devices while a call has a part of one."""
    watch_launches: Literal["important", "all", "off"] = "all"
    """With turns, whose work is seen by a probe, so that who works is not taken for idle and who
    begins need not wait for the next sample."""
    libraries: tuple[Path, ...] = ()
    """Copies of libcuda to be probed from the start, beside the host's."""


class CpuConfig(Section):
    """The CPU scheduler (cpu/scheduling.py)."""

    scheduler: Literal["auto", "off"] = "auto"
    """`auto`: our sched_ext scheduler where the kernel can have it."""
    slice: Annotated[int, quantity(parse_duration, "duration"), Field(ge=1000, le=100_000)] = 4000
    """How long a task runs before another one is looked for; it ends with a tick of the kernel's
    clock (1 to 10 ms)."""
    wait_max: Annotated[
        int, quantity(parse_duration, "duration"), Field(ge=100_000, le=15_000_000)
    ] = 10_000_000
    """A task that waits gets a turn after this time, whatever its weight and limit."""
    stall_timeout: Annotated[
        int, quantity(parse_duration, "duration"), Field(ge=1_000_000, le=30_000_000)
    ] = 30_000_000
    """The kernel takes the scheduler away when it has let a task wait for this time."""
    boost: Duration = 60_000
    """CPU time that a call of normal priority may take ahead of others at a time."""
    boost_refill_percent: Annotated[int, Field(ge=0, le=100)] = 5
    """How fast that comes back, of one CPU."""
    boost_lead: Duration = 20_000
    """How far ahead of its share a boost may take a cgroup of weight 100."""
    penalty_most: Annotated[int, Field(ge=1, le=100)] = 8
    """A call far above its memory mark gets one part in so many of the CPU; 1: no penalties."""
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """How often it is tried again after the kernel has let go of it."""
    retry_after: Duration = 5_000_000
    """After the first time; twice as long after each one more."""


class ServerConfig(Section):
    """Sockets and the metrics port."""

    run_dir: Path = Path("/run/agentcgroup")
    metrics_address: str = "127.0.0.1:9464"
    """Loopback only; empty: no metrics port."""


class AuditConfig(Section):
    """The audit log: one JSON object a line."""

    path: Path | None = Path("/var/log/agentcgroup/audit.jsonl")
    max_bytes: Annotated[int, quantity(parse_bytes, "size"), BeforeValidator(_or_audit_bytes)] = (
        AUDIT_BYTES
    )
    """Size at which the log is renamed; empty: the default."""
    files: Annotated[int, Field(ge=1, le=1000)] = 4
    """Renamed files that are kept."""
    session_percent: Annotated[int, Field(ge=1, le=100)] = 25
    """Share of a file that entries of one session may take."""
    session_rate: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Entries a second of one session; ten times as many at once."""


class HistoryConfig(Section):
    """The store of reports, sessions and decisions (history/)."""

    path: OptionalPath = Path("/var/lib/agentcgroup/history.db")
    """The file; empty: nothing is kept."""
    max_bytes: Annotated[int, quantity(parse_bytes, "size"), Field(ge=16 << 20)] = 256 << 20
    session_percent: Annotated[int, Field(ge=1, le=100)] = 25
    """Share of it that one session may have."""
    max_age: Duration = 30 * 86_400_000_000


class Config(Section):
    """The whole file."""

    pool: PoolConfig = PoolConfig()
    sessions: SessionDefaults = SessionDefaults()
    calls: CallDefaults = CallDefaults()
    guard: GuardConfig = GuardConfig()
    policy: PolicyConfig = PolicyConfig()
    boundaries: BoundariesConfig = BoundariesConfig()
    bpf: BpfConfig = BpfConfig()
    gpu: GpuConfig = GpuConfig()
    cpu: CpuConfig = CpuConfig()
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    audit: AuditConfig = AuditConfig()
    history: HistoryConfig = HistoryConfig()


def _model_in(annotation: Any) -> type[BaseModel]:
    """The model that a field holds, itself or in a tuple."""
    candidates = (annotation, *get_args(annotation))
    (model,) = (a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel))
    return model


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = model
        for part in first["loc"][:-1]:
            if isinstance(part, str):
                section = _model_in(section.model_fields[part].annotation)
        hint = suggestion(str(first["loc"][-1]), section.model_fields)
        return f"{key}: no such key; {hint or 'known are ' + ', '.join(section.model_fields)}"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidField):
        return f"{key}: {cause.value!r} cannot be used; allowed is {cause.allowed}"
    return f"{key}: {first['input']!r} cannot be used: {first['msg']}"


def parse_config(data: dict[str, Any], source: str = "configuration") -> Config:
    """A Config from parsed TOML. Raises ConfigError naming the key, the value and what is
    allowed."""
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, Config)}") from None
    address = config.server.metrics_address
    host = address.rpartition(":")[0]
    if address and host not in ("127.0.0.1", "[::1]", "localhost"):
        raise ConfigError(
            f"{source}: server.metrics_address: {address!r} cannot be used; "
            "allowed is a loopback address with a port, such as 127.0.0.1:9464, or nothing"
        )
    cpu = config.cpu
    if 2 * cpu.wait_max > cpu.stall_timeout:
        raise ConfigError(
            f"{source}: cpu.stall_timeout: {show_usec(cpu.stall_timeout)} cannot be used with "
            f"cpu.wait_max = {show_usec(cpu.wait_max)}: a task may wait for twice that, and the "
            "kernel would take the scheduler away first"
        )
    return config


TOML_BYTES_MAX = 1 << 20
TOML_DEPTH_MAX = 20
"""How deep arrays and tables may lie in one another; no key of ours lies deeper than five."""
_BRACKETS = re.compile(r"[\[\]{}]")
_DOTTED = re.compile(rf"(?:[\w\"'-]+[ \t]*\.[ \t]*){{{TOML_DEPTH_MAX}}}")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file of a size and depth that a person may have written. The reader of
    the standard library calls itself for each level, and takes quadratic time for a dotted key.
    Raises OSError, or ConfigError for what is no such file."""
    data = path.read_bytes()
    if len(data) > TOML_BYTES_MAX:
        raise ConfigError(f"{path}: it has {len(data)} bytes; allowed are {TOML_BYTES_MAX}")
    try:
        text = data.decode("utf-8")
        if too_deep(text):
            raise ConfigError(f"{path}: keys or values lie more than {TOML_DEPTH_MAX} levels deep")
        return tomllib.loads(text)
    except ValueError as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise ConfigError(f"{path}: {str(error)[:200]}") from None


def too_deep(text: str) -> bool:
    """Whether keys, tables or arrays of a TOML document lie too deep in one another. Brackets and
    dots in texts and comments count, too."""
    depth = 0
    for bracket in _BRACKETS.findall(text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > TOML_DEPTH_MAX:
            return True
    return _DOTTED.search(text) is not None


def load_config(path: Path | None) -> Config:
    """The file's Config, or the defaults for None. Raises ConfigError."""
    if path is None:
        return Config()
    try:
        return parse_config(read_toml(path), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from None
