"""Where it is decided: `decide(snapshot) -> decisions`. Pure: no I/O, no clock.

The pool is the first line: calls are frozen before its limit is touched, so that the kernel's OOM
killer has nothing to do. Freezing costs a call time and nothing else. The most important running
call, and among equals the oldest, is the leader: it is never frozen, so that something always ends
and gives its memory back. While it grows, room is kept for it: what it said it expects, or else as
much as it holds already, because two calls that grow side by side until the pool is full could
neither of them end. Only when frozen calls hold what the leader still needs does one of them go.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from agentcgroupd.units import show_bytes, show_usec

LOOKAHEAD_S = 0.25
"""Growth is assumed to go on this long: several ticks, and most recorded bursts (1-2 s) are held
well before their end."""
GROWING_BYTES_PER_S = 4 << 20
"""Slower growth is left alone while others grow faster."""
DENIED_SLACK_BYTES = 48 << 20
"""A call whose growth is denied may come by this much more: its allowance, and what it had asked
for before but not yet touched. Beyond it, denying was not enough."""
CRITICAL_SHARE = 0.34
"""Of the reserve: with less than this left, and growth going on, waiting is no longer an option."""


@dataclass(frozen=True, slots=True)
class CallView:
    """One open call as the policy sees it."""

    id: str
    name: str
    priority: int
    began_usec: int
    memory_bytes: int
    growth_bytes_per_s: float
    cpu_usec: int
    """Work done so far, which is lost if the call is killed."""
    frozen_for_usec: int | None = None
    """None: it runs."""
    denied_growth_bytes: int | None = None
    """How much it has grown since its growth was denied; None: it may grow."""
    on_pressure: str = "freeze"
    memory_expected_bytes: int = 0
    memory_max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pool at one moment."""

    limit_bytes: int
    usage_bytes: int
    growth_bytes_per_s: float
    reserve_bytes: int
    """Free memory below which growth is stopped."""
    resume_bytes: int
    """Free memory above which frozen calls go on."""
    lease_usec: int
    since_thaw_usec: int
    """Time since the last thaw: its effect must be seen before the next."""
    cooldown_usec: int
    calls: tuple[CallView, ...]
    can_deny: bool = False
    """Growth can be denied here."""

    @property
    def free_bytes(self) -> int:
        """What is left of the pool; negative when it is over."""
        return self.limit_bytes - self.usage_bytes


class Action(enum.Enum):
    """What can be done to a call."""

    DENY = "deny"
    ALLOW = "allow"
    FREEZE = "freeze"
    THAW = "thaw"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Decision:
    """One action and why, in words that the agent of that call will read."""

    action: Action
    call_id: str
    why: str


def _leader(calls: list[CallView]) -> CallView:
    """The call that must get through: the most important, and among equals the oldest."""
    return min(calls, key=lambda c: (-c.priority, c.began_usec, c.id))


