"""Action choosers: who is acted on, once a ruleset says that it is time.

Each chooser takes the headroom, its ruleset, the ruleset's action and the ids that earlier rulesets
have chosen for the same snapshot, which are left alone. It returns decisions on calls or sessions,
each with its reason in words and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from typing import Any

from agentcgroupd.policy.headroom import (
    DENIED_SLACK_BYTES,
    GROWING_BYTES_PER_S,
    Headroom,
    lead_of,
)
from agentcgroupd.policy.schema import (
    Deny,
    Freeze,
    IoMax,
    IoWeight,
    Kill,
    PoolFree,
    Reclaim,
    Ruleset,
    Slow,
    Throttle,
)
from agentcgroupd.policy.snapshot import (
    Action,
    CallIo,
    CallView,
    Decision,
    Host,
    SessionView,
    Snapshot,
)
from agentcgroupd.units import IMPORTANT_PRIORITY, show_bytes, show_usec

RECLAIM_LEAST_BYTES = 1 << 20
"""Least amount that is worth a walk through a cgroup's pages."""
REFUSED_ENOUGH = 1000
"""Refusals after which a call that still asks for memory is paused: it only burns CPU time."""
KILL_LEAST_BYTES = 16 << 20
KILL_LEAST_SHARE = 0.01
"""Least that a call must hold to be ended: KILL_LEAST_BYTES, or this part of a small pool. Ending a
smaller one frees nothing that matters."""
KILL_SHARE = 0.5
"""The leader is taken to reach what this part of the calls like it stayed below, when it is asked
whether ending all others would be enough."""
KILL_STALLED = 0.3
"""A pool is stuck when more than this part of the time goes into waiting for memory. In a pool that
is full to the last page no call grows any more, though calls need to."""
WORK_USEC = 1_000_000
"""Added to a call's CPU time when the loss of its work is weighed: a start costs something too."""

Chooser = Callable[[Headroom, Ruleset, Any, Set[str]], list[Decision]]


def hold_below_free_bytes(ruleset: Ruleset, limit_bytes: int) -> int:
    """Return the free bytes below which a ruleset wants growth held back; 0: it does not say."""
    amounts = [d.below.of(limit_bytes) for d in ruleset.when if isinstance(d, PoolFree)]
    return max(amounts, default=0)


def _spared(subject: CallView | SessionView | CallIo, ruleset: Ruleset, taken: Set[str]) -> bool:
    """Tell whether a call or session is left alone for its priority, or because it was chosen."""
    return subject.priority >= ruleset.spare_priority or subject.id in taken


# Calls that grow


def _may_be_held(headroom: Headroom, ruleset: Ruleset, taken: Set[str]) -> list[CallView]:
    """Return the growing calls that may be held back: the least important first, among equals
    the fastest growing.

    The leader is never among them. While there is enough free memory and only the reserve is short,
    small calls are left alone, and so is the call that is to finish first.
    """
    now = headroom.now
    only_reserve_short = now.free_bytes >= hold_below_free_bytes(ruleset, now.limit_bytes) > 0
    exempt = [headroom.leader, headroom.next_to_finish] if only_reserve_short else [headroom.leader]
    exempt_ids = {c.id for c in exempt if c is not None}
    if now.credit_bytes is not None and now.free_bytes >= _hold_bytes(headroom):
        return []  # What calls may take without asking leaves the reserve free as it is.
    least_bytes = headroom.small_bytes if only_reserve_short else 0
    found = [
        c
        for c in headroom.growing
        if c.frozen_for_usec is None
        and c.id not in exempt_ids
        and c.memory_bytes >= least_bytes
        and not _spared(c, ruleset, taken)
    ]
    return sorted(found, key=lambda c: (c.priority, -c.growth_bytes_per_s, -c.began_usec, c.id))


def _hold_bytes(headroom: Headroom) -> int:
    """Return the free bytes below which any ruleset pauses calls or denies them growth."""
    rules = (r for r in headroom.policy.rulesets if r.enabled and r.do.action in ("freeze", "deny"))
    return max((hold_below_free_bytes(r, headroom.now.limit_bytes) for r in rules), default=0)


