"""Grants, made of intents: pure arithmetic over the session's limits and what the host has.

Three outcomes: the grant as asked; a smaller one, with a sentence for each thing given otherwise;
or an error, when what the caller says it needs cannot fit at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.cpu_class import CpuClasses
from agentcgroupd.intents.gpu import GpuCeiling
from agentcgroupd.intents.gpu_part import gpu_part
from agentcgroupd.intents.parse import PARSERS, Intent, settings_of
from agentcgroupd.units import BYTES_MIN, show_bytes, show_usec

CALL_MEMORY_LEAST = 4 << 20
"""No call is given less: below this a process cannot even start."""
HINT_LOW_BYTES = 512 << 20
"""What the older form's word `low` stands for; `high` is all that the session may use."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Limits and settings of a call. None: no limit of its own."""

    memory_expected_bytes: int
    memory_high_bytes: int | None
    memory_max_bytes: int | None
    cpu_weight: int
    cpu_max_millicores: int | None
    pids_max: int | None
    timeout_usec: int | None
    priority: int
    on_pressure: str
    io_weight: int | None = None
    """Weight that is set beside cpu.weight; None: it is not set."""
    io_weight_asked: bool = False
    """Whether the intent says it."""
    leftovers: str = "keep"
    """What becomes of processes that live on after the main process: `end` or `keep`. The default
    is for records of a daemon that ended none."""
    wait_usec: int | None = None
    """How long it may wait to begin, after which it is refused; None: as the policy says."""
    advice: tuple[str, ...] = ()
    not_enforced: tuple[str, ...] = ()
    gpu_percent: int | None = None
    """Share of each of `gpu_devices`; None: no part of any."""
    gpu_memory_bytes: int | None = None
    gpu_priority: int | None = None
    gpu_devices: tuple[str, ...] = ()
    """UUIDs; empty until the call is placed."""
    environment: tuple[str, ...] = ()
    """`NAME=value` for the tool."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Fields of the intent that an interface file takes as they are, as text by name."""
    disk_max_bytes: int | None = None
    """What it may write to disks in all before it is ended (guard.disks)."""
    net_send_bytes_per_s: int | None = None
    """What its sockets may send (calls.traffic)."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The limits above a call: the session's, the pool's and the host's."""

    memory_max_bytes: int | None
    """The tightest memory.max above the call."""
    agent_memory_bytes: int
    """What the session's agent leaf holds now; a call's limit leaves room for it."""
    files_memory_bytes: int
    """The same, held by files in memory whose call has ended."""
    cpu_millicores: int
    pids_max: int | None
    priority: int
    default_pids_max: int | None
    default_timeout_usec: int | None
    timeout_max_usec: int
    default_disk_max: int | None = None
    default_net_send_max: int | None = None
    cpu: CpuClasses = field(default_factory=CpuClasses)
    gpu: GpuCeiling = field(default_factory=GpuCeiling)


def weight_of_priority(priority: int) -> int:
    """Give the cpu.weight for a priority: 100 (the kernel's default) at 50, doubled for every 15
    above.

    So important (80) gets four times the weight of normal (50), which gets four times batch (20).
    """
    return max(1, min(10_000, round(100 * 2 ** ((priority - 50) / 15))))


def _class_percent(cpu: CpuClasses, priority: int) -> int:
    if priority < cpu.batch_below:
        return cpu.batch_weight_percent
    return cpu.interactive_weight_percent if priority >= cpu.interactive_from else 100


def class_weight(cpu: CpuClasses, priority: int) -> int:
    """Give a call's cpu.weight: by its priority and the policy's class of that."""
    weight = weight_of_priority(priority) * _class_percent(cpu, priority) // 100
    return max(1, min(10_000, weight))


