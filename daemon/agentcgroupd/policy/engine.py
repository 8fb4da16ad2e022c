"""What to do when memory runs short: `decide(policy, snapshot, signal, state) -> outcome`.

Pure: no I/O and no clock. The pool is the first line of defence: rulesets act before its limit is
touched, so that the kernel's OOM killer has nothing to do. Every detector of every ruleset is
evaluated for every snapshot. What was done earlier is undone first, where its ruleset no longer
holds. Then the rulesets are tried in their order, and a call is ended only when none of them has
throttled, denied or paused a call for this snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from agentcgroupd.policy.choose import CHOOSERS
from agentcgroupd.policy.headroom import Headroom, still_needs
from agentcgroupd.policy.schema import (
    Detector,
    Growing,
    IoMax,
    IoStalled,
    IoWeight,
    Policy,
    PoolFills,
    PoolFree,
    Ruleset,
    Stalled,
)
from agentcgroupd.policy.snapshot import (
    IO_ACTIONS,
    Action,
    CallView,
    Decision,
    Outcome,
    RuleState,
    Signal,
    SignalKind,
    Snapshot,
    State,
)
from agentcgroupd.units import IMPORTANT_PRIORITY, show_bytes, show_usec

THAW_SHARE = 0.5
"""A call that goes on is taken to reach what this part of the calls like it stayed below. For the
leader a larger part counts, because the leader is not paused again."""
_HOLDING_OR_ENDING = frozenset({Action.THROTTLE, Action.DENY, Action.FREEZE, Action.KILL})


def decide(policy: Policy, now: Snapshot, signal: Signal, state: State) -> Outcome:
    """Return what to do now and what to remember. Equal arguments give equal outcomes."""
    headroom = Headroom(policy, now)
    rules = {r.name: _evaluated(headroom, r, state.rules.get(r.name)) for r in policy.rulesets}
    holds = {r.name: r.enabled and all(rules[r.name].holding) for r in policy.rulesets}
    undone, thawed = _ways_back(headroom, holds, signal, state)
    chosen = _Chosen(undone)
    for ruleset in policy.rulesets:
        name, action = ruleset.name, ruleset.do.action
        if not holds[name] or not _cooled(ruleset, rules[name], now):
            continue
        if action == "kill" and chosen.held_or_ended_any:
            continue
        found = CHOOSERS[action](headroom, ruleset, ruleset.do, chosen.taken)
        if not found:
            continue
        chosen.add(ruleset, found, dry_run=policy.dry_run or ruleset.dry_run)
        total = rules[name].decisions + len(found)
        rules[name] = replace(rules[name], acted_usec=now.now_usec, decisions=total)
    thawed_usec = now.now_usec if thawed else state.thawed_usec
    return Outcome(chosen.decisions(), State(rules, thawed_usec))


class _Chosen:
    """Decisions for one snapshot so far, and what they mean for the rulesets that follow."""

    def __init__(self, undone: Iterable[Decision]) -> None:
        self._decisions = list(undone)
        self.taken = {d.subject for d in self._decisions}
        """Ids of calls and sessions that later rulesets leave alone."""
        self.held_or_ended_any = False
        """Whether a call was throttled, denied, paused or ended: then none has to be ended now."""

    def add(self, ruleset: Ruleset, found: Sequence[Decision], dry_run: bool) -> None:
        """Add what a ruleset has chosen. A dry run leaves everything to later rulesets, and a call
        that only gets less CPU time, or less of the disks, may still have to be held back."""
        self._decisions += [replace(d, ruleset=ruleset.name, dry_run=dry_run) for d in found]
        if dry_run:
            return
        binding = [d for d in found if not d.by_cpu and d.action not in IO_ACTIONS]
        for decision in binding:
            self.taken.update((decision.subject, *decision.calls))
        if any(d.action in _HOLDING_OR_ENDING for d in binding):
            self.held_or_ended_any = True

    def decisions(self) -> tuple[Decision, ...]:
        """Return all decisions, without less CPU time for a call that was held back as well."""
        acted = {d.subject for d in self._decisions if not (d.by_cpu or d.dry_run)}
        return tuple(d for d in self._decisions if not (d.by_cpu and d.subject in acted))


def _cooled(ruleset: Ruleset, rule: RuleState, now: Snapshot) -> bool:
    """Tell whether a ruleset may act again. A clock that went back delays nothing."""
    if ruleset.cooldown is None or rule.acted_usec is None:
        return True
    passed = now.now_usec - rule.acted_usec
    return passed >= ruleset.cooldown or passed < 0


# Detectors


def _evaluated(headroom: Headroom, ruleset: Ruleset, before: RuleState | None) -> RuleState:
    """Return a ruleset's state with its detectors evaluated. If the policy was changed to another
    number of detectors, what held before says nothing."""
    before = before or RuleState()
    same = len(before.holding) == len(ruleset.when)
    held = before.holding if same else (False,) * len(ruleset.when)
    holding = (detector_holds(headroom, d, h) for d, h in zip(ruleset.when, held, strict=True))
    return replace(before, holding=tuple(holding))


def detector_holds(headroom: Headroom, detector: Detector, held: bool) -> bool:
    """Tell whether a detector holds. `held`: whether it did for the last snapshot."""
    now = headroom.now
    match detector:
        case PoolFree():
            edge = (detector.until if held else detector.below).of(now.limit_bytes)
            return now.free_bytes < edge + (headroom.reserve_bytes if detector.keep_room else 0)
        case PoolFills():
            until = detector.until
            if held and until is not None and now.free_bytes < until.of(now.limit_bytes):
                return True
            taken = headroom.taken_within_bytes(detector.within)
            return headroom.starves or (taken > 0 and now.free_bytes < taken)
        case Stalled():
            share = stalled_share(headroom, detector.scope)
            return share is not None and share > (detector.until if held else detector.above)
        case IoStalled():
            share = io_stalled_share(headroom, detector.scope)
            return share is not None and share > (detector.until if held else detector.above)
        case Growing():
            return headroom.growth_bytes_per_s > detector.above.of(now.limit_bytes)


def stalled_share(headroom: Headroom, scope: str) -> float | None:
    """Return the part of the time in which tasks stalled on memory: of the pool, or the highest of
    an important session. None: this kernel does not tell."""
    now = headroom.now
    if now.stalled_share is None or scope == "pool":
        return now.stalled_share
    shares = (s.stalled_share for s in now.sessions if s.priority >= IMPORTANT_PRIORITY)
    return max(shares, default=0.0)


def io_stalled_share(headroom: Headroom, scope: str) -> float | None:
    """Return the same for disks."""
    now = headroom.now
    if now.io_stalled_share is None or scope == "pool":
        return now.io_stalled_share
    shares = (s.io_stalled_share for s in now.sessions if s.priority >= IMPORTANT_PRIORITY)
    return max(shares, default=0.0)


# Ways back


def _ways_back(
    headroom: Headroom, holds: dict[str, bool], signal: Signal, state: State
) -> tuple[list[Decision], bool]:
    """Undo what no ruleset wants any more, whatever was done to the leader before it led, and what
    the CPU scheduler did to calls and does no longer, because the kernel has let go of it.

    Returns the decisions, and whether a paused call goes on. `holds`: by a ruleset's name.
    """
    now = headroom.now
    wanted = {r.do.action for r in _acting(headroom.policy) if holds[r.name]}
    active = now.active_calls
    denied = [c for c in active if c.denied_growth_bytes is not None and not c.awaits_credit]
    throttled = [c for c in active if c.throttled_growth_bytes is not None]
    lost = [c for c in throttled if c.throttled_by_cpu and not now.host.can_penalize]
    throttled = [c for c in throttled if c not in lost]
    slowed = [] if "slow" in wanted else [s for s in now.sessions if s.slowed]
    thawed = _thaw(headroom, "freeze" in wanted, signal, state)
    decisions = [
        *_release(headroom, Action.ALLOW, denied, "deny" in wanted),
        *_release(headroom, Action.UNTHROTTLE, throttled, "throttle" in wanted),
        *(Decision(Action.UNTHROTTLE, c.id, _LOST) for c in lost),
        *(Decision(Action.RESTORE, s.id, _RESTORED) for s in slowed),
        *_disks_back(headroom, wanted),
        *thawed,
    ]
    return decisions, bool(thawed)


def _disks_back(headroom: Headroom, wanted: Set[str]) -> list[Decision]:
    """Give calls disks as before, where no ruleset wants them held back and that has lasted long
    enough."""
    rules = _acting(headroom.policy)
    weights = max((r.do.hold for r in rules if isinstance(r.do, IoWeight)), default=0)
    rates = max((r.do.hold for r in rules if isinstance(r.do, IoMax)), default=0)
    found = []
    for call in headroom.now.io_calls:
        if "io_weight" not in wanted and _lasted(call.weight_lowered_usec, weights):
            found.append(Decision(Action.IO_UNWEIGHT, call.id, _DISKS_BACK))
        if "io_max" not in wanted and _lasted(call.held_usec, rates):
            found.append(Decision(Action.IO_UNMAX, call.id, _DISKS_BACK))
    return found


def _lasted(usec: int | None, least_usec: int) -> bool:
    return usec is not None and usec >= least_usec


_DISKS_BACK = "Disks as before: nobody more important waits for them."
_LOST = (
    "At full speed again: the CPU scheduler that slowed it is gone. While memory is short, it may "
    "be held back in another way."
)
_RESTORED = "CPU as before: it no longer waits for memory."
_RELEASED = {
    Action.ALLOW: "Memory may be asked for again",
    Action.UNTHROTTLE: "At full speed again",
}


def _release(
    headroom: Headroom, action: Action, calls: Iterable[CallView], still_wanted: bool
) -> list[Decision]:
    """Let go of all these calls, or of the leader alone while a ruleset still wants them held."""
    words = _RELEASED[action]
    if still_wanted:
        why = f"{words}: it leads now."
        return [Decision(action, c.id, why) for c in calls if c is headroom.leader]
    why = f"{words}: {show_bytes(max(0, headroom.now.free_bytes))} of the pool are free."
    return [Decision(action, c.id, why) for c in calls]


def _thaw(headroom: Headroom, short: bool, signal: Signal, state: State) -> list[Decision]:
    """Let paused calls go on. `short`: a ruleset still wants calls to be paused.

    The leader always goes on: another call led when it was paused, or nothing else runs. The others
    go on as they fit while the pool is not short. While it is short, one call goes on: the next to
    finish if what it needs is free, else one whose lease is over if there is any room at all. None
    changes more often than `headroom.settle` allows.
    """
    frozen = [c for c in headroom.frozen if not c.awaits_credit]
    if not frozen:
        return []
    now, settings, leader = headroom.now, headroom.settings, headroom.leader
    free = show_bytes(max(0, now.free_bytes))
    if leader is not None and leader.frozen_for_usec is not None and not leader.awaits_credit:
        if not headroom.may_go_on(leader):
            return []
        why = "it leads now" if headroom.anything_runs else "nothing else is running"
        return [_go_on(leader, f"{why}, and {free} of the pool are free")]
    since = now.now_usec - state.thawed_usec
    if 0 <= since < settings.thaw_every and signal.kind is not SignalKind.ENDED:
        return []
    if not short:
        return _as_many_as_fit(headroom, frozen, f"{free} of the pool are free")
    first = headroom.next_to_finish
    if first in frozen and headroom.may_go_on(first):
        resume = resume_free_bytes(headroom.policy, now.limit_bytes)
        if now.free_bytes >= max(headroom.need_bytes(first), resume):
            return [_go_on(first, f"it is nearest to its end, and {free} of the pool are free")]
    expired = next(
        (c for c in frozen if _paused_usec(c) >= settings.lease and headroom.may_go_on(c)),
        None,
    )
    if expired is not None and now.free_bytes > hold_free_bytes(headroom.policy, now.limit_bytes):
        return [_go_on(expired, f"{free} of the pool are free")]
    return []


def _as_many_as_fit(headroom: Headroom, frozen: Iterable[CallView], why: str) -> list[Decision]:
    """Let paused calls go on in order of importance while what they may still take is left beside
    the amount that is to be free and the reserve, but at least one. Room is kept for those that
    may not go on yet."""
    now = headroom.now
    to_be_free = resume_free_bytes(headroom.policy, now.limit_bytes)
    left = now.free_bytes - to_be_free - headroom.reserve_bytes
    decisions: list[Decision] = []
    for call in frozen:
        left -= still_needs(now, call, THAW_SHARE)
        if decisions and left < 0:
            break
        if headroom.may_go_on(call):
            decisions.append(_go_on(call, why))
    return decisions


def _go_on(call: CallView, why: str) -> Decision:
    paused = show_usec(_paused_usec(call))
    return Decision(Action.THAW, call.id, f"Going on after {paused}: {why}.")


def _paused_usec(call: CallView) -> int:
    return call.frozen_for_usec or 0


# Marks


def _acting(policy: Policy) -> list[Ruleset]:
    """Return the rulesets that do what they decide."""
    return [r for r in policy.rulesets if r.enabled and not (r.dry_run or policy.dry_run)]


def _hold_detectors(policy: Policy) -> list[PoolFree]:
    """Return the detectors of free memory by which growing calls are denied or paused."""
    holding = [r for r in _acting(policy) if r.do.action in ("freeze", "deny")]
    return [d for r in holding for d in r.when if isinstance(d, PoolFree)]


def hold_free_bytes(policy: Policy, limit_bytes: int) -> int:
    """Return the free bytes below which growth is held back; 0 if no ruleset does so."""
    return max((d.below.of(limit_bytes) for d in _hold_detectors(policy)), default=0)


def resume_free_bytes(policy: Policy, limit_bytes: int) -> int:
    """Return the free bytes above which paused calls go on; 0 if no ruleset pauses any."""
    return max((d.until.of(limit_bytes) for d in _hold_detectors(policy)), default=0)


def marks(policy: Policy, limit_bytes: int) -> tuple[int, int]:
    """Return the use of the pool in bytes at which to sample at once, and the use below which that
    is over. The mark of a policy that holds no call back is the limit."""
    hold_free = hold_free_bytes(policy, limit_bytes)
    resume_free = resume_free_bytes(policy, limit_bytes)
    return limit_bytes - hold_free, limit_bytes - max(hold_free, resume_free)


def attention_bytes(policy: Policy, limit_bytes: int) -> int:
    """Return the free bytes above which no `pool_free` of any ruleset can hold, whoever leads."""
    reserve_most = policy.headroom.leader_most.of(limit_bytes)
    enabled = [r for r in policy.rulesets if r.enabled]
    detectors = [d for r in enabled for d in r.when if isinstance(d, PoolFree)]
    edges = [d.until.of(limit_bytes) + (reserve_most if d.keep_room else 0) for d in detectors]
    return max(edges, default=0)


def kill_free_bytes(policy: Policy, limit_bytes: int) -> int:
    """Return the free bytes below which a call may be ended: the limit where a ruleset that ends
    calls does not go by what is free, 0 where there is none."""
    edges = []
    for ruleset in policy.rulesets:
        if ruleset.enabled and ruleset.do.action == "kill":
            free = [
                limit_bytes if d.keep_room else d.until.of(limit_bytes)
                for d in ruleset.when
                if isinstance(d, PoolFree)
            ]
            edges.append(max(free, default=limit_bytes))
    return max(edges, default=0)


def claim_bytes(policy: Policy, limit_bytes: int) -> int:
    """Return the size in bytes that a call is taken to reach of which nothing is known."""
    settings = policy.headroom
    return min(settings.prior.of(limit_bytes), settings.leader_most.of(limit_bytes))
