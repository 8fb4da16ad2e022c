"""Configuration: one TOML file, checked by pydantic models before anything is touched.

Quantities are written as in an intent ("512M", "1.5", "30s"). An unknown key is an error that names
it and the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from agentcgroupd import documents
from agentcgroupd.config_boundaries import BoundariesConfig as BoundariesConfig
from agentcgroupd.config_containers import ContainersConfig
from agentcgroupd.config_values import (
    AUDIT_BYTES,
    Count,
    Duration,
    FileOfOurs,
    Flag,
    LoopbackAddress,
    MemorySize,
    NetRate,
    OptionalDuration,
    OptionalPath,
    PagesPerS,
    Pids,
    PoolPath,
    Priority,
    RunDir,
    audit_bytes,
    checked_room,
    parse_exec_hold,
    power_of_two,
    quantity,
    zram_size,
)
from agentcgroupd.config_values import (
    Section as Section,
)
from agentcgroupd.locations import Location
from agentcgroupd.mistakes import DocumentError, ErrorDetail, Path, explained, in_order
from agentcgroupd.units import (
    IMPORTANT_PRIORITY,
    parse_bytes,
    parse_duration,
    show_bytes,
    show_usec,
)


class PoolConfig(Section):
    """The cgroup below which all sessions live."""

    cgroup: PoolPath = "/agentcg"
    """Below the cgroup2 mount; made if it is missing (its parent must exist)."""
    memory_max: MemorySize = None
    """The pool's budget; empty: 85 % of the host's memory or of the nearest limit above."""
    memory_high: MemorySize = None
    zram: Annotated[int | Literal["off", "auto"], BeforeValidator(zram_size)] = "off"
    """Swap in compressed memory, made where the host has no swap (host/zram.py)."""


class SessionDefaults(Section):
    """What a session gets where its spec is silent."""

    priority: Priority = 50
    pids_max: Pids = 16_384
    calls_max: Annotated[Count, Field(ge=1, le=100_000)] = 256
    cgroups_max: Annotated[Count, Field(ge=1, le=1_000_000)] = 4096
    """Cgroups in a session, of its calls and of what they make themselves; at least two for each
    of its calls."""
    cgroup_depth_max: Annotated[Count, Field(ge=2, le=1000)] = 16
    """How deep they may lie in one another."""
    reports_kept: Annotated[Count, Field(ge=1, le=100_000)] = 256
    connections_max: Annotated[Count, Field(ge=1, le=10_000)] = 256
    exec_is_call: Flag = False
    """A program that is executed in a session from outside is a call."""


class CallDefaults(Section):
    """What a call gets where its intent is silent, and how long it may wait for what."""

    pids_max: Pids = 4096
    timeout: OptionalDuration = None
    timeout_max: Duration = 86_400_000_000
    disk_max: MemorySize = None
    """What a call may write to disks in all before it is ended; empty: as much as it likes."""
    net_send_max: NetRate = None
    """What the sockets of a call may send a second; empty: as much as they like."""
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
    depth_max: Annotated[Count, Field(ge=1, le=8)] = 3
    """Most calls in one another, the outermost counted."""
    tools_may: Literal["nest", "manage"] = "nest"
    """What a process inside a declared call may do to calls of its session (rpc/callers.py): begin
    and end calls inside its own, or all that the agent may."""
    rightsize: tuple[Literal["caps", "jobs", "affinity"], ...] = ("caps",)
    """What tells programs how much they get (calls/rightsize.py); none: nothing does."""


class GuardConfig(Section):
    """How the pool's memory is guarded (guard/loop.py); what is done about it is the policy's."""

    enabled: Flag = True
    credit: Flag = True
    """Whether each call has to ask before it grows far (guard/credit.py)."""
    tick: Duration = 20_000
    """Between samples of the pool while it is short."""
    disk_free: Annotated[str, AfterValidator(checked_room)] = "1%"
    """Room of a file system below which the call that writes most to disks is paused
    (guard/disks.py): a part of it such as `5%`, a size such as `2G`, or `off`."""
    disk_grace: Duration = 30_000_000
    """How long such a call is paused before it is ended."""
    disk_paths: tuple[FilePath, ...] = ()
    """Paths whose file systems are looked at beside those of all disks that are mounted."""
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
    faults_per_s: PagesPerS = 0
    """Page faults a second of a session above which it is said so; 0: never."""
    refaults_per_s: PagesPerS = 1000
    """Pages that come back after they were reclaimed, a second, of a session."""


class LimitsConfig(Section):
    """What one session may ask of the daemon, or one user outside of sessions (rpc/budgets.py)."""

    connects_per_s: Annotated[Count, Field(ge=1, le=100_000)] = 100
    """New gRPC connections a second."""
    packets_per_s: Annotated[Count, Field(ge=1, le=1_000_000)] = 2000
    """Connections of the attach socket a second, each of which carries one request."""
    requests_per_s: Annotated[Count, Field(ge=1, le=1_000_000)] = 500
    """Requests a second over gRPC; more of them wait."""
    requests_burst: Annotated[Count, Field(ge=1, le=100_000)] = 32
    bytes_per_s: Annotated[int, quantity(parse_bytes, "size"), Field(ge=65_536)] = 4 << 20
    """Bytes a second that are read from gRPC connections; more of them wait."""
    streams: Annotated[Count, Field(ge=1, le=100_000)] = 512
    """Requests over gRPC that are being answered at a time."""
    watchers: Annotated[Count, Field(ge=1, le=100_000)] = 64
    """Of these, streams of events."""
    attaching: Annotated[Count, Field(ge=1, le=100_000)] = 512
    """Open connections of the attach socket."""
    answer_bytes: Annotated[int, quantity(parse_bytes, "size"), Field(ge=65_536)] = 4 << 20
    """Size of the answers that have been given and not been read."""
    answer_bytes_all: Annotated[int, quantity(parse_bytes, "size"), Field(ge=65_536)] = 64 << 20
    """The same, of all together."""
    connections_all: Annotated[Count, Field(ge=1, le=100_000)] = 2048
    """Open gRPC connections of all together."""
    memory: Annotated[int, quantity(parse_bytes, "size"), Field(ge=64 << 20)] = 512 << 20
    """Memory that the daemon itself may hold; above it, whoever has most open is disconnected."""


class PolicyConfig(Section):
    """What is done when memory runs short (policy/load.py)."""

    path: OptionalPath = FilePath("default")
    """A file, or the name of a policy that came with the daemon; empty: its default."""
    drop_in: OptionalPath = FilePath("/etc/agentcgroup/policy.d")
    """Directory of files that change parts of it, and need not be there; empty: none."""


class BpfConfig(Section):
    """Programs in the kernel (bpf/plane.py)."""

    enabled: Flag = True
    objects: FilePath | None = None
    """Directory of the compiled programs; none: those that came with the daemon."""
    events_size: Annotated[int | None, quantity(power_of_two, "size")] = None
    """Size of each ring buffer; none: 8 MiB for processes, 1 MiB for memory."""
    pins: OptionalPath = FilePath("/sys/fs/bpf")
    """Where bpffs is mounted, in which what denies growth outlives a daemon that is killed
    (bpf/pins.py); empty: it ends with the daemon."""


class GpuConfig(Section):
    """GPU sharing (gpu/service.py)."""

    enabled: Flag = True
    gate: Flag = True
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
    batch_percent: Annotated[Count, Field(ge=1, le=50)] = 5
    """Share of a device's time for calls that make room for important ones."""
    sample: Duration = 200_000
    """Between samples of the devices while a call has a part of one."""
    watch_launches: Literal["important", "all", "off"] = "all"
    """With turns, whose work is seen by a probe, so that who works is not taken for idle and who
    begins need not wait for the next sample."""
    libraries: tuple[FilePath, ...] = ()
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
    boost_refill_percent: Annotated[Count, Field(ge=0, le=100)] = 5
    """How fast that comes back, of one CPU."""
    boost_lead: Duration = 20_000
    """How far ahead of its share a boost may take a cgroup of weight 100."""
    penalty_most: Annotated[Count, Field(ge=1, le=100)] = 8
    """A call far above its memory mark gets one part in so many of the CPU; 1: no penalties."""
    exec_hold: Annotated[int, quantity(parse_exec_hold, "duration")] = 20_000
    """Longest time that a program in an agent leaf waits at its exec until it is in its call's
    cgroup, or is known to begin none; 0 (`off`): none waits. It needs our scheduler."""
    retries: Annotated[Count, Field(ge=0, le=100)] = 3
    """How often it is tried again after the kernel has let go of it."""
    retry_after: Duration = 5_000_000
    """After the first time; twice as long after each one more."""


