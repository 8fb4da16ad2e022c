"""Changes of a call's grant from inside the call, which may only lower what it has.

A tool may make its own call smaller, as a build does that finds less to do. Whatever would give it
more than its agent was granted is refused, however it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agentcgroupd.errors import PermissionDenied
from agentcgroupd.intents.grant import HINT_LOW_BYTES, Grant
from agentcgroupd.intents.parse import CpuList, Intent
from agentcgroupd.units import show_bytes, show_usec

_UNLIMITED = float("inf")

_MOST: dict[str, tuple[Callable[[Grant], int | None], Callable[[int], str]]] = {
    "memory": (lambda g: g.memory_expected_bytes, show_bytes),
    "memory_max": (lambda g: g.memory_max_bytes, show_bytes),
    "cpu_weight": (lambda g: g.cpu_weight, str),
    "io_weight": (lambda g: g.io_weight or 100, str),
    "cpu_max": (lambda g: g.cpu_max_millicores, lambda most: f"{most / 1000:g} cores"),
    "pids_max": (lambda g: g.pids_max, str),
    "disk_max": (lambda g: g.disk_max_bytes, show_bytes),
    "net_send_max": (lambda g: g.net_send_bytes_per_s, lambda most: f"{show_bytes(most)}/s"),
    "timeout": (lambda g: g.timeout_usec, show_usec),
    "priority": (lambda g: g.priority, str),
    "gpu": (lambda g: g.gpu_percent or 0, lambda most: f"{most}%"),
    "gpu_memory": (lambda g: g.gpu_memory_bytes or 0, show_bytes),
    "gpu_priority": (lambda g: g.gpu_priority or 0, str),
}
"""By the field of an intent: what a call has of it (None: no limit), and how that is written."""


def _refusal(call_id: str, field: str, value: str, allowed: str) -> PermissionDenied:
    sentence = (
        f"{field}: {value!r} cannot be had from inside call {call_id}: a tool may only lower what "
        f"its call has; allowed is {allowed}"
    )
    return PermissionDenied(sentence, field, value, allowed)


def refuse_raise(call_id: str, has: Grant, asked: Intent) -> None:
    """Refuse an update that asks for more of anything than an open call has. Raises
    PermissionDenied, which names the field, its value and what is allowed."""
    for field, (most_of, show) in _MOST.items():
        value, most = getattr(asked, field), most_of(has)
        if value is not None and value > (_UNLIMITED if most is None else most):
            raise _refusal(call_id, field, show(value), f"at most {show(most or 0)}")
    _refuse_hint(call_id, has, asked)
    if asked.on_pressure not in (None, has.on_pressure, "kill"):
        allowed = " or ".join(dict.fromkeys((has.on_pressure, "kill")))
        raise _refusal(call_id, "on_pressure", asked.on_pressure or "", allowed)
    if asked.leftovers == "keep" and has.leftovers != "keep":
        raise _refusal(call_id, "leftovers", "keep", "end")
    if asked.gpu_device is not None:
        raise _refusal(call_id, "gpu_device", str(asked.gpu_device), "nothing: its devices stay")
    for field in ("io_read_max", "io_write_max"):
        rate, rate_most = getattr(asked, field), has.settings.get(field)
        if rate is not None and rate_most is not None and rate > int(rate_most):
            allowed = f"at most {show_bytes(int(rate_most))} a second"
            raise _refusal(call_id, field, f"{show_bytes(rate)} a second", allowed)
    mine = has.settings.get("cpuset")
    if asked.cpuset is not None and mine is not None:
        if not asked.cpuset.cpus <= CpuList.parse(mine).cpus:
            raise _refusal(call_id, "cpuset", str(asked.cpuset), f"some of {mine}")


def _refuse_hint(call_id: str, has: Grant, asked: Intent) -> None:
    hint, most = asked.hint, has.memory_max_bytes
    if hint is None or most is None:
        return
    size = {"high": _UNLIMITED, "low": HINT_LOW_BYTES}.get(hint) if isinstance(hint, str) else hint
    if size is not None and size > most:
        shown = f"memory:{hint if isinstance(hint, str) else show_bytes(hint)}"
        raise _refusal(call_id, "hint", shown, f"at most memory:{show_bytes(most)}")


def _least(a: int | None, b: int | None) -> int | None:
    return min((v for v in (a, b) if v is not None), default=None)


def lowered(has: Grant, new: Grant) -> Grant:
    """Cut an update that asks for nothing more to what the call has: some fields follow from
    others, such as the weight from the priority, and may have been lower than what follows now."""
    return replace(
        new,
        cpu_weight=min(has.cpu_weight, new.cpu_weight),
        io_weight=_least(has.io_weight, new.io_weight),
        memory_max_bytes=_least(has.memory_max_bytes, new.memory_max_bytes),
        memory_high_bytes=_least(has.memory_high_bytes, new.memory_high_bytes),
        cpu_max_millicores=_least(has.cpu_max_millicores, new.cpu_max_millicores),
        pids_max=_least(has.pids_max, new.pids_max),
        timeout_usec=_least(has.timeout_usec, new.timeout_usec),
        disk_max_bytes=_least(has.disk_max_bytes, new.disk_max_bytes),
        net_send_bytes_per_s=_least(has.net_send_bytes_per_s, new.net_send_bytes_per_s),
    )
