"""Credit: how far each call may grow without asking, and who gets more. Pure: no I/O, no clock.

A call's memory.high is what it holds and a credit. What all calls may still take without asking,
together with what is kept for those that go first, is never more than what is free; so calls cannot
overrun the pool, however late the daemon is. A call that has used its credit up is held at it by
the kernel and asks for more.

Who asks is served in order: the most important first, among equals the one that is furthest on,
because its end gives most back soonest. What the first one may need to its end is kept for it, as
the reserve is; an important one gets all of that at once, so that it waits for nobody to look. The
others come next, those first that have been paused longest: all of them finish when the last one
does. They get more as long as what all those before them are likely to need is there as well: calls
that grow side by side until nothing is left would all be half done. Of one that grows slowly, only
what it takes in the next second is reckoned with: it can be stopped before it takes more. For the
same reason, what they have not used yet is taken back where it is missing for the first one, such
as one that is more important and began to grow later. Where even that is not enough for the first
one to end, another that can end with what is free goes before it, and gives back what it holds;
before an important one only once nothing is left but what that other one needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from agentcgroupd.policy.engine import THAW_SHARE, hold_free_bytes
from agentcgroupd.policy.headroom import still_needs
from agentcgroupd.policy.schema import Kill, Policy, PoolFree
from agentcgroupd.policy.snapshot import CallView, Snapshot
from agentcgroupd.units import IMPORTANT_PRIORITY

LEAST_BYTES = 4 << 20
"""Credit that a call always has while anything is free: too little for most programs to start would
save nothing."""
STEP_LEAST_BYTES = 1 << 20
"""A call is not woken for less."""
ALIKE = 10
"""Calls whose sizes differ by this part of them are alike."""
SPREAD = 4
"""Calls that rest share a quarter of what is free; the rest is for those that grow."""
AHEAD_S = 1.0
"""Seconds for which the growth of a call that does not go first is reckoned with: by then it can be
stopped, and its speed is known anew."""
SHARE_OF_HELD = 4
STEP_MOST = 4
"""A call that grows is given a quarter of what it holds at a time, at least `headroom.credit` and
at most STEP_MOST times that."""


@dataclass(frozen=True, slots=True)
class Account:
    """A call that grows, or asks for more."""

    view: CallView
    bound_bytes: int
    """What it may reach without asking."""
    asks: bool
    """Whether it needs more now."""
    started: bool = False
    """Whether it got more since it began to grow: what it is likely to need is kept for it."""
    held: bool = False
    """Whether it is paused until it gets more."""
    may_go_on: bool = True
    """Whether it may go on by now, if it is paused."""

    @property
    def unused_bytes(self) -> int:
        """Bytes that it may still take without asking."""
        return max(0, self.bound_bytes - self.view.memory_bytes)


@dataclass(frozen=True, slots=True)
class Budget:
    """What there is to give."""

    free_bytes: int
    """Of the pool's limit."""
    unused_bytes: int
    """What all calls may still take without asking."""
    calls: int
    """Open calls."""


