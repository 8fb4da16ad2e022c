"""The earliest end of several plans on one pool, whatever order their calls were given. Pure.

An *order* is what an all-knowing scheduler could choose: when each call begins, not before its
planned time; once begun it runs as recorded, and its agent waits for it as in a replay. No order
ends before `makespan_bound_s`, so makespan over bound is never better than makespan over the best
possible order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentcgroup_lab.trace.plan import Plan


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one session's work that every order must have somewhere.

    It begins no earlier than `release_s` after the start, lasts `length_s`, and after its end the
    session needs at least `tail_s` more. `byte_s` and `cpu_s` are what it holds and burns in all;
    `exclusive_s` is how much of it holds so much that no second such piece fits beside it.
    """

    release_s: float
    length_s: float
    tail_s: float
    byte_s: float
    cpu_s: float
    exclusive_s: float


def _exclusive_s(length_s: float, before: float, after: float, limit: float) -> float:
    """Seconds for which more than `limit` is held: growth is even over a step, a fall is at
    once."""
    if after <= limit:
        return 0.0
    if before >= after or before >= limit:
        return length_s
    return length_s * (after - limit) / (after - before)


def _agent_pieces(plan: Plan, delay_s: float) -> list[Piece]:
    """The agent holds its first level from the start on, and waits for its session's turn."""
    ends_s = [step.at_s for step in plan.agent[1:]] + [plan.duration_s]
    first = plan.agent[0].memory_bytes
    pieces = [Piece(0.0, delay_s, plan.duration_s, first * delay_s, 0.0, 0.0)]
    for step, end_s in zip(plan.agent, ends_s, strict=True):
        length_s = end_s - step.at_s
        pieces.append(
            Piece(
                release_s=delay_s + step.at_s,
                length_s=length_s,
                tail_s=plan.duration_s - end_s,
                byte_s=step.memory_bytes * length_s,
                cpu_s=step.cpu_pct / 100.0 * length_s,
                exclusive_s=0.0,
            )
        )
    return pieces


def pieces(plan: Plan, delay_s: float, pool_bytes: float) -> list[Piece]:
    """Work of a session.

    Two calls do not fit together when each holds more than half of what the lowest level of its own
    agent leaves of the pool: with agents a, b and calls x > (pool - a) / 2, y > (pool - b) / 2 the
    sum a + b + x + y is above the pool, and so is a + x + y where both are one session's.
    """
    found = _agent_pieces(plan, delay_s)
    lowest = min(step.memory_bytes for step in plan.agent)
    limit = (pool_bytes - lowest) / 2
    for call in plan.calls:
        at_s, before = call.start_s, 0
        left_s = sum(step.duration_ms for step in call.steps) / 1000.0
        # A session waits for a call that runs in the background only at its very end.
        after_s = 0.0 if call.background else max(0.0, plan.duration_s - call.end_s)
        for step in call.steps:
            length_s = step.duration_ms / 1000.0
            left_s -= length_s
            now = step.memory_bytes
            found.append(
                Piece(
                    release_s=delay_s + at_s,
                    length_s=length_s,
                    tail_s=max(0.0, left_s) + after_s,
                    byte_s=length_s * ((before + now) / 2 if now > before else now),
                    cpu_s=step.cpu_pct / 100.0 * length_s,
                    exclusive_s=_exclusive_s(length_s, before, now, limit),
                )
            )
            at_s += length_s
            before = now
    return found


def _busy_bound_s(work: Sequence[Piece], need_s: Callable[[Piece], float]) -> float:
    """The longest of (release + need + tail) over all sets of pieces that come no earlier than one
    of the releases and leave no less than one of the tails, `need_s` being how long a piece keeps
    the whole resource busy."""
    worked = [piece for piece in work if need_s(piece) > 0]
    by_tail = sorted(worked, key=lambda piece: piece.tail_s, reverse=True)
    longest_s = 0.0
    for release_s in {piece.release_s for piece in worked}:
        total_s = 0.0
        for piece in by_tail:
            if piece.release_s >= release_s:
                total_s += need_s(piece)
                longest_s = max(longest_s, release_s + total_s + piece.tail_s)
    return longest_s


def makespan_bound_s(
    plans: Sequence[Plan], delays_s: Sequence[float], pool_bytes: float, cpus: float
) -> float:
    """Give the time before which no order of the plans' calls on this pool and so many CPUs ends:
    the most of

    - the longest session: max(delay + duration);
    - memory: max over (r, q) of r + (byte seconds of all pieces released at r or later that have a
      tail of q or more) / pool + q. With r = q = 0 that is all byte seconds, agents' and calls',
      over the pool;
    - CPU: the same with CPU seconds over `cpus`;
    - calls that do not fit beside each other: the same with the time in which a call holds more
      than half of (pool - its agent's lowest level): these stretches can only come one by one.
    """
    work = list(
        itertools.chain.from_iterable(
            pieces(plan, delay_s, pool_bytes) for plan, delay_s in zip(plans, delays_s, strict=True)
        )
    )
    longest_s = max(
        delay_s + plan.duration_s for plan, delay_s in zip(plans, delays_s, strict=True)
    )
    return max(
        longest_s,
        _busy_bound_s(work, lambda piece: piece.byte_s / pool_bytes),
        _busy_bound_s(work, lambda piece: piece.cpu_s / cpus),
        _busy_bound_s(work, lambda piece: piece.exclusive_s),
    )
