"""Admission of calls that wait: `admit(policy, snapshot, waiting) -> ids`. Pure, like the engine.

Calls that say what they expect share the memory that is free, by priority and age. What running
calls are still expected to take counts as taken. A small call never waits, and neither does a call
that says nothing: it can be paused when it turns out large. No call waits for ever: age outweighs
priority in time, and once the first in the queue has waited for half of its time, no large call
passes it.

Sessions take turns: of each only the first call ages, from when its session last had its turn. So
a session that has many calls in the queue delays another one by a single call. A session that holds
calls without using them has had its turn just now.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentcgroupd.policy.engine import resume_free_bytes
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Snapshot

AGE_PRIORITY = 10
"""Steps of priority that a call gains for each `age_step` of waiting. A batch call (20) that has
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
    """Tell whether a call starts at once, however little is free."""
    return expected_bytes <= policy.admission.small.of(limit_bytes)


def free_for_admission_bytes(policy: Policy, now: Snapshot) -> int:
    """Return the bytes that calls that begin now may be expected to take: what is free, less
    what has to be free for paused calls to go on, less what open calls are still to take."""
    promised = sum(max(0, c.expected_bytes - c.memory_bytes) for c in now.calls)
    free = now.free_bytes - resume_free_bytes(policy, now.limit_bytes)
    return int(free - promised / policy.admission.overcommit)


Turns = Mapping[str, int]
"""By session: when a call of it that had waited was last let in, on the snapshot's clock."""


def in_order(
    policy: Policy, now_usec: int, waiting: Sequence[Waiting], turns: Turns | None = None
) -> list[Waiting]:
    """Return the waiting calls, the next to start first. `now_usec`: on the snapshot's clock."""

    def key(call: Waiting, since_usec: int) -> tuple[float, int, str]:
        waited_usec = max(0, now_usec - since_usec)
        aged = AGE_PRIORITY * waited_usec / policy.admission.age_step
        return -(call.priority + aged), call.since_usec, call.id

    lines: dict[str, list[Waiting]] = {}
    for call in sorted(waiting, key=lambda call: key(call, call.since_usec), reverse=True):
        lines.setdefault(call.session_id, []).append(call)
    turns = turns or {}
    heads = []
    for session_id, line in lines.items():
        first = line.pop()
        since_usec = max(first.since_usec, turns.get(session_id, 0))
        heads.append((key(first, since_usec), first, line))
    heapq.heapify(heads)
    order = []
    while heads:
        _, first, line = heads[0]
        order.append(first)
        if not line:
            heapq.heappop(heads)
            continue
        following = line.pop()
        heapq.heapreplace(heads, (key(following, now_usec), following, line))
    return order


def admit(
    policy: Policy, now: Snapshot, waiting: Sequence[Waiting], turns: Turns | None = None
) -> list[str]:
    """Return the ids of the calls that may start now, in this order."""
    free = free_for_admission_bytes(policy, now)
    guaranteed = {s.id: s.guarantee_bytes - s.memory_bytes for s in now.sessions}
    # In an idle pool the first call starts however large it is: no call will give memory back.
    idle = not now.calls
    blocked = False
    started: list[str] = []
    for call in in_order(policy, now.now_usec, waiting, turns):
        expected, left = call.expected_bytes, guaranteed.get(call.session_id, 0)
        fits = expected <= free and not blocked
        if expected <= left:
            guaranteed[call.session_id] = left - expected
        elif is_small(policy, expected, now.limit_bytes):
            pass
        elif fits or (idle and not started):
            free -= expected
        else:
            since_usec = max(call.since_usec, (turns or {}).get(call.session_id, 0))
            half_usec = since_usec + (call.deadline_usec - call.since_usec) // 2
            blocked = blocked or now.now_usec >= half_usec
            continue
        started.append(call.id)
    return started


def estimate_usec(ahead_bytes: int, free_bytes: int, freed_bytes_per_s: float) -> int | None:
    """Return in how many microseconds a call may start; None where no call gave memory back lately.

    `ahead_bytes`: what the call and those before it expect. `free_bytes`: what is free for
    admission. `freed_bytes_per_s`: how fast calls have given memory back lately.
    """
    short = ahead_bytes - free_bytes
    if short <= 0:
        return 0
    return int(short / freed_bytes_per_s * 1e6) if freed_bytes_per_s > 0 else None