def _hinted_max(hint: str | int | None, roof: int | None) -> int | None:
    """Bytes that the older hint stands for below a session's limit; None: no limit of its own."""
    if hint == "high":
        return roof
    if hint == "low":
        return min(HINT_LOW_BYTES, roof or HINT_LOW_BYTES)
    return hint if isinstance(hint, int) else None


def _memory(intent: Intent, above: Ceiling, advice: list[str]) -> tuple[int, int | None]:
    """Give what is expected, and memory.max, both in bytes. Raises InvalidField."""
    expected, roof = intent.memory, above.memory_max_bytes
    most = intent.memory_max or _hinted_max(intent.hint, roof)
    if roof is None:
        return expected or 0, most
    if expected is not None and expected > roof:
        allowed = f"at most {show_bytes(roof)}"
        why = f"this session may use {allowed}, so the call would never fit"
        raise InvalidField("memory", show_bytes(expected), allowed, why)
    held = above.agent_memory_bytes + above.files_memory_bytes
    beside = max(CALL_MEMORY_LEAST, roof - held)
    if most is not None and most > beside:
        holders = f"its agent holds {show_bytes(above.agent_memory_bytes)}"
        if above.files_memory_bytes:
            size = show_bytes(above.files_memory_bytes)
            holders += f", files in tmpfs or /dev/shm whose call has ended {size}"
        advice.append(
            f"memory_max: you asked for {show_bytes(most)}; this session may use "
            f"{show_bytes(roof)} and {holders}, so the call got {show_bytes(beside)}."
        )
    return expected or 0, min(most or beside, beside)


