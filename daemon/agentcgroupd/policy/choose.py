"""The rungs of the ladder: who is acted on, once a ruleset says that it is time.

Each chooser gets the situation and its ruleset, and names calls or sessions with a reason in words
and numbers. What was chosen by an earlier ruleset on the same look is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from agentcgroupd.policy.headroom import DENIED_SLACK_BYTES, GROWING_BYTES_PER_S, Situation
from agentcgroupd.policy.schema import (
    Deny,
    Freeze,
    Kill,
    PoolFree,
    Reclaim,
    Ruleset,
    Slow,
    Throttle,
)
from agentcgroupd.policy.snapshot import Action, CallView, Decision, Host
from agentcgroupd.units import show_bytes, show_usec

RECLAIM_LEAST_BYTES = 1 << 20
"""Less is not worth a walk through a cgroup's pages."""
REFUSED_ENOUGH = 1000
"""A call that goes on asking after so many refusals will not take no for an answer: it only burns
CPU time, and is paused until there is room."""
KILL_LEAST_BYTES = 16 << 20
KILL_LEAST_SHARE = 0.01
"""Ending a call that holds less than this, of the pool at most, frees nothing that matters."""
KILL_SHARE = 0.5
"""What the leader may still need is taken as what half of the calls like it took."""
KILL_STALLED = 0.3
"""Of the time spent in waiting for memory: in a pool that is full to the last page nobody grows any
more, whoever needs to."""
WORK_USEC = 1_000_000
"""Added to the CPU time of a call when its loss is weighed: a start has a price of its own."""

Chooser = Callable[[Situation, Ruleset, Any, Set[str]], list[Decision]]


def mark_bytes(ruleset: Ruleset, limit_bytes: int) -> int:
    """Free memory below which this ruleset wants growth to stop; 0: it does not say."""
    marks = [d.below.of(limit_bytes) for d in ruleset.when if isinstance(d, PoolFree)]
    return max(marks, default=0)


def _stoppable(at: Situation, ruleset: Ruleset, taken: Set[str]) -> list[CallView]:
    """Growing calls other than the leader, the least important and the fastest growing first; while
    only room is short, not the one that it is kept for first, and none of the small ones."""
    spared = ruleset.spare_priority
    only_room = at.now.free_bytes >= mark_bytes(ruleset, at.now.limit_bytes) > 0
    exempt = {c.id for c in ((at.leader, at.heir) if only_room else (at.leader,)) if c}
    least = at.small_bytes if only_room else 0
    found = [
        c for c in at.growing
        if c.id not in exempt and c.id not in taken
        and c.priority < spared and c.memory_bytes >= least
    ]  # fmt: skip
    return sorted(found, key=lambda c: (c.priority, -c.growth_bytes_per_s, -c.began_usec, c.id))


def _until_it_fits(
    at: Situation, ruleset: Ruleset, calls: list[CallView], decide: Callable[[CallView], Decision]
) -> list[Decision]:
    """One after the other, at least one, until what still grows fits into what is left."""
    now = at.now
    lookahead_s = at.policy.headroom.lookahead / 1e6
    left = now.free_bytes - mark_bytes(ruleset, now.limit_bytes) - at.room_bytes
    growth = at.growth_bytes_per_s
    decisions: list[Decision] = []
    for call in calls:
        if decisions and growth * lookahead_s <= left:
            break
        decisions.append(decide(call))
        growth -= call.growth_bytes_per_s
    return decisions


def _shortage(at: Situation, call: CallView) -> str:
    now = at.now
    return (
        f"{show_bytes(max(0, now.free_bytes))} of the pool's {show_bytes(now.limit_bytes)} are "
        f"left and this call grows by {show_bytes(call.growth_bytes_per_s)} a second"
        f"{at.more_important(call)}."
    )


def _denied_enough(call: CallView) -> bool:
    """Its growth is denied, and that holds."""
    return call.denied_growth_bytes is not None and call.denied_growth_bytes <= DENIED_SLACK_BYTES


def _obstinate(at: Situation, ruleset: Ruleset, taken: Set[str]) -> list[Decision]:
    """Calls that retry for ever what they are refused."""
    return [Decision(
        Action.FREEZE, call.id,
        f"Paused: memory was refused to it {call.refused_requests} times and it goes on asking. It "
        f"goes on by itself when there is room{at.more_important(call)}.",
    ) for call in at.running
      if call.denied_growth_bytes is not None and call.refused_requests >= REFUSED_ENOUGH
      and call is not at.leader and call.id not in taken
      and call.priority < ruleset.spare_priority]  # fmt: skip