class ServerConfig(Section):
    """Sockets and the metrics port."""

    run_dir: RunDir = FilePath("/run/agentcgroup")
    metrics_address: LoopbackAddress = "127.0.0.1:9464"
    """Loopback only; empty: no metrics port."""
    metrics_sessions: Annotated[Count, Field(ge=0, le=1000)] = 0
    """Sessions that have metrics of their own, the oldest; the others are summed up."""


class AuditConfig(Section):
    """The audit log: one JSON object a line."""

    path: FileOfOurs = FilePath("/var/log/agentcgroup/audit.jsonl")
    max_bytes: Annotated[int, quantity(parse_bytes, "size"), BeforeValidator(audit_bytes)] = (
        AUDIT_BYTES
    )
    """Size at which the log is renamed; empty: the default."""
    files: Annotated[Count, Field(ge=1, le=1000)] = 4
    """Renamed files that are kept."""
    session_percent: Annotated[Count, Field(ge=1, le=100)] = 25
    """Share of a file that entries of one session may take."""
    session_rate: Annotated[Count, Field(ge=1, le=1_000_000)] = 500
    """Entries a second of one session; ten times as many at once."""


class HistoryConfig(Section):
    """The store of reports, sessions and decisions (history/)."""

    path: OptionalPath = FilePath("/var/lib/agentcgroup/history.db")
    """The file; empty: nothing is kept."""
    max_bytes: Annotated[int, quantity(parse_bytes, "size"), Field(ge=16 << 20)] = 256 << 20
    session_percent: Annotated[Count, Field(ge=1, le=100)] = 25
    """Share of the file that one session may have, in percent."""
    max_age: Duration = 30 * 86_400_000_000