def memory_high(on_pressure: str, most: int | None) -> int | None:
    """Brake a call that would rather be slowed than killed shortly below its limit."""
    if on_pressure != "throttle" or most is None:
        return None
    return max(BYTES_MIN, most - max(most // 16, 4 << 20))


def _cpu_max(intent: Intent, above: Ceiling, advice: list[str]) -> int | None:
    """Give cpu.max in millicores; None: all that there is."""
    asked = intent.cpu_max
    if asked is None or asked <= above.cpu_millicores:
        return asked
    advice.append(
        f"cpu_max: you asked for {asked / 1000:g} cores; there are "
        f"{above.cpu_millicores / 1000:g} here, which is what the call may use."
    )
    return None


def _pids_max(intent: Intent, above: Ceiling, advice: list[str]) -> int | None:
    most = intent.pids_max or above.default_pids_max
    if most is None or above.pids_max is None or most <= above.pids_max:
        return most
    if intent.pids_max:
        advice.append(
            f"pids_max: you asked for {most}; this session may have {above.pids_max}, "
            "which is what the call got."
        )
    return above.pids_max


def _timeout(intent: Intent, above: Ceiling, advice: list[str]) -> int | None:
    timeout = intent.timeout or above.default_timeout_usec
    if timeout is None or timeout <= above.timeout_max_usec:
        return timeout
    advice.append(
        f"timeout: you asked for {show_usec(timeout)}; the longest allowed is "
        f"{show_usec(above.timeout_max_usec)}, which is what the call got."
    )
    return above.timeout_max_usec


def _priority(intent: Intent, above: Ceiling, advice: list[str]) -> int:
    priority = above.priority if intent.priority is None else intent.priority
    if priority <= above.priority:
        return priority
    advice.append(
        f"priority: you asked for {priority}; this session has {above.priority}, "
        "which is what the call got."
    )
    return above.priority


def grant_for(intent: Intent, above: Ceiling) -> Grant:
    """Decide what a call gets for its intent. Raises InvalidField when it can never fit."""
    advice: list[str] = []
    expected, memory_max = _memory(intent, above, advice)
    cpu_max = _cpu_max(intent, above, advice)
    pids_max = _pids_max(intent, above, advice)
    timeout = _timeout(intent, above, advice)
    priority = _priority(intent, above, advice)
    weight = intent.cpu_weight or class_weight(above.cpu, priority)
    on_pressure = intent.on_pressure or "freeze"
    gpu = gpu_part(intent, above.gpu, priority, above.priority, advice)
    return Grant(
        memory_expected_bytes=expected,
        memory_high_bytes=memory_high(on_pressure, memory_max),
        memory_max_bytes=memory_max,
        cpu_weight=weight,
        io_weight=intent.io_weight or (weight if above.cpu.io_weight else None),
        io_weight_asked=intent.io_weight is not None,
        cpu_max_millicores=cpu_max,
        pids_max=pids_max,
        timeout_usec=timeout,
        priority=priority,
        on_pressure=on_pressure,
        leftovers=intent.leftovers or "end",
        wait_usec=intent.wait,
        advice=tuple(advice),
        gpu_percent=gpu.percent if gpu else None,
        gpu_memory_bytes=gpu.memory_bytes if gpu else None,
        gpu_priority=gpu.priority if gpu else None,
        settings=settings_of(intent),
        disk_max_bytes=intent.disk_max or above.default_disk_max,
        net_send_bytes_per_s=intent.net_send_max or above.default_net_send_max,
    )


_FOLLOWS_FROM = {
    "cpu_max_millicores": "cpu_max",
    "pids_max": "pids_max",
    "timeout_usec": "timeout",
    "priority": "priority",
    "on_pressure": "on_pressure",
    "leftovers": "leftovers",
    "disk_max_bytes": "disk_max",
    "net_send_bytes_per_s": "net_send_max",
    "gpu_percent": "gpu",
    "gpu_memory_bytes": "gpu_memory",
    "gpu_priority": "gpu_priority",
}
"""Fields of a grant that an update changes if, and only if, it says this field of the intent."""


def merge(old: Grant, update: Intent, above: Ceiling, current_bytes: int | None) -> Grant:
    """Decide what an open call gets after UpdateIntent: fields left out stay as they are.

    `current_bytes`: what the call holds now. A memory limit below that is refused, because setting
    it would kill the call. Raises InvalidField.
    """
    if update.gpu_device is not None:
        allowed = "nothing: an open call stays on the devices that it has"
        raise InvalidField("gpu_device", str(update.gpu_device), allowed)
    if update.gpu_priority is not None and update.gpu is None and update.gpu_memory is None:
        # A priority goes only with a part, and the open call has one.
        update = replace(update, gpu=old.gpu_percent)
    fresh = grant_for(update, above)
    most = old.memory_max_bytes
    if update.memory_max is not None or update.hint is not None:
        most = fresh.memory_max_bytes
    if most is not None and current_bytes is not None and most < current_bytes:
        allowed = f"at least {show_bytes(current_bytes)}, which the call holds now"
        raise InvalidField("memory_max", show_bytes(most), allowed, "it would kill the call")
    said = {name for name in PARSERS if getattr(update, name) is not None}
    changed: dict[str, Any] = {
        name: getattr(fresh, name) for name, source in _FOLLOWS_FROM.items() if source in said
    }
    weight = fresh.cpu_weight if said & {"cpu_weight", "priority"} else old.cpu_weight
    return replace(
        old,
        **changed,
        memory_expected_bytes=fresh.memory_expected_bytes or old.memory_expected_bytes,
        memory_max_bytes=most,
        memory_high_bytes=memory_high(changed.get("on_pressure", old.on_pressure), most),
        cpu_weight=weight,
        io_weight=_merged_io_weight(old, update, weight if above.cpu.io_weight else None),
        io_weight_asked=old.io_weight_asked or update.io_weight is not None,
        advice=fresh.advice,
        settings={**old.settings, **fresh.settings},
    )


def _merged_io_weight(old: Grant, update: Intent, follows: int | None) -> int | None:
    """Give what an update says, else what was asked for before, else what `follows` from the
    weight for CPU time."""
    if update.io_weight is not None:
        return update.io_weight
    return old.io_weight if old.io_weight_asked else follows