def _until_it_fits(headroom: Headroom, ruleset: Ruleset, calls: list[CallView]) -> list[CallView]:
    """Return the first of `calls`, at least one, without whose growth the rest of the growth fits
    into the free memory, less what the ruleset wants free and the reserve."""
    now = headroom.now
    lookahead_s = headroom.settings.lookahead / 1e6
    left = now.free_bytes - hold_below_free_bytes(ruleset, now.limit_bytes) - headroom.reserve_bytes
    growth = headroom.growth_bytes_per_s
    chosen: list[CallView] = []
    for call in calls:
        if chosen and growth * lookahead_s <= left:
            break
        chosen.append(call)
        growth -= call.growth_bytes_per_s
    return chosen


def _shortage(headroom: Headroom, call: CallView) -> str:
    now = headroom.now
    return (
        f"{show_bytes(max(0, now.free_bytes))} of the pool's {show_bytes(now.limit_bytes)} are "
        f"left and this call grows by {show_bytes(call.growth_bytes_per_s)} a second"
        f"{_while_leader(headroom, call)}."
    )


def _while_leader(headroom: Headroom, call: CallView) -> str:
    """Say why this call waits and not the leader; nothing where no other call leads."""
    leader = headroom.leader
    if leader is None or leader.id == call.id:
        return ""
    return f", while {leader.name!r} is {lead_of(leader, call)}"


def _denied_enough(call: CallView) -> bool:
    """Tell whether a call's growth is denied, and that holds."""
    return call.denied_growth_bytes is not None and call.denied_growth_bytes <= DENIED_SLACK_BYTES


def _keeps_retrying(call: CallView) -> bool:
    """Tell whether a call whose growth is denied asks again and again."""
    return call.denied_growth_bytes is not None and call.refused_requests >= REFUSED_ENOUGH


def can_throttle(host: Host, do: Throttle) -> bool:
    """Tell whether this host can slow a call's growth without bringing it to a standstill."""
    return not do.needs_swap or host.swap_free_bytes > 0 or host.can_penalize


def throttle(headroom: Headroom, ruleset: Ruleset, do: Throttle, taken: Set[str]) -> list[Decision]:
    """Slow growing calls to the pace at which their own cold pages leave; without swap, give them
    less CPU time the more they grow."""
    host = headroom.now.host
    if not can_throttle(host, do):
        return []
    by_cpu = do.needs_swap and host.swap_free_bytes <= 0
    if by_cpu:
        how = "with less CPU time the more it grows beyond that"
    else:
        how = "more memory comes at the pace at which what it does not touch is swapped out"
    slack = do.slack.of(headroom.now.limit_bytes)
    calls = [
        c
        for c in _may_be_held(headroom, ruleset, taken)
        if c.throttled_growth_bytes is None and not _denied_enough(c)
    ]
    decisions = []
    for call in _until_it_fits(headroom, ruleset, calls):
        mark = show_bytes(call.memory_bytes + slack)
        why = f"Slowed at {mark}: {_shortage(headroom, call)} It goes on; {how}."
        decisions.append(Decision(Action.THROTTLE, call.id, why, amount=slack, by_cpu=by_cpu))
    return decisions


def deny(headroom: Headroom, ruleset: Ruleset, do: Deny, taken: Set[str]) -> list[Decision]:
    """Refuse what growing calls ask for; the calls live on."""
    if not headroom.now.host.can_deny:
        return []
    calls = [
        c
        for c in _may_be_held(headroom, ruleset, taken)
        if c.denied_growth_bytes is None and (do.whom == "all" or c.on_pressure == "deny")
    ]
    decisions = []
    for call in _until_it_fits(headroom, ruleset, calls):
        why = (
            f"No more memory for now: {_shortage(headroom, call)} What it asks for is refused "
            "(ENOMEM, MemoryError) until there is room; work in smaller parts, or try again later."
        )
        decisions.append(Decision(Action.DENY, call.id, why))
    return decisions