class Config(Section):
    """The whole file."""

    pool: PoolConfig = PoolConfig()
    sessions: SessionDefaults = SessionDefaults()
    calls: CallDefaults = CallDefaults()
    guard: GuardConfig = GuardConfig()
    policy: PolicyConfig = PolicyConfig()
    boundaries: BoundariesConfig = BoundariesConfig()
    containers: ContainersConfig = ContainersConfig()
    bpf: BpfConfig = BpfConfig()
    gpu: GpuConfig = GpuConfig()
    cpu: CpuConfig = CpuConfig()
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    audit: AuditConfig = AuditConfig()
    history: HistoryConfig = HistoryConfig()


def _section_of(path: Path) -> type[BaseModel]:
    """The model of the table at a path."""
    section: type[BaseModel] = Config
    for part in path:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            candidates = (annotation, *get_args(annotation))
            (section,) = (a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel))
    return section


def _details(error: ValidationError, locations: Location) -> list[ErrorDetail]:
    found: dict[Path, str] = {}
    for item in error.errors():
        path = item["loc"]
        section = _section_of(path[:-1]) if item["type"] == "extra_forbidden" else None
        path, sentence = explained(path, item, section)
        found.setdefault(path, sentence)
    return in_order(found, {path: key_of(path) for path in found}, locations)


def key_of(path: Path) -> str:
    """Return a path as text, such as `boundaries.rules[0].program`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def parse_config(
    data: dict[str, Any], source: str = "configuration", locations: Location | None = None
) -> Config:
    """A Config from parsed TOML. `locations`: where its keys stand. Raises ConfigError, which names
    the file, the line, the key, the value and what is allowed."""
    locations = locations or Location(source, 0)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise DocumentError(*_details(error, locations)) from None
    for path, sentence in _contradictions(config):
        place = locations.find(path)
        raise DocumentError(ErrorDetail(place.file, place.line, key_of(path), sentence))
    return config


def _contradictions(config: Config) -> Iterator[tuple[Path, str]]:
    """Keys whose values each could be used, but not as they stand together, and why."""
    cpu = config.cpu
    if 2 * cpu.wait_max > cpu.stall_timeout:
        yield (
            ("cpu", "stall_timeout"),
            f"{show_usec(cpu.stall_timeout)} cannot be used with "
            f"cpu.wait_max = {show_usec(cpu.wait_max)}: a task may wait for twice that, and the "
            "kernel would take the scheduler away first",
        )
    limits = config.limits
    if limits.answer_bytes_all < limits.answer_bytes:
        yield (
            ("limits", "answer_bytes_all"),
            f"{show_bytes(limits.answer_bytes_all)} cannot be used with limits.answer_bytes = "
            f"{show_bytes(limits.answer_bytes)}: one session may not have more than all together",
        )
    if limits.answer_bytes_all > limits.memory // 2:
        yield (
            ("limits", "answer_bytes_all"),
            f"{show_bytes(limits.answer_bytes_all)} cannot be used with limits.memory = "
            f"{show_bytes(limits.memory)}: answers that nobody takes may not fill more than half "
            "of what the daemon may hold",
        )


def load_config(path: FilePath | None) -> Config:
    """The file's Config, or the defaults for None. Raises ConfigError."""
    if path is None:
        return Config()
    document = documents.read(path)
    return parse_config(document.data, str(path), document.locations)
