"""Which calls of the recordings the demo keeps: the largest of each session, and those beside it
that fit into the pool whatever runs at the same time.

Two large calls of which neither can go on until the other has ended are more than any daemon can
bring through: one of them has to be killed. The demo shows what can be brought through, so what
else is large is left out, and the time that the agent waited for it is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from agentcgroup_lab.trace.plan import Plan, PlannedCall

GAP_S = 3.0
"""Recorded seconds that an agent thinks at most where calls were left out."""


def largest(plan: Plan) -> PlannedCall:
    """The call that holds most."""
    return max(plan.calls, key=lambda call: call.peak_bytes)


def most_kept(plans: Sequence[Plan], room_bytes: int) -> list[int]:
    """How large the other calls of each session may be, in bytes.

    `room_bytes`: what the pool has beside the agents. Calls are let in from the smallest, as long
    as the largest that each session has beside its largest one fit, together, beside the largest
    of any other session.
    """
    peaks = [largest(plan) for plan in plans]
    calls = [
        (call.peak_bytes, session)
        for session, (plan, peak) in enumerate(zip(plans, peaks, strict=True))
        for call in plan.calls
        if call is not peak
    ]
    most = [0] * len(plans)
    for size, session in sorted(calls):
        tried = [*most]
        tried[session] = size
        beside = [
            peak.peak_bytes + sum(tried[:index]) + sum(tried[index + 1 :])
            for index, peak in enumerate(peaks)
        ]
        if max(beside) <= room_bytes:
            most = tried
    return most


def steady(plan: Plan) -> Plan:
    """Have the agent hold from the start what it ever holds. Nobody can stop an agent: one that
    grows while the calls fill the pool costs one of them, whoever watches."""
    most = plan.agent_peak_bytes
    return replace(plan, agent=tuple(replace(step, memory_bytes=most) for step in plan.agent))


def trimmed(plan: Plan, most_bytes: int, after_bytes: int | None = None) -> Plan:
    """Leave out the calls that are larger, but for the largest of all, and cut the gaps.

    `after_bytes`: how large those may be that begin after it; None: as the others.
    """
    peak = largest(plan)
    most_after = most_bytes if after_bytes is None else min(most_bytes, after_bytes)
    kept = [
        call
        for call in plan.calls
        if call is peak
        or call.peak_bytes <= (most_after if call.start_s > peak.start_s else most_bytes)
    ]
    gap_s = GAP_S / plan.options.speed
    ends = itertools.accumulate((call.end_s for call in kept), max, initial=0.0)
    starts = [*(call.start_s for call in kept), plan.duration_s]
    # (where a gap is over, how much of it is cut)
    cuts = [
        (start_s, start_s - end_s - gap_s)
        for end_s, start_s in zip(ends, starts, strict=True)
        if start_s - end_s > gap_s
    ]

    def moved(at_s: float) -> float:
        later = sum(cut_s for over_s, cut_s in cuts if over_s <= at_s)
        inside = max(
            (cut_s - (over_s - at_s) for over_s, cut_s in cuts if over_s > at_s), default=0.0
        )
        return round(at_s - later - max(0.0, inside), 3)

    calls = tuple(
        replace(
            call,
            index=index,
            start_s=moved(call.start_s),
            end_s=moved(call.start_s) + call.end_s - call.start_s,
        )
        for index, call in enumerate(kept)
    )
    return replace(
        plan,
        duration_s=moved(plan.duration_s),
        agent=tuple(replace(step, at_s=moved(step.at_s)) for step in plan.agent),
        calls=calls,
        calls_left_out=plan.calls_left_out + len(plan.calls) - len(kept),
    )