def can_throttle(host: Host, do: Throttle) -> bool:
    """Whether there is a way to slow a call's growth here that is no standstill."""
    return not do.needs_swap or host.swap_free_bytes > 0 or host.can_penalize


def throttle(at: Situation, ruleset: Ruleset, do: Throttle, taken: Set[str]) -> list[Decision]:
    """Growing calls go on, at the pace at which their own cold pages leave; or, where those can go
    nowhere, with less CPU time the more they grow."""
    if not can_throttle(at.now.host, do):
        return []
    by_cpu = do.needs_swap and at.now.host.swap_free_bytes <= 0
    how = (
        "with less CPU time the more it grows beyond that" if by_cpu else
        "more memory comes at the pace at which what it does not touch is swapped out"
    )  # fmt: skip
    slack = do.slack.of(at.now.limit_bytes)
    calls = [c for c in _stoppable(at, ruleset, taken)
             if c.throttled_growth_bytes is None and not _denied_enough(c)]  # fmt: skip
    return _until_it_fits(at, ruleset, calls, lambda call: Decision(
        Action.THROTTLE, call.id,
        f"Slowed at {show_bytes(call.memory_bytes + slack)}: {_shortage(at, call)} It goes on; "
        f"{how}.",
        amount=slack, by_cpu=by_cpu,
    ))  # fmt: skip


def deny(at: Situation, ruleset: Ruleset, do: Deny, taken: Set[str]) -> list[Decision]:
    """What growing calls ask for is refused; they live."""
    if not at.now.host.can_deny:
        return []
    calls = [c for c in _stoppable(at, ruleset, taken)
             if c.denied_growth_bytes is None
             and (do.whom == "all" or c.on_pressure == "deny")]  # fmt: skip
    return _until_it_fits(at, ruleset, calls, lambda call: Decision(
        Action.DENY, call.id,
        f"No more memory for now: {_shortage(at, call)} What it asks for is refused (ENOMEM, "
        "MemoryError) until there is room; work in smaller parts, or try again later.",
    ))  # fmt: skip


def freeze(at: Situation, ruleset: Ruleset, do: Freeze, taken: Set[str]) -> list[Decision]:
    """Growing calls are paused; nothing of theirs is lost."""
    del do
    calls = [c for c in _stoppable(at, ruleset, taken) if not _denied_enough(c)]
    obstinate = _obstinate(at, ruleset, {*taken, *(c.id for c in calls)})
    return obstinate + _until_it_fits(at, ruleset, calls, lambda call: Decision(
        Action.FREEZE, call.id,
        f"Paused: {_shortage(at, call)} It goes on by itself; nothing is lost.",
    ))  # fmt: skip


def reclaim(at: Situation, ruleset: Ruleset, do: Reclaim, taken: Set[str]) -> list[Decision]:
    """Cold memory of those who do not run."""
    host = at.now.host
    if not host.can_reclaim:
        return []
    if do.whom == "cache":
        return _reclaim_cache(at, do)
    if host.swap_free_bytes <= 0:
        return []  # what does not run holds anonymous memory, which can go nowhere
    return (_reclaim_waiting if do.whom == "waiting" else _reclaim_frozen)(at, ruleset, do, taken)


def _reclaim_cache(at: Situation, do: Reclaim) -> list[Decision]:
    """Of the pool as a whole: file pages that nobody has touched for long."""
    now = at.now
    amount = min(do.step.of(now.limit_bytes), now.cache_bytes)
    if amount < RECLAIM_LEAST_BYTES:
        return []
    return [Decision(
        Action.RECLAIM, "",
        f"{show_bytes(amount)} of {show_bytes(now.cache_bytes)} of cold file cache given back.",
        amount=amount,
    )]  # fmt: skip


def _reclaim_waiting(
    at: Situation, ruleset: Ruleset, do: Reclaim, taken: Set[str]
) -> list[Decision]:
    decisions = []
    step = do.step.of(at.now.limit_bytes)
    left = at.now.host.swap_free_bytes
    sessions = [s for s in at.now.sessions
                if s.waiting_usec >= do.waiting_for and s.priority < ruleset.spare_priority
                and s.id not in taken and s.refaults_per_s <= do.refaults_per_s
                and (s.reclaimed_usec is None or s.reclaimed_usec >= do.every)]  # fmt: skip
    for session in sorted(sessions, key=lambda s: (s.priority, -s.agent_bytes, s.id)):
        amount = min(step, session.agent_bytes - session.guarantee_bytes, left)
        if amount < RECLAIM_LEAST_BYTES:
            continue
        left -= amount
        decisions.append(Decision(
            Action.RECLAIM, session.id,
            f"{show_bytes(amount)} of memory that the agent has not touched is moved to swap: it "
            f"has waited for {show_usec(session.waiting_usec)}, and "
            f"{show_bytes(max(0, at.now.free_bytes))} of the pool are left.",
            amount=amount,
        ))  # fmt: skip
    return decisions


