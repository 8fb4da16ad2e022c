"""Looks at the pool for `top`: what there is, how fast it is used, and what would help."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentcgroup.admin import Admin
from agentcgroup.types import CallInfo, CallState, PoolInfo, SessionInfo, Usage

from .output import size

NEAR_LIMIT = 0.95
AGENTS_SHARE = 0.25
"""Part of the pool that agents hold outside of calls from which on it is worth a word."""
STALLED_PERCENT = 20.0
BUSY_SHARE = 0.95
HELP_MOST = 6


@dataclass(frozen=True)
class Look:
    """What the daemon said at one moment. `at`: by a clock that only goes forward, in seconds."""

    pool: PoolInfo
    sessions: Sequence[SessionInfo]
    calls: Sequence[CallInfo]
    at: float

    @classmethod
    def take(cls, admin: Admin) -> Look:
        """Ask the daemon. Raises AgentcgError."""
        return cls(admin.pool(), admin.sessions(), admin.calls(), time.monotonic())


@dataclass(frozen=True)
class Rate:
    """Use in a second, from one look to the next. None: not known."""

    cores: float | None = None
    io_bytes: float | None = None
    net_bytes: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return plain data."""
        return {"cores": self.cores, "io_bytes": self.io_bytes, "net_bytes": self.net_bytes}


NO_RATE = Rate()


@dataclass(frozen=True)
class Rates:
    """Rates of the pool, and of sessions and calls by id."""

    pool: Rate = NO_RATE
    sessions: dict[str, Rate] = field(default_factory=dict)
    calls: dict[str, Rate] = field(default_factory=dict)

    @classmethod
    def between(cls, before: Look | None, now: Look) -> Rates:
        """Compute them. `before` None: nothing is known yet."""
        if before is None:
            return cls()
        passed = now.at - before.at
        return cls(
            _rate(before.pool.usage, now.pool.usage, passed),
            _rates(before.sessions, now.sessions, passed),
            _rates(before.calls, now.calls, passed),
        )


def _rates(
    before: Iterable[SessionInfo | CallInfo], now: Iterable[SessionInfo | CallInfo], passed: float
) -> dict[str, Rate]:
    # One of the same name may have been closed and opened meanwhile: the cgroup tells.
    known = {(each.id, each.cgroup_id): each.usage for each in before}
    return {
        each.id: _rate(known.get((each.id, each.cgroup_id)), each.usage, passed) for each in now
    }


def _rate(before: Usage | None, now: Usage | None, passed: float) -> Rate:
    if before is None or now is None or passed <= 0:
        return NO_RATE
    return Rate(
        (now.cpu_usage_usec - before.cpu_usage_usec) / 1e6 / passed,
        _of(_io_of(before), _io_of(now), passed),
        _of(_net_of(before), _net_of(now), passed),
    )


def _of(before: int | None, now: int | None, passed: float) -> float | None:
    return None if before is None or now is None else max(0, now - before) / passed


def _io_of(usage: Usage) -> int | None:
    if usage.io_read_bytes is None or usage.io_write_bytes is None:
        return None
    return usage.io_read_bytes + usage.io_write_bytes


def _net_of(usage: Usage) -> int | None:
    return None if usage.net is None else usage.net.receive_bytes + usage.net.send_bytes


# What is told of each


def memory_of(each: SessionInfo | CallInfo) -> int:
    """Return what a session or call holds, in bytes; 0 where it is not measured."""
    usage = each.usage
    return 0 if usage is None else usage.memory_current_bytes or 0


def priority_of(call: CallInfo) -> int:
    """Return the priority of a call; that of `normal` where it has no grant yet."""
    return 50 if call.grant is None else call.grant.priority


def is_paused(call: CallInfo) -> bool:
    """Tell whether a call is paused, by whomever."""
    return call.state is CallState.FROZEN


def is_waiting(call: CallInfo) -> bool:
    """Tell whether a call waits in the queue."""
    return call.state is CallState.WAITING


def reason(call: CallInfo) -> str:
    """Say why a call that is paused or waits does not run."""
    if call.place is None:
        return call.paused_why or "Nobody said why."
    place = call.place
    room = f"expects {size(place.expected_bytes)}, room for {size(place.room_bytes)}"
    return f"number {place.position} of {place.waiting}, {room}"


# What would help