def overshoot_bytes(bound_bytes: int) -> int:
    """Return by how much a call can pass its bound within some five seconds.

    Each batch of 64 pages that is charged above memory.high costs a sleep of 64 f^2 seconds, where
    f is the part by which the bound is passed (mm/memcontrol.c: calculate_overage, at most 2 s). So
    one thread that takes memory as fast as it is let passes 64 MiB by 6 MiB in five seconds, 200
    MiB by 13 and 1 GiB by 39.
    """
    return min(32 << 20, (2 << 20) + bound_bytes // 16)


def first_bytes(policy: Policy, budget: Budget, limit_bytes: int) -> int:
    """Return the credit of a call that begins."""
    return _spread(policy, budget, limit_bytes, policy.headroom.credit.of(limit_bytes))


def resting_bytes(policy: Policy, budget: Budget, limit_bytes: int) -> int:
    """Return the credit of a call that has not grown for a while."""
    return _spread(policy, budget, limit_bytes, policy.headroom.credit_resting.of(limit_bytes))


def _spread(policy: Policy, budget: Budget, limit_bytes: int, most_bytes: int) -> int:
    free = budget.free_bytes - hold_free_bytes(policy, limit_bytes)
    share = min(free // (SPREAD * (budget.calls + 1)), free - budget.unused_bytes)
    return max(LEAST_BYTES, min(most_bytes, share))


def step_bytes(policy: Policy, held_bytes: int, limit_bytes: int) -> int:
    """Return what a call that grows is given at a time."""
    least = policy.headroom.credit.of(limit_bytes)
    return min(STEP_MOST * least, max(least, held_bytes // SHARE_OF_HELD))


def pauses(policy: Policy) -> bool:
    """Tell whether the policy pauses calls at all. Where it does not, who waits for credit sleeps
    at its bound instead."""
    return any(r.enabled and not r.dry_run and r.do.action == "freeze" for r in policy.rulesets)


def in_order(accounts: Iterable[Account]) -> list[Account]:
    """Return the accounts, who is served first first."""

    def key(account: Account) -> tuple[int, int, int, str]:
        view = account.view
        # By what it may reach: of two that grow side by side, one stays ahead.
        reach = max(view.memory_bytes, account.bound_bytes)
        return -view.priority, -reach, view.began_usec, view.id

    return sorted(accounts, key=key)


def likely_need_bytes(policy: Policy, now: Snapshot, view: CallView) -> int:
    """Return what a call that does not go first is taken to need to its end: as calls like it did,
    else to reach `headroom.typical` or twice what it holds."""
    return _needs(now, view, THAW_SHARE, policy.headroom.typical.of(now.limit_bytes))


def _needs(now: Snapshot, view: CallView, share: float, prior_bytes: int) -> int:
    """Return what a call may still take. One that is about as far as others went is taken to be one
    of them: by a page more it would be one of which nothing is known."""
    alike = view.memory_bytes // ALIKE
    earlier = replace(view, memory_bytes=view.memory_bytes - alike)
    return max(0, still_needs(now, earlier, share, prior_bytes) - alike)


def kept_for_first_bytes(policy: Policy, now: Snapshot, view: CallView) -> int:
    """Return what is kept for the call that goes first, so that it can end."""
    settings, limit = policy.headroom, now.limit_bytes
    wanted = _needs(now, view, settings.leader_share, settings.prior.of(limit))
    return min(wanted, max(0, settings.leader_most.of(limit) - view.memory_bytes))


def last_bytes(policy: Policy, limit_bytes: int) -> int:
    """Return what even the first call leaves free: half of where a call would be ended, so that
    the policy sees when nothing else helps."""
    ends = [r for r in policy.rulesets if r.enabled and isinstance(r.do, Kill)]
    edges = [d.below.of(limit_bytes) for r in ends for d in r.when if isinstance(d, PoolFree)]
    return min(edges, default=0) // 2


def serve(
    policy: Policy,
    now: Snapshot,
    budget: Budget,
    accounts: Sequence[Account],
    first_leads: bool = True,
) -> dict[str, int]:
    """Return new bounds in bytes, by the ids of the calls that get more, or lose what they have not
    used.

    `now` tells the limit and what calls took before; `accounts`: all calls that grow or ask;
    `first_leads`: whether no call that is more important holds what it has, and rests. Else even
    the first one leaves free what is always to be free, as the others do: that one may grow again.
    Who is not in the result and asks has to wait.
    """
    order = in_order(accounts)
    if not order:
        return {}
    beside, spared = _put_first_who_can_end(policy, now, budget, order)
    given: dict[str, int] = {}
    unused = budget.unused_bytes + sum(
        overshoot_bytes(a.bound_bytes) for a in order[1:] if not a.held
    )
    first, taken = order[0], 0
    if first.asks and first.may_go_on:
        # Where even the first can get no more, it passes its bound a little, and not the pool's.
        least = last_bytes if first_leads else hold_free_bytes
        last = max(least(policy, now.limit_bytes), overshoot_bytes(first.view.memory_bytes))
        room = budget.free_bytes - last - budget.unused_bytes - spared
        at_once = 0
        if first.view.priority >= IMPORTANT_PRIORITY and first_leads:
            kept = kept_for_first_bytes(policy, now, first.view)
            at_once = kept if kept <= room else likely_need_bytes(policy, now, first.view)
        taken = _give(policy, now, first, room, given, at_once)
        unused += taken
    if beside is not None:
        order.remove(beside)
        if beside.asks and beside.may_go_on:
            left = budget.free_bytes - last_bytes(policy, now.limit_bytes) - budget.unused_bytes
            room = min(spared - beside.unused_bytes, left - taken)
            _give(policy, now, beside, room, given)
    kept = kept_for_first_bytes(policy, now, first.view) - _unused_now(first, given)
    room = (
        budget.free_bytes
        - hold_free_bytes(policy, now.limit_bytes)
        - unused
        - spared
        - max(0, kept)
    )
    others = _longest_paused_first(order[1:])
    if room < 0:
        _take_back(others, -room, given)
        return given
    _serve_others(policy, now, others, room, given)
    return given


def _longest_paused_first(others: Sequence[Account]) -> list[Account]:
    """Return those that do not go first, who is served first first. A pause counts whoever made it.
    Whole seconds count, so that two that take turns do not change places with each look."""
    return sorted(others, key=lambda a: (-a.view.priority, -(a.view.paused_usec // 1_000_000)))


def _soon_bytes(policy: Policy, now: Snapshot, account: Account) -> int:
    """Return what a call that does not go first is taken to need beyond its bound before it can be
    stopped."""
    likely = likely_need_bytes(policy, now, account.view) - account.unused_bytes
    ahead = LEAST_BYTES + AHEAD_S * account.view.growth_bytes_per_s - account.unused_bytes
    return max(0, int(min(likely, ahead)))


def _serve_others(
    policy: Policy, now: Snapshot, others: Sequence[Account], room: int, given: dict[str, int]
) -> None:
    """Note new bounds of those that do not go first, as far as `room` bytes go."""
    for account in others:
        soon = _soon_bytes(policy, now, account)
        if not account.asks:
            room -= soon
            continue
        if not account.may_go_on:
            continue
        step = step_bytes(policy, account.view.memory_bytes, now.limit_bytes)
        cost = soon + (overshoot_bytes(account.bound_bytes + step) if account.held else 0)
        if max(STEP_LEAST_BYTES if account.started else cost, min(step, LEAST_BYTES)) > room:
            continue
        _give(policy, now, account, room, given)
        room -= max(cost, given.get(account.view.id, 0) - account.bound_bytes)


def _put_first_who_can_end(
    policy: Policy, now: Snapshot, budget: Budget, order: list[Account]
) -> tuple[Account | None, int]:
    """Move to the front who holds most of those that are likely to end with what is free, if the
    first of all may need more than that. None is moved if none can.

    An important one stays first as long as there is more than one of the others needs to end. That
    one gets it beside the first: should the important one need even more than is left, the others
    can still end one after the other, and give back what they hold. Returns the one and what it
    needs in bytes; None: there is no such.
    """
    first = order[0]
    free = budget.free_bytes - hold_free_bytes(policy, now.limit_bytes)
    if kept_for_first_bytes(policy, now, first.view) <= free:
        return None, 0
    most = policy.headroom.leader_most.of(now.limit_bytes)
    open_ended = [a for a in order if a.view.memory_bytes < most]
    needs = {a.view.id: kept_for_first_bytes(policy, now, a.view) for a in open_ended}
    able = [a for a in order if needs.get(a.view.id, free + 1) <= free]
    if not able:
        return None, 0
    if first.view.priority >= IMPORTANT_PRIORITY:
        beside = min(able, key=lambda account: needs[account.view.id])
        least = needs[beside.view.id]
        if free - least >= first.unused_bytes + LEAST_BYTES:
            return beside, least
    found = max(able, key=lambda account: account.view.memory_bytes)
    order.remove(found)
    order.insert(0, found)
    return None, 0


def _take_back(others: Sequence[Account], missing_bytes: int, given: dict[str, int]) -> None:
    """Note new bounds by which `missing_bytes`, or as much as there is, become free again: of those
    who are served last first."""
    for account in reversed(others):
        if missing_bytes <= 0:
            break
        if account.unused_bytes >= STEP_LEAST_BYTES:
            taken = min(account.unused_bytes, max(missing_bytes, STEP_LEAST_BYTES))
            given[account.view.id] = account.bound_bytes - taken
            missing_bytes -= taken


def _unused_now(account: Account, given: dict[str, int]) -> int:
    return given.get(account.view.id, account.bound_bytes) - account.view.memory_bytes


def _give(
    policy: Policy,
    now: Snapshot,
    account: Account,
    room_bytes: int,
    given: dict[str, int],
    least_bytes: int = 0,
) -> int:
    """Note what an account gets of `room_bytes`, a step or `least_bytes` if that is more, and
    return how much more than before that is."""
    view = account.view
    step = step_bytes(policy, view.memory_bytes, now.limit_bytes)
    wanted = view.memory_bytes + max(step, least_bytes)
    bound = min(wanted, account.bound_bytes + room_bytes)
    if bound < max(account.bound_bytes, view.memory_bytes) + STEP_LEAST_BYTES:
        return 0
    given[view.id] = bound
    return bound - account.bound_bytes
