"""From an intent to a grant: pure arithmetic over the session's limits and what the host has.

Three outcomes: the grant as asked; a smaller one, with a sentence for each thing given otherwise;
or an error, when what the caller says it needs cannot fit at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.cpu_class import CpuClasses
from agentcgroupd.intents.gpu import GpuCeiling, gpu_part
from agentcgroupd.intents.parse import Intent
from agentcgroupd.units import BYTES_MIN, show_bytes, show_usec

CALL_MEMORY_LEAST = 4 << 20
"""No call is given less: below this a process cannot even start."""


HINT_LOW_BYTES = 512 << 20
"""What the older form's word `low` stands for; `high` is all that the session may use."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a call may use. None: no limit of its own."""

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
    """Beside cpu.weight; None: not set."""
    wait_usec: int | None = None
    """How long it may wait to begin, after which it is refused; None: as the policy says."""
    advice: tuple[str, ...] = ()
    not_enforced: tuple[str, ...] = ()
    gpu_percent: int | None = None
    """Of each of `gpu_devices`; None: no part of any."""
    gpu_memory_bytes: int | None = None
    gpu_priority: int | None = None
    gpu_devices: tuple[str, ...] = ()
    """UUIDs; empty until the call is placed."""
    gpu_wanted: str = ""
    """Which devices it asked for, as gpu.wanted has it."""
    environment: tuple[str, ...] = ()
    """`NAME=value` for the tool."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The limits above a call: the session's, the pool's and the host's."""

    memory_max_bytes: int | None
    """The tightest memory.max above the call."""
    agent_memory_bytes: int
    """What the session's agent leaf holds now; a call's limit leaves room for it."""
    cpu_millicores: int
    pids_max: int | None
    priority: int
    default_pids_max: int | None
    default_timeout_usec: int | None
    timeout_max_usec: int
    cpu: CpuClasses = field(default_factory=CpuClasses)
    gpu: GpuCeiling = field(default_factory=GpuCeiling)


def weight_of_priority(priority: int) -> int:
    """cpu.weight for a priority: 100 (the kernel's default) at 50, doubled for every 15 above.

    So important (80) gets four times the weight of normal (50), which gets four times batch (20).
    """
    return max(1, min(10_000, round(100 * 2 ** ((priority - 50) / 15))))


def _class_percent(cpu: CpuClasses, priority: int) -> int:
    if priority < cpu.batch_below:
        return cpu.batch_weight_percent
    return cpu.interactive_weight_percent if priority >= cpu.interactive_from else 100


def class_weight(cpu: CpuClasses, priority: int) -> int:
    """cpu.weight of a call: by its priority and the policy's class of it."""
    weight = weight_of_priority(priority) * _class_percent(cpu, priority) // 100
    return max(1, min(10_000, weight))


def _memory(intent: Intent, above: Ceiling, advice: list[str]) -> tuple[int, int | None]:
    """(expected, max) in bytes."""
    expected, most = intent.memory, intent.memory_max
    roof = above.memory_max_bytes
    if intent.hint == "high":
        most = most or roof
    elif intent.hint == "low":
        most = most or min(HINT_LOW_BYTES, roof or HINT_LOW_BYTES)
    elif intent.hint is not None:
        most = most or int(intent.hint)
    if roof is None:
        return expected or 0, most
    room = max(CALL_MEMORY_LEAST, roof - above.agent_memory_bytes)
    if expected is not None and expected > roof:
        raise InvalidField(
            "memory", show_bytes(expected), f"at most {show_bytes(roof)}",
            f"this session may use at most {show_bytes(roof)}, so the call would never fit",
        )  # fmt: skip
    if most is not None and most > room:
        advice.append(
            f"memory_max: you asked for {show_bytes(most)}; this session may use "
            f"{show_bytes(roof)} and its agent holds {show_bytes(above.agent_memory_bytes)}, "
            f"so the call got {show_bytes(room)}."
        )
    return expected or 0, min(most or room, room)