def _room_for(now: Snapshot, leader: CallView) -> int:
    """Bytes kept free for the leader beyond the reserve. One that is not growing keeps nobody
    out."""
    if leader.growth_bytes_per_s <= GROWING_BYTES_PER_S:
        return 0
    wanted = max(leader.memory_expected_bytes - leader.memory_bytes, leader.memory_bytes)
    if leader.memory_max_bytes is not None:
        wanted = min(wanted, leader.memory_max_bytes - leader.memory_bytes)
    return max(0, min(wanted, now.limit_bytes // 2))


def _freeze(now: Snapshot, running: list[CallView], leader: CallView, room: int) -> list[Decision]:
    """Least important first, fastest growing first, until what still grows fits what is left."""
    others = [c for c in running if c is not leader and c.growth_bytes_per_s > GROWING_BYTES_PER_S]
    others.sort(key=lambda c: (c.priority, -c.growth_bytes_per_s, -c.began_usec, c.id))
    growth = max(now.growth_bytes_per_s, sum(c.growth_bytes_per_s for c in running))
    decisions: list[Decision] = []
    for call in others:
        if decisions and growth * LOOKAHEAD_S <= now.free_bytes - now.reserve_bytes - room:
            break
        why = (
            f"{show_bytes(max(0, now.free_bytes))} of the pool's "
            f"{show_bytes(now.limit_bytes)} are left and this call grows by "
            f"{show_bytes(call.growth_bytes_per_s)} a second, while {leader.name!r} is "
            f"{'more important' if leader.priority > call.priority else 'older'}."
        )
        if (call.denied_growth_bytes or 0) > DENIED_SLACK_BYTES:
            denied = False  # it uses memory that it was promised before
        elif call.denied_growth_bytes is not None:
            continue
        else:
            denied = now.can_deny and call.on_pressure == "deny"
        if denied:
            decisions.append(Decision(
                Action.DENY, call.id,
                f"No more memory for now: {why} What it asks for is refused (ENOMEM, MemoryError) "
                "until there is room; work in smaller parts, or try again later.",
            ))  # fmt: skip
        else:
            decisions.append(Decision(
                Action.FREEZE, call.id,
                f"Paused: {why} It goes on by itself; nothing is lost.",
            ))  # fmt: skip
        growth -= call.growth_bytes_per_s
    return decisions


def _kill(now: Snapshot, leader: CallView, others: list[CallView]) -> list[Decision]:
    """Last: the leader still grows into what others hold. One call goes, the least important, and
    among equals the one that frees the most memory for each second of work lost."""
    candidates = [c for c in others if c.priority <= leader.priority and c.memory_bytes > 0]
    if not candidates:
        return []
    victim = min(candidates, key=lambda c: (
        c.priority, c.on_pressure != "kill", -c.memory_bytes / (c.cpu_usec + 1_000_000), c.id,
    ))  # fmt: skip
    return [Decision(
        Action.KILL, victim.id,
        f"Stopped: the pool of {show_bytes(now.limit_bytes)} was full, {leader.name!r} could not "
        f"go on, and this call held {show_bytes(victim.memory_bytes)} with the least work to lose "
        f"({show_usec(victim.cpu_usec)} of CPU time). Try again later, or with less memory.",
    )]  # fmt: skip


def _thaw(
    now: Snapshot, running: list[CallView], frozen: list[CallView], room: int
) -> list[Decision]:
    best = _leader(frozen)
    expired = (best.frozen_for_usec or 0) >= now.lease_usec and now.free_bytes > now.reserve_bytes
    settled = now.since_thaw_usec >= now.cooldown_usec
    roomy = now.free_bytes > now.resume_bytes + room and settled
    if not running:
        why = "nothing else is running"
    elif roomy or expired:
        why = f"{show_bytes(now.free_bytes)} of the pool are free"
    else:
        return []
    paused = show_usec(best.frozen_for_usec or 0)
    return [Decision(Action.THAW, best.id, f"Going on after {paused}: {why}.")]


def _allow(now: Snapshot, room: int) -> list[Decision]:
    if now.free_bytes <= now.resume_bytes + room:
        return []
    why = f"Memory may be asked for again: {show_bytes(now.free_bytes)} of the pool are free."
    return [
        Decision(Action.ALLOW, c.id, why) for c in now.calls if c.denied_growth_bytes is not None
    ]


def decide(now: Snapshot) -> list[Decision]:
    """What to do now. The same snapshot always gives the same decisions."""
    running = [c for c in now.calls if c.frozen_for_usec is None]
    frozen = [c for c in now.calls if c.frozen_for_usec is not None]
    if not running:
        return _thaw(now, running, frozen, 0) if frozen else []
    leader = _leader(running)
    room = _room_for(now, leader)
    if now.free_bytes >= now.reserve_bytes + room:
        return [*_allow(now, room), *(_thaw(now, running, frozen, room) if frozen else [])]
    decisions = _freeze(now, running, leader, room)
    critical = now.free_bytes < now.reserve_bytes * CRITICAL_SHARE
    if not decisions and critical and now.growth_bytes_per_s > GROWING_BYTES_PER_S:
        return _kill(now, leader, [c for c in now.calls if c is not leader])
    return decisions
