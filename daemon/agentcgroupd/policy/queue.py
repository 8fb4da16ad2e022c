"""Who may start: `admit(policy, snapshot, waiting) -> ids`. Pure, like the engine.

Calls that say what they expect share the room that is left, by priority and age. What running calls
are still expected to take counts as taken. A small call never waits, and neither does one that says
nothing: it can be paused when it turns out large. Nobody waits for ever: age outweighs priority in
time, and once the first in the queue has waited for half of its time nothing large passes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentcgroupd.policy.engine import resume_mark
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Snapshot

AGE_PRIORITY = 10
"""Steps of priority that a call gains for each `age_step` of waiting: a batch call (20) that has
waited for six of them goes before an important one (80) that has just come."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that has not begun."""

    id: str
    session_id: str
    priority: int
    expected_bytes: int
    since_usec: int
    deadline_usec: int
    """On the snapshot's clock."""


def is_small(policy: Policy, expected_bytes: int, limit_bytes: int) -> bool:
    """Whether a call starts at once, whatever there is."""
    return expected_bytes <= policy.admission.small.of(limit_bytes)


def free_for_admission_bytes(policy: Policy, now: Snapshot) -> int:
    """What calls that begin now may be expected to take: what is free, less what is kept free, less
    what running and paused calls are still expected to take."""
    promised = sum(max(0, c.expected_bytes - c.memory_bytes) for c in now.calls)
    free = now.free_bytes - resume_mark(policy, now.limit_bytes)
    return int(free - promised / policy.admission.overcommit)


def in_order(policy: Policy, now_usec: int, waiting: Sequence[Waiting]) -> list[Waiting]:
    """The next to start first."""

    def key(w: Waiting) -> tuple[float, int, str]:
        aged = AGE_PRIORITY * max(0, now_usec - w.since_usec) / policy.admission.age_step
        return -(w.priority + aged), w.since_usec, w.id

    return sorted(waiting, key=key)


def admit(policy: Policy, now: Snapshot, waiting: Sequence[Waiting]) -> list[str]:
    """Ids of the calls that may start now, in this order."""
    room = free_for_admission_bytes(policy, now)
    guarantees = {s.id: s.guarantee_bytes - s.memory_bytes for s in now.sessions}
    # With nothing else under way the first one starts however large it is: no room will ever come.
    idle = not now.calls
    blocked = False
    started: list[str] = []
    for w in in_order(policy, now.now_usec, waiting):
        own = guarantees.get(w.session_id, 0)
        if w.expected_bytes <= own:
            guarantees[w.session_id] = own - w.expected_bytes
        elif is_small(policy, w.expected_bytes, now.limit_bytes):
            pass
        elif w.expected_bytes <= room and not blocked:
            room -= w.expected_bytes
        elif idle and not started:
            room -= w.expected_bytes
        else:
            half = w.since_usec + (w.deadline_usec - w.since_usec) // 2
            blocked = blocked or now.now_usec >= half
            continue
        started.append(w.id)
    return started


def estimate_usec(ahead_bytes: int, room_now_bytes: int, freed_bytes_per_s: float) -> int | None:
    """When a call may start with this much expected by those before it and itself, judged by how
    fast calls have given room back lately; None: none was."""
    short = ahead_bytes - room_now_bytes
    if short <= 0:
        return 0
    return int(short / freed_bytes_per_s * 1e6) if freed_bytes_per_s > 0 else None