def freeze(headroom: Headroom, ruleset: Ruleset, do: Freeze, taken: Set[str]) -> list[Decision]:
    """Pause growing calls, which lose nothing, and calls that do not take no for an answer."""
    del do
    calls = [
        c
        for c in _may_be_held(headroom, ruleset, taken)
        if not _denied_enough(c) and headroom.may_pause(c)
    ]
    considered = {*taken, *(c.id for c in calls)}
    decisions = []
    for call in headroom.running:
        if call is headroom.leader or _spared(call, ruleset, considered):
            continue
        if _keeps_retrying(call) and headroom.may_pause(call):
            why = (
                f"Paused: memory was refused to it {call.refused_requests} times and it goes on "
                "asking. It goes on by itself when there is room"
                f"{_while_leader(headroom, call)}."
            )
            decisions.append(Decision(Action.FREEZE, call.id, why))
    for call in _until_it_fits(headroom, ruleset, calls):
        why = f"Paused: {_shortage(headroom, call)} It goes on by itself; nothing is lost."
        decisions.append(Decision(Action.FREEZE, call.id, why))
    return decisions


# Cold memory, and the CPU time of sessions


def reclaim(headroom: Headroom, ruleset: Ruleset, do: Reclaim, taken: Set[str]) -> list[Decision]:
    """Take back cold memory: of waiting agents, of paused calls, or the pool's file cache."""
    host = headroom.now.host
    if not host.can_reclaim:
        return []
    if do.whom == "cache":
        return _reclaim_cache(headroom, do)
    if host.swap_free_bytes <= 0:
        return []  # The others hold anonymous memory, which can only go to swap.
    if do.whom == "waiting":
        return _reclaim_waiting(headroom, ruleset, do, taken)
    return _reclaim_frozen(headroom, do, taken)


def _reclaim_cache(headroom: Headroom, do: Reclaim) -> list[Decision]:
    now = headroom.now
    amount = min(do.step.of(now.limit_bytes), now.cache_bytes)
    if amount < RECLAIM_LEAST_BYTES:
        return []
    why = f"{show_bytes(amount)} of {show_bytes(now.cache_bytes)} of cold file cache given back."
    return [Decision(Action.RECLAIM, "", why, amount=amount)]


def _reclaim_waiting(
    headroom: Headroom, ruleset: Ruleset, do: Reclaim, taken: Set[str]
) -> list[Decision]:
    """Take from the least important and largest agents first, as long as swap is free."""
    now = headroom.now
    sessions = [
        s
        for s in now.sessions
        if s.waiting_usec >= do.waiting_for
        and s.refaults_per_s <= do.refaults_per_s
        and not _reclaimed_lately(s, do)
        and not _spared(s, ruleset, taken)
    ]
    decisions = []
    step = do.step.of(now.limit_bytes)
    left = now.host.swap_free_bytes
    for session in sorted(sessions, key=lambda s: (s.priority, -s.agent_bytes, s.id)):
        amount = min(step, session.agent_bytes - session.guarantee_bytes, left)
        if amount < RECLAIM_LEAST_BYTES:
            continue
        left -= amount
        why = (
            f"{show_bytes(amount)} of memory that the agent has not touched is moved to swap: it "
            f"has waited for {show_usec(session.waiting_usec)}, and "
            f"{show_bytes(max(0, now.free_bytes))} of the pool are left."
        )
        decisions.append(Decision(Action.RECLAIM, session.id, why, amount=amount))
    return decisions


def _reclaimed_lately(session: SessionView, do: Reclaim) -> bool:
    return session.reclaimed_usec is not None and session.reclaimed_usec < do.every


def _reclaim_frozen(headroom: Headroom, do: Reclaim, taken: Set[str]) -> list[Decision]:
    """Take from the paused call that is to go on last first, and from one call of a session."""
    now = headroom.now
    decisions = []
    left = min(do.step.of(now.limit_bytes), now.host.swap_free_bytes)
    busy = {*taken, *(s.id for s in now.sessions if _reclaimed_lately(s, do))}
    for call in reversed(headroom.frozen):
        amount = min(call.memory_bytes, left)
        if call.session_id in busy or amount < RECLAIM_LEAST_BYTES:
            continue
        left -= amount
        busy.add(call.session_id)
        why = (
            f"{show_bytes(amount)} of the paused call {call.name!r} is moved to swap until it goes "
            "on."
        )
        decisions.append(
            Decision(Action.RECLAIM, call.session_id, why, amount=amount, calls=(call.id,))
        )
    return decisions