def advice(look: Look, rates: Rates) -> list[str]:
    """Say in sentences what would help those who wait or are paused, the most useful first; where
    nobody does, how much is free."""
    held = [call for call in look.calls if call.held]
    stuck = [c for c in look.calls if (is_paused(c) and not c.held) or is_waiting(c)]
    found = _for_stuck(look) if stuck else []
    found += [
        f"You hold call {call.id} paused, with {size(memory_of(call))}: 'agentcg resume {call.id}'."
        for call in held[:1]
    ]
    found += _for_limits(look)
    if stuck:
        found += _for_agents(look)
    found += _for_cpu_and_disks(look, rates)
    if not found:
        return [f"Nothing: no call waits or is paused{_free(look)}."]
    return found[:HELP_MOST]


def _free(look: Look) -> str:
    most, used = look.pool.memory_max_bytes, look.pool.used_bytes
    return "" if most is None or used is None else f", and {size(max(0, most - used))} are free"


def _for_stuck(look: Look) -> list[str]:
    found = []
    first = next((c for c in look.calls if c.place is not None and c.place.position == 1), None)
    if first is not None and first.place is not None:
        lacks = first.place.expected_bytes - first.place.room_bytes
        if lacks > 0:
            found.append(
                f"{size(lacks)} more would let {first.name} of {first.session_id} begin "
                f"(call {first.id})."
            )
    running = [c for c in look.calls if c.place is None and memory_of(c) and not c.parent_call_id]
    if running:
        least = min(map(priority_of, running))
        most = max((c for c in running if priority_of(c) == least), key=memory_of)
        found.append(
            f"Ending call {most.id} ({most.name} of {most.session_id}, priority {least}) would "
            f"free {size(memory_of(most))}: the most among those of the least priority."
        )
    return found


def _for_limits(look: Look) -> list[str]:
    """Name the sessions that are at their own limit: the pool is not to blame for those."""
    return [
        f"Session {each.id} is at {memory_of(each) / each.memory_max_bytes:.0%} of its own limit "
        f"of {size(each.memory_max_bytes)}: 'agentcg session set {each.id} --memory-max SIZE'."
        for each in look.sessions
        if each.memory_max_bytes and memory_of(each) >= NEAR_LIMIT * each.memory_max_bytes
    ][:2]


def _for_agents(look: Look) -> list[str]:
    outer = [c for c in look.calls if c.place is None and not c.parent_call_id]
    beside = sum(map(memory_of, look.sessions)) - sum(map(memory_of, outer))
    most = look.pool.memory_max_bytes
    if most is None or beside < AGENTS_SHARE * most:
        return []
    return [
        f"Agents hold {size(beside)} outside of their calls: with swap (pool.zram) what is cold of "
        "it would make room."
    ]


def _for_cpu_and_disks(look: Look, rates: Rates) -> list[str]:
    found, pool = [], look.pool
    if rates.pool.cores is not None and pool.cpu_millicores:
        share = rates.pool.cores * 1000 / pool.cpu_millicores
        if share >= BUSY_SHARE and (pool.cpu_some_percent or 0) >= STALLED_PERCENT:
            found.append(f"All {pool.cpu_millicores / 1000:g} cores are busy: more would help.")
    if (pool.io_some_percent or 0) >= STALLED_PERCENT:
        busiest = _busiest(look, rates)
        whose = f", most of it for session {busiest}" if busiest else ""
        found.append(f"Tasks wait for disks {pool.io_some_percent:.0f} % of the time{whose}.")
    return found


def _busiest(look: Look, rates: Rates) -> str:
    known = [
        (rates.sessions.get(each.id, NO_RATE).io_bytes or 0, each.id) for each in look.sessions
    ]
    most, name = max(known, default=(0, ""))
    return name if most else ""


def to_dict(look: Look, rates: Rates) -> dict[str, Any]:
    """Return all of it as plain data, for --json."""

    def with_rate(each: SessionInfo | CallInfo, rates: dict[str, Rate]) -> dict[str, Any]:
        return {**each.to_dict(), "rate": rates.get(each.id, NO_RATE).to_dict()}

    return {
        "pool": {**look.pool.to_dict(), "rate": rates.pool.to_dict()},
        "sessions": [with_rate(each, rates.sessions) for each in look.sessions],
        "calls": [with_rate(each, rates.calls) for each in look.calls],
        "advice": advice(look, rates),
    }
