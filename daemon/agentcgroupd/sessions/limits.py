"""Limits of sessions: from a request, onto their cgroups, and down to their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.disk_share import (
    DEFAULT_WEIGHT,
    WEIGHTS,
    write_latency,
    write_line,
    write_weight,
)
from agentcgroupd.cgroup.knobs import Knob, T
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.config import CallDefaults, SessionDefaults
from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.gpu import GpuCeiling
from agentcgroupd.intents.grant import Ceiling, weight_of_priority
from agentcgroupd.sessions.holding import held_beside_calls
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import Session, SessionLimits
from agentcgroupd.units import (
    IMPORTANT_PRIORITY,
    parse_bytes,
    parse_cores,
    parse_count,
    parse_duration,
    parse_priority,
    parse_word,
    show_bytes,
    show_usec,
)

PIDS_MOST = 4_194_304
"""PID_MAX_LIMIT on 64 bits (include/linux/threads.h)."""
CALLS_MOST = 100_000
WEIGHT_MOST = 10_000
"""CGROUP_WEIGHT_MAX (include/linux/cgroup.h)."""
LATENCY_MOST_USEC = 10_000_000
CGROUPS_BESIDE_CALLS = 64
"""Room for cgroups that are not of calls, however many calls a session may have."""


class Ceilings:
    """What lies above the grants of a session's calls."""

    def __init__(self, defaults: CallDefaults, pool: Pool, gpus: Callable[[], GpuCeiling]) -> None:
        """`gpus`: what there is of GPUs now."""
        self._defaults, self._pool, self._gpus = defaults, pool, gpus

    def of(self, session: Session) -> Ceiling:
        """The limits above a new call of this session."""
        limits, defaults, held = session.limits, self._defaults, held_beside_calls(session)
        tops = [top for top in (limits.memory_max_bytes, self._pool.memory_max_bytes) if top]
        cpus = self._pool.cpu_millicores
        return Ceiling(
            memory_max_bytes=min(tops) if tops else None,
            agent_memory_bytes=held.agent_bytes if tops else 0,
            files_memory_bytes=held.files_bytes if tops else 0,
            cpu_millicores=min(limits.cpu_max_millicores or cpus, cpus),
            pids_max=limits.pids_max,
            priority=limits.priority,
            default_pids_max=defaults.pids_max,
            default_timeout_usec=defaults.timeout,
            default_disk_max=defaults.disk_max,
            default_net_send_max=defaults.net_send_max,
            timeout_max_usec=defaults.timeout_max,
            gpu=self._gpus(),
        )


def parse_limits(
    spec: pb.SessionSpec, defaults: SessionDefaults, pool_bytes: int | None
) -> SessionLimits:
    """Limits from the text of a request, with defaults where it is silent. `pool_bytes`: the
    pool's own limit; None: it has none. Raises InvalidField."""

    def size(field: str) -> int | None:
        text = getattr(spec, field)
        return parse_bytes(field, text) if text else None

    def count(field: str, most: int, default: int) -> int:
        text = getattr(spec, field)
        return parse_count(field, text, 1, most) if text else default

    priority = parse_priority("priority", spec.priority) if spec.priority else defaults.priority
    pids_max = defaults.pids_max
    if spec.pids_max:
        pids_max = parse_count("pids_max", spec.pids_max, 1, PIDS_MOST)
    calls_max = count("calls_max", CALLS_MOST, defaults.calls_max)
    limits = SessionLimits(
        memory_low_bytes=size("memory_low"),
        memory_high_bytes=size("memory_high"),
        memory_max_bytes=size("memory_max"),
        cpu_weight=count("cpu_weight", WEIGHT_MOST, weight_of_priority(priority)),
        cpu_max_millicores=parse_cores("cpu_max", spec.cpu_max) if spec.cpu_max else None,
        io_weight=count("io_weight", WEIGHT_MOST, weight_of_priority(priority)),
        io_latency_usec=_parse_latency("io_latency", spec.io_latency) if spec.io_latency else None,
        pids_max=pids_max,
        priority=priority,
        calls_max=calls_max,
        cgroups_max=max(defaults.cgroups_max, 2 * calls_max + CGROUPS_BESIDE_CALLS),
        cgroup_depth_max=defaults.cgroup_depth_max,
        swap_max_bytes=_swap_max_bytes(priority),
        exec_is_call=_parse_yes("exec_is_call", spec.exec_is_call)
        if spec.exec_is_call
        else defaults.exec_is_call,
    )
    _check_sizes(spec, limits, pool_bytes)
    return limits