def _memory_high(intent: Intent, most: int | None) -> int | None:
    """A call that would rather be slowed than killed is braked shortly below its limit."""
    if intent.on_pressure != "throttle" or most is None:
        return None
    return max(BYTES_MIN, most - max(most // 16, 4 << 20))


def grant_for(intent: Intent, above: Ceiling) -> Grant:
    """The grant for an intent. Raises InvalidField when it can never fit."""
    advice: list[str] = []
    expected, memory_max = _memory(intent, above, advice)

    cpu_max = intent.cpu_max
    if cpu_max is not None and cpu_max > above.cpu_millicores:
        advice.append(
            f"cpu_max: you asked for {cpu_max / 1000:g} cores; there are "
            f"{above.cpu_millicores / 1000:g} here, which is what the call may use."
        )
        cpu_max = None

    pids_max = intent.pids_max or above.default_pids_max
    if pids_max is not None and above.pids_max is not None and pids_max > above.pids_max:
        if intent.pids_max:
            advice.append(
                f"pids_max: you asked for {pids_max}; this session may have {above.pids_max}, "
                "which is what the call got."
            )
        pids_max = above.pids_max

    timeout = intent.timeout or above.default_timeout_usec
    if timeout is not None and timeout > above.timeout_max_usec:
        advice.append(
            f"timeout: you asked for {show_usec(timeout)}; the longest allowed is "
            f"{show_usec(above.timeout_max_usec)}, which is what the call got."
        )
        timeout = above.timeout_max_usec

    priority = above.priority if intent.priority is None else intent.priority
    if priority > above.priority:
        advice.append(
            f"priority: you asked for {priority}; this session has {above.priority}, "
            "which is what the call got."
        )
        priority = above.priority
    gpu = gpu_part(intent, above.gpu, priority, above.priority, advice)

    return Grant(
        memory_expected_bytes=expected,
        memory_high_bytes=_memory_high(intent, memory_max),
        memory_max_bytes=memory_max,
        cpu_weight=(weight := intent.cpu_weight or class_weight(above.cpu, priority)),
        io_weight=weight if above.cpu.io_weight else None,
        cpu_max_millicores=cpu_max,
        pids_max=pids_max,
        timeout_usec=timeout,
        priority=priority,
        on_pressure=intent.on_pressure or "freeze",
        wait_usec=intent.wait,
        advice=tuple(advice),
        gpu_percent=gpu.percent if gpu else None,
        gpu_memory_bytes=gpu.memory_bytes if gpu else None,
        gpu_priority=gpu.priority if gpu else None,
        gpu_wanted=str(gpu.devices) if gpu else "",
    )


def merge(old: Grant, update: Intent, above: Ceiling, current_bytes: int | None) -> Grant:
    """The grant after UpdateIntent: fields left out stay. A memory limit below what the call holds
    now is refused, because setting it would kill the call. Raises InvalidField."""
    if update.gpu_device is not None:
        raise InvalidField("gpu_device", update.gpu_device, "nothing: an open call stays on the "
                           "devices that it has")  # fmt: skip
    if update.gpu_priority is not None and update.gpu is None and update.gpu_memory is None:
        # A part is asked for with it, or it makes no sense; here there is one.
        update = update.model_copy(update={"gpu": old.gpu_percent})
    fresh = grant_for(update, above)
    most = old.memory_max_bytes
    if update.memory_max is not None or update.hint is not None:
        most = fresh.memory_max_bytes
    if most is not None and current_bytes is not None and most < current_bytes:
        raise InvalidField("memory_max", show_bytes(most),
                           f"at least {show_bytes(current_bytes)}, which the call holds now",
                           "it would kill the call")  # fmt: skip
    on_pressure = update.on_pressure or old.on_pressure
    weighed = update.cpu_weight is not None or update.priority is not None
    throttled = Intent.model_construct(on_pressure=on_pressure)
    return replace(
        old,
        memory_expected_bytes=fresh.memory_expected_bytes or old.memory_expected_bytes,
        memory_max_bytes=most,
        memory_high_bytes=_memory_high(throttled, most),
        cpu_weight=(weight := fresh.cpu_weight if weighed else old.cpu_weight),
        io_weight=weight if above.cpu.io_weight else None,
        cpu_max_millicores=fresh.cpu_max_millicores
        if update.cpu_max is not None
        else old.cpu_max_millicores,
        pids_max=fresh.pids_max if update.pids_max is not None else old.pids_max,
        timeout_usec=fresh.timeout_usec if update.timeout is not None else old.timeout_usec,
        priority=fresh.priority if update.priority is not None else old.priority,
        on_pressure=on_pressure,
        advice=fresh.advice,
        gpu_percent=fresh.gpu_percent if update.gpu is not None else old.gpu_percent,
        gpu_memory_bytes=fresh.gpu_memory_bytes
        if update.gpu_memory is not None
        else old.gpu_memory_bytes,
        gpu_priority=fresh.gpu_priority if update.gpu_priority is not None else old.gpu_priority,
    )