def slow(headroom: Headroom, ruleset: Ruleset, do: Slow, taken: Set[str]) -> list[Decision]:
    """Give less CPU time to sessions that would only spend it on reclaim."""
    decisions = []
    for session in headroom.now.sessions:
        stalled = not session.slowed and session.stalled_share > do.above
        if not stalled or _spared(session, ruleset, taken):
            continue
        why = (
            f"Less CPU for now ({do.percent} % of its weight): {100 * session.stalled_share:.0f} % "
            "of the last moment went into waiting for memory."
        )
        decisions.append(Decision(Action.SLOW, session.id, why, amount=do.percent))
    return decisions


# Disks

IO_SHARE = 0.5
"""Part of what all calls read and write that is held back at a time, at least."""
IO_ALIKE = 0.25
"""Calls of one priority that use so much of what the heaviest of them does go with it: of ten that
are alike, the last would be held back seconds after the first, and use what was left meanwhile. In
half a second of a slow disk, calls that are alike were seen to differ by a half."""


def _heaviest(headroom: Headroom, ruleset: Ruleset, least: int, taken: Set[str]) -> list[CallIo]:
    """Return the least important calls, among equals those that use disks most, which together make
    a good part of all use, and those like the last of them."""
    calls = headroom.now.io_calls
    found = [c for c in calls if c.bytes_per_s >= least and not _spared(c, ruleset, taken)]
    found.sort(key=lambda c: (c.priority, -c.bytes_per_s, c.id))
    enough = IO_SHARE * sum(c.bytes_per_s for c in calls)
    chosen: list[CallIo] = []
    heaviest: dict[int, float] = {}
    for call in found:
        has_enough = chosen and sum(c.bytes_per_s for c in chosen) >= enough
        if has_enough and call.bytes_per_s < IO_ALIKE * heaviest.get(call.priority, math.inf):
            break
        heaviest.setdefault(call.priority, call.bytes_per_s)
        chosen.append(call)
    return chosen


def _busy(call: CallIo) -> str:
    return (
        "more important work waits for disks, and this call reads and writes "
        f"{show_bytes(call.bytes_per_s)} a second"
    )


def _weight_helps(now: Snapshot) -> set[str]:
    """Return the ids of calls whose weight counts beside what important work does: of those that
    are in its sessions."""
    if not now.host.has_io_weight:
        return set()
    important = {s.id for s in now.sessions if s.priority >= IMPORTANT_PRIORITY}
    return {call.id for call in now.io_calls if call.session_id in important}


def io_weight(
    headroom: Headroom, ruleset: Ruleset, do: IoWeight, taken: Set[str]
) -> list[Decision]:
    """Give calls that use disks most a smaller share of them, where that helps: their weight counts
    beside other calls of their session alone."""
    helped = _weight_helps(headroom.now)
    left = {
        c.id
        for c in headroom.now.io_calls
        if c.weight_lowered_usec is not None or c.id not in helped
    }
    return [
        Decision(
            Action.IO_WEIGHT,
            call.id,
            f"A smaller share of disks for now ({do.percent} % of its weight): {_busy(call)}.",
            amount=do.percent,
        )
        for call in _heaviest(headroom, ruleset, do.least, {*taken, *left})
    ]


def io_max(headroom: Headroom, ruleset: Ruleset, do: IoMax, taken: Set[str]) -> list[Decision]:
    """Hold calls that use disks most to a part of what they do. Where their weights help and a
    ruleset lowers them, those come first."""
    now = headroom.now
    if not now.host.has_io_max:
        return []
    weighed = any(r.enabled and r.do.action == "io_weight" for r in headroom.policy.rulesets)
    first = _weight_helps(now) if weighed else set()
    left = {
        c.id
        for c in now.io_calls
        if c.held_usec is not None or (c.id in first and c.weight_lowered_usec is None)
    }
    decisions = []
    for call in _heaviest(headroom, ruleset, do.least, {*taken, *left}):
        rate = max(do.floor, int(call.bytes_per_s * do.percent / 100))
        why = f"Held to {show_bytes(rate)} a second of each disk for now: {_busy(call)}."
        decisions.append(Decision(Action.IO_MAX, call.id, why, amount=rate))
    return decisions