def _swap_max_bytes(priority: int) -> int | None:
    """Most that may be swapped out of a session of this priority; None: no limit of its own."""
    return 0 if priority >= IMPORTANT_PRIORITY else None


def _parse_yes(field: str, text: str) -> bool:
    return parse_word(field, text, ("yes", "no")) == "yes"


def _parse_latency(field: str, text: str) -> int:
    """Microseconds that requests to disks may take. Raises InvalidField."""
    usec = parse_duration(field, text)
    if usec > LATENCY_MOST_USEC:
        raise InvalidField(field, text, f"at most {show_usec(LATENCY_MOST_USEC)}")
    return usec


_REMOVABLE = ("memory_low", "memory_high", "memory_max", "cpu_max", "io_latency")
NO_LIMIT = "none"
"""What takes one of these limits away."""


def change_limits(
    spec: pb.SessionSpec, before: SessionLimits, pool_bytes: int | None
) -> SessionLimits:
    """The limits of an open session after a request to change some. `pool_bytes`: the pool's own
    limit; None: it has none. Raises InvalidField."""
    changes: dict[str, int | None] = {}
    for field, (name, parse) in _CHANGEABLE.items():
        text = getattr(spec, field)
        if text.strip().lower() == NO_LIMIT and field in _REMOVABLE:
            changes[name] = None
        elif text:
            changes[name] = parse(field, text)
    if not changes:
        raise InvalidField("spec", "", "one limit or more", "it names none")
    limits = replace(before, **changes)  # type: ignore[arg-type]  # all are numbers
    if spec.priority:
        limits = replace(limits, swap_max_bytes=_swap_max_bytes(limits.priority))
    if spec.priority:
        usual, weight = weight_of_priority(before.priority), weight_of_priority(limits.priority)
        if not spec.cpu_weight and before.cpu_weight == usual:
            limits = replace(limits, cpu_weight=weight)
        if not spec.io_weight and before.io_weight == usual:
            limits = replace(limits, io_weight=weight)
    if spec.calls_max:
        cgroups = max(before.cgroups_max or 0, 2 * limits.calls_max + CGROUPS_BESIDE_CALLS)
        limits = replace(limits, cgroups_max=cgroups)
    _check_sizes(spec, limits, pool_bytes)
    return limits


_CHANGEABLE: dict[str, tuple[str, Callable[[str, str], int]]] = {
    "memory_low": ("memory_low_bytes", parse_bytes),
    "memory_high": ("memory_high_bytes", parse_bytes),
    "memory_max": ("memory_max_bytes", parse_bytes),
    "cpu_weight": ("cpu_weight", lambda field, text: parse_count(field, text, 1, WEIGHT_MOST)),
    "io_weight": ("io_weight", lambda field, text: parse_count(field, text, 1, WEIGHT_MOST)),
    "io_latency": ("io_latency_usec", _parse_latency),
    "cpu_max": ("cpu_max_millicores", parse_cores),
    "pids_max": ("pids_max", lambda field, text: parse_count(field, text, 1, PIDS_MOST)),
    "priority": ("priority", parse_priority),
    "exec_is_call": ("exec_is_call", _parse_yes),
    "calls_max": ("calls_max", lambda field, text: parse_count(field, text, 1, CALLS_MOST)),
}
"""Fields of a spec that can be changed: the limit that each sets, and its parser."""