def _reclaim_frozen(
    at: Situation, ruleset: Ruleset, do: Reclaim, taken: Set[str]
) -> list[Decision]:
    """The last to go on first."""
    decisions: list[Decision] = []
    left = min(do.step.of(at.now.limit_bytes), at.now.host.swap_free_bytes)
    busy = {s.id for s in at.now.sessions
            if s.reclaimed_usec is not None and s.reclaimed_usec < do.every} | taken  # fmt: skip
    for call in reversed(at.frozen):
        amount = min(call.memory_bytes, left)
        if call.session_id in busy or amount < RECLAIM_LEAST_BYTES:
            continue
        left -= amount
        busy.add(call.session_id)
        decisions.append(Decision(
            Action.RECLAIM, call.session_id,
            f"{show_bytes(amount)} of the paused call {call.name!r} is moved to swap until it goes "
            "on.",
            amount=amount, calls=(call.id,),
        ))  # fmt: skip
    return decisions


def slow(at: Situation, ruleset: Ruleset, do: Slow, taken: Set[str]) -> list[Decision]:
    """Sessions that would only reclaim with it get less CPU."""
    return [Decision(
        Action.SLOW, s.id,
        f"Less CPU for now ({do.percent} % of its weight): {100 * s.stalled_share:.0f} % of the "
        "last moment went into waiting for memory.",
        amount=do.percent,
    ) for s in at.now.sessions
      if not s.slowed and s.stalled_share > do.above and s.priority < ruleset.spare_priority
      and s.id not in taken]  # fmt: skip


def kill(at: Situation, ruleset: Ruleset, do: Kill, taken: Set[str]) -> list[Decision]:
    """Last: the leader still grows into what others hold. One call goes, the least important, and
    among equals the one that frees the most memory for each second of work lost. Where only its
    equals are left, and calls like it took more than all of them hold, the leader itself goes:
    ending them would be in vain."""
    del do
    leader, now = at.leader, at.now
    if leader is None or leader.frozen_for_usec is not None:
        return []
    stalled = (now.stalled_share or 0.0) > KILL_STALLED
    if at.growth_bytes_per_s <= GROWING_BYTES_PER_S and not stalled:
        return []  # full, but nobody needs more
    least = min(KILL_LEAST_BYTES, int(now.limit_bytes * KILL_LEAST_SHARE))
    candidates = [c for c in now.calls
                  if c is not leader and c.priority <= leader.priority and c.memory_bytes >= least
                  and c.priority < ruleset.spare_priority and c.id not in taken]  # fmt: skip
    may_go = leader.priority < ruleset.spare_priority and leader.id not in taken
    if may_go and all(c.priority == leader.priority for c in candidates):
        peak = now.likely_peak(leader.memory_bytes, KILL_SHARE) or 0
        peak = min(peak, leader.memory_max_bytes or peak)
        missing = peak - leader.memory_bytes - max(0, now.free_bytes)
        if sum(c.memory_bytes for c in candidates) < missing and leader.memory_bytes >= least:
            candidates = [leader]
    if not candidates:
        return []
    victim = min(candidates, key=lambda c: (
        c.priority, c.on_pressure != "kill", -c.memory_bytes / (c.cpu_usec + WORK_USEC), c.id,
    ))  # fmt: skip
    return [Decision(
        Action.KILL, victim.id,
        f"Stopped: the pool of {show_bytes(now.limit_bytes)} was full, {leader.name!r} could not "
        f"go on, and this call held {show_bytes(victim.memory_bytes)} with the least work to lose "
        f"({show_usec(victim.cpu_usec)} of CPU time). Try again later, or with less memory.",
    )]  # fmt: skip


CHOOSERS: dict[str, Chooser] = {
    "reclaim": reclaim,
    "throttle": throttle,
    "deny": deny,
    "freeze": freeze,
    "kill": kill,
    "slow": slow,
}