# Ending a call


def kill(headroom: Headroom, ruleset: Ruleset, do: Kill, taken: Set[str]) -> list[Decision]:
    """End one call where the leader cannot go on."""
    del do
    leader, now = headroom.leader, headroom.now
    if leader is None or leader.frozen_for_usec is not None or not _more_is_needed(headroom):
        return []
    victim = victim_of(headroom, leader, ruleset, taken)
    if victim is None:
        return []
    why = (
        f"Stopped: the pool of {show_bytes(now.limit_bytes)} was full, {leader.name!r} could not "
        f"go on, and this call held {show_bytes(victim.memory_bytes)} with the least work to lose "
        f"({show_usec(_work_usec(now, victim))} of CPU time). Try again later, or with less memory."
    )
    return [Decision(Action.KILL, victim.id, why)]


def _more_is_needed(headroom: Headroom) -> bool:
    """Tell whether the pool still grows or stalls; a pool that is only full harms nobody."""
    stalled = (headroom.now.stalled_share or 0.0) > KILL_STALLED
    grows = headroom.unheld_growth_bytes_per_s > GROWING_BYTES_PER_S
    return stalled or headroom.starves_unheld or grows


def victim_of(
    headroom: Headroom, leader: CallView, ruleset: Ruleset, taken: Set[str]
) -> CallView | None:
    """Return the call whose end helps the leader at the least loss; None where there is none.

    The victim is the least important call, among equals one that asked for it (`on_pressure =
    "kill"`), then the one that frees most memory for each second of work lost. The leader itself is
    the victim where only calls as important as it could go and even all of them would not be
    enough.
    """
    least_bytes = kill_least_bytes(headroom.now.limit_bytes)
    large = [c for c in headroom.now.calls if c.memory_bytes >= least_bytes]
    may_go = [c for c in large if not _spared(c, ruleset, taken)]
    others = [c for c in may_go if c is not leader and c.priority <= leader.priority]
    if leader in may_go and _others_are_too_small(headroom, leader, others):
        return leader
    return min(others, key=lambda c: _loss(headroom.now, c), default=None)


def kill_least_bytes(limit_bytes: int) -> int:
    """Return the least that a call must hold to be ended."""
    return min(KILL_LEAST_BYTES, int(limit_bytes * KILL_LEAST_SHARE))


def _others_are_too_small(headroom: Headroom, leader: CallView, others: list[CallView]) -> bool:
    """Tell whether all others, none of them less important, hold less than the leader misses."""
    if any(c.priority < leader.priority for c in others):
        return False
    peak = headroom.now.likely_peak(leader.memory_bytes, KILL_SHARE) or 0
    if leader.memory_max_bytes is not None:
        peak = min(peak, leader.memory_max_bytes)
    missing = peak - leader.memory_bytes - max(0, headroom.now.free_bytes)
    return sum(c.memory_bytes for c in others) < missing


def _work_usec(now: Snapshot, call: CallView) -> int:
    """Return the CPU time of a call so far; where that is not known, all the time since it
    began."""
    return now.now_usec - call.began_usec if call.cpu_usec is None else call.cpu_usec


def _loss(now: Snapshot, call: CallView) -> tuple[int, bool, float, str]:
    """Sort key of victims: the smallest is the least loss."""
    freed_per_work = call.memory_bytes / (max(0, _work_usec(now, call)) + WORK_USEC)
    return call.priority, call.on_pressure != "kill", -freed_per_work, call.id


CHOOSERS: dict[str, Chooser] = {
    "reclaim": reclaim,
    "throttle": throttle,
    "deny": deny,
    "freeze": freeze,
    "kill": kill,
    "slow": slow,
    "io_weight": io_weight,
    "io_max": io_max,
}