def _check_sizes(spec: pb.SessionSpec, limits: SessionLimits, pool_bytes: int | None) -> None:
    """Refuse sizes that contradict each other or the pool. Raises InvalidField."""
    low, high, top = limits.memory_low_bytes, limits.memory_high_bytes, limits.memory_max_bytes
    if pool_bytes is not None:
        for field, value in (("memory_low", low), ("memory_max", top)):
            if getattr(spec, field) and value is not None and value > pool_bytes:
                allowed, why = f"at most {show_bytes(pool_bytes)}", "it is more than the whole pool"
                raise InvalidField(field, getattr(spec, field), allowed, why)
    if top is None:
        return
    for field, value in (("memory_low", low), ("memory_high", high)):
        if value is None or value <= top:
            continue
        if not getattr(spec, field):  # It stays as it is, and the new memory_max is at fault.
            allowed = f"at least {field} ({show_bytes(value)})"
            raise InvalidField("memory_max", spec.memory_max, allowed)
        allowed = f"at most memory_max ({show_bytes(top)})"
        raise InvalidField(field, getattr(spec, field), allowed)


def write_limits(
    cgroup: Cgroup, limits: SessionLimits, disk_weights: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Set the interface files that are there. `disk_weights`: as for `write_disk_limits`. Raises
    KnobError."""

    def put(knob: Knob[T], value: T) -> None:
        if cgroup.has(knob):
            cgroup.write(knob, value)

    put(knobs.MEMORY_LOW, limits.memory_low_bytes or 0)
    put(knobs.MEMORY_HIGH, limits.memory_high_bytes)
    put(knobs.MEMORY_MAX, limits.memory_max_bytes)
    put(knobs.MEMORY_SWAP_MAX, limits.swap_max_bytes)
    put(knobs.CPU_WEIGHT, limits.cpu_weight)
    quota = limits.cpu_max_millicores
    put(knobs.CPU_MAX, knobs.CpuMax(quota * 100 if quota is not None else None))
    put(knobs.PIDS_MAX, limits.pids_max)
    put(knobs.CGROUP_MAX_DESCENDANTS, limits.cgroups_max)
    put(knobs.CGROUP_MAX_DEPTH, limits.cgroup_depth_max)
    write_disk_limits(cgroup, limits, disk_weights)


def write_disk_limits(
    cgroup: Cgroup, limits: SessionLimits, disk_weights: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Set what is kept of disks for a session. `disk_weights`: the text of the files of weights, by
    file, where these are a runtime's and not the session's own. Where the session asks for no
    latency, one that a runtime has set stays. Raises KnobError."""
    if not disk_weights:
        write_weight(cgroup, limits.io_weight)
    for file, text in disk_weights.items():
        if cgroup.has(Knob(file, str)):  # that of bfq goes with its module
            _write_lines(cgroup, file, text)
    if limits.io_latency_usec is not None and cgroup.has(knobs.IO_LATENCY):
        write_latency(cgroup, limits.io_latency_usec)


def drop_latency(cgroup: Cgroup, found: Mapping[str, str]) -> None:
    """Take away what a session has asked for, and put back what was found. Raises KnobError."""
    if cgroup.has(knobs.IO_LATENCY):
        write_latency(cgroup, None)
        _write_lines(cgroup, knobs.IO_LATENCY.file, found.get(knobs.IO_LATENCY.file, ""))


def clear_oom_group(cgroup: Cgroup) -> None:
    """Set memory.oom.group of a container to 0, so that the kernel ends a call, or a process of the
    agent, where it is out of memory. The runtime may have asked for the end of all of it, as the
    kubelet does since Kubernetes 1.28. No error without the memory controller. Raises KnobError."""
    if cgroup.read_if(knobs.MEMORY_OOM_GROUP):
        cgroup.write(knobs.MEMORY_OOM_GROUP, False)


WRITTEN_KNOBS = (
    knobs.MEMORY_LOW.file,
    knobs.MEMORY_HIGH.file,
    knobs.MEMORY_MAX.file,
    knobs.MEMORY_SWAP_MAX.file,
    knobs.MEMORY_OOM_GROUP.file,
    knobs.CPU_WEIGHT.file,
    knobs.CPU_MAX.file,
    knobs.PIDS_MAX.file,
    knobs.CGROUP_MAX_DESCENDANTS.file,
    knobs.CGROUP_MAX_DEPTH.file,
    knobs.IO_WEIGHT.file,
    knobs.IO_BFQ_WEIGHT.file,
    knobs.IO_LATENCY.file,
)
"""What `write_limits` and `clear_oom_group` set."""
DISK_FILES = frozenset((knobs.IO_WEIGHT.file, knobs.IO_BFQ_WEIGHT.file, knobs.IO_LATENCY.file))
"""Files of WRITTEN_KNOBS that have a line for each device."""


def lacking_files(cgroup: Cgroup, limits: SessionLimits) -> list[str]:
    """List the files of disks that limits of a session would be kept by, and that are not there."""
    wanted = [] if limits.io_latency_usec is None else [knobs.IO_LATENCY]
    lacking = [knob.file for knob in wanted if not cgroup.has(knob)]
    if limits.io_weight != DEFAULT_WEIGHT and not any(cgroup.has(knob) for knob, _ in WEIGHTS):
        lacking.append(knobs.IO_WEIGHT.file)
    return lacking


def millicores_of(cpu: knobs.CpuMax | None) -> int | None:
    """Thousandths of a CPU that cpu.max allows; None: no limit."""
    if cpu is None or cpu.quota_usec is None:
        return None
    return cpu.quota_usec * 1000 // cpu.period_usec


def read_limits(cgroup: Cgroup) -> dict[str, str]:
    """The text of the files of WRITTEN_KNOBS that are there, by file. Raises KnobError."""
    found = {}
    for file in WRITTEN_KNOBS:
        text = cgroup.read_if(Knob(file, str.strip))
        if text is not None:
            found[file] = text
    return found


def write_found(cgroup: Cgroup, found: Mapping[str, str]) -> None:
    """Put interface files back to the text that `read_limits` found. Raises KnobError."""
    for file, text in found.items():
        if file not in DISK_FILES:
            cgroup.write_text(file, text)
    # What an earlier daemon did not know of, or a module has brought since, was not found.
    write_weight(cgroup, DEFAULT_WEIGHT)
    for knob, _ in WEIGHTS:
        _write_lines(cgroup, knob.file, found.get(knob.file, ""))
    drop_latency(cgroup, found)


def _write_lines(cgroup: Cgroup, file: str, text: str) -> None:
    """Write what holds for each device, as far as it is still there. Raises CgroupGone."""
    for line in filter(None, text.split("\n")):
        write_line(cgroup, file, line)


class Read(Protocol):
    """Reads what a runtime has set on its container: from the files, or as they were found."""

    def __call__(self, knob: Knob[T], /) -> T | None:
        """The value of an interface file; None: there is no such file."""


def as_found(found: dict[str, str]) -> Read:
    """A reader of interface files as they were found before. `found`: their text by file."""

    def read(knob: Knob[T], /) -> T | None:
        return knob.parse(found[knob.file]) if knob.file in found else None

    return read


def tighten(read: Read, ours: SessionLimits) -> SessionLimits:
    """Our limits, made no looser than those that a runtime has set on its container. Raises
    KnobError."""

    def least(a: int | None, b: int | None) -> int | None:
        return min((v for v in (a, b) if v is not None), default=None)

    theirs = millicores_of(read(knobs.CPU_MAX))
    return replace(
        ours,
        memory_low_bytes=ours.memory_low_bytes or read(knobs.MEMORY_LOW) or None,
        memory_high_bytes=least(ours.memory_high_bytes, read(knobs.MEMORY_HIGH)),
        memory_max_bytes=least(ours.memory_max_bytes, read(knobs.MEMORY_MAX)),
        cpu_max_millicores=least(ours.cpu_max_millicores, theirs),
        pids_max=least(ours.pids_max, read(knobs.PIDS_MAX)),
        cgroups_max=least(ours.cgroups_max, read(knobs.CGROUP_MAX_DESCENDANTS)),
        cgroup_depth_max=least(ours.cgroup_depth_max, read(knobs.CGROUP_MAX_DEPTH)),
        swap_max_bytes=least(ours.swap_max_bytes, read(knobs.MEMORY_SWAP_MAX)),
    )
