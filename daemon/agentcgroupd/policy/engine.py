"""Where it is decided: `decide(policy, snapshot, signal, state) -> outcome`. No I/O, no clock.

The pool is the first line: rulesets act before its limit is touched, so that the kernel's OOM
killer has nothing to do. Every detector of every ruleset is evaluated on every look. First what was
done earlier is undone where its ruleset no longer holds, then the rulesets are tried in their
order, and a call is ended only when none of them could stop anything on this look.
"""

from __future__ import annotations

from dataclasses import replace

from agentcgroupd.policy.choose import CHOOSERS
from agentcgroupd.policy.headroom import Situation, still_needs
from agentcgroupd.policy.schema import Growing, Policy, PoolFills, PoolFree, Ruleset, Stalled
from agentcgroupd.policy.snapshot import (
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
"""What is kept for a call that goes on: what half of the calls like it stayed below. It can be
paused again, the leader cannot."""
_STOPPING = frozenset({Action.THROTTLE, Action.DENY, Action.FREEZE, Action.KILL})


def decide(policy: Policy, now: Snapshot, signal: Signal, state: State) -> Outcome:
    """What to do now. The same arguments always give the same outcome."""
    at = Situation(policy, now)
    rules: dict[str, RuleState] = {}
    for ruleset in policy.rulesets:
        before = state.rules.get(ruleset.name, RuleState())
        rules[ruleset.name] = replace(before, holding=_holding(at, ruleset, before))
    holds = {r.name: r.enabled and all(rules[r.name].holding) for r in policy.rulesets}
    decisions, thawed = _ways_back(at, holds, signal, state)
    taken = {d.subject for d in decisions}
    stopped = False
    for ruleset in policy.rulesets:
        if not holds[ruleset.name] or not _cooled(ruleset, rules[ruleset.name], now):
            continue
        if ruleset.do.action == "kill" and stopped:
            continue
        found = CHOOSERS[ruleset.do.action](at, ruleset, ruleset.do, taken)
        if not found:
            continue
        dry = policy.dry_run or ruleset.dry_run
        decisions += [replace(d, ruleset=ruleset.name, dry_run=dry) for d in found]
        rules[ruleset.name] = replace(
            rules[ruleset.name], acted_usec=now.now_usec,
            decisions=rules[ruleset.name].decisions + len(found),
        )  # fmt: skip
        if not dry:
            # One that is only slowed may have to be stopped all the same.
            found = [d for d in found if not d.by_cpu]
            taken |= {d.subject for d in found} | {c for d in found for c in d.calls}
            stopped = stopped or any(d.action in _STOPPING for d in found)
    thawed_usec = now.now_usec if thawed else state.thawed_usec
    acted = {d.subject for d in decisions if not (d.by_cpu or d.dry_run)}
    kept = tuple(d for d in decisions if not (d.by_cpu and d.subject in acted))
    return Outcome(kept, State(rules, thawed_usec))


def _cooled(ruleset: Ruleset, rule: RuleState, now: Snapshot) -> bool:
    if ruleset.cooldown is None or rule.acted_usec is None:
        return True
    passed = now.now_usec - rule.acted_usec
    return passed >= ruleset.cooldown or passed < 0


# Detectors


def _holding(at: Situation, ruleset: Ruleset, before: RuleState) -> tuple[bool, ...]:
    """Each of its detectors. What held before the policy was changed says nothing."""
    held = before.holding if len(before.holding) == len(ruleset.when) else ()
    return tuple(
        detector_holds(at, detector, held[index] if held else False)
        for index, detector in enumerate(ruleset.when)
    )


def detector_holds(
    at: Situation, detector: PoolFree | PoolFills | Stalled | Growing, held: bool
) -> bool:
    """Whether a detector holds; `held`: whether it did at the last look."""
    now = at.now
    match detector:
        case PoolFree():
            edge = (detector.until if held else detector.below).of(now.limit_bytes)
            return now.free_bytes < edge + (at.room_bytes if detector.keep_room else 0)
        case PoolFills():
            growth, until = at.growth_bytes_per_s, detector.until
            if held and until is not None and now.free_bytes < until.of(now.limit_bytes):
                return True
            return growth > 0 and now.free_bytes < growth * detector.within / 1e6
        case Stalled():
            share = stalled_share(at, detector.scope)
            return share is not None and share > (detector.until if held else detector.above)
        case Growing():
            return at.growth_bytes_per_s > detector.above.of(now.limit_bytes)


def stalled_share(at: Situation, scope: str) -> float | None:
    """Of the pool, or the highest of an important session; None: this kernel does not tell."""
    if at.now.stalled_share is None:
        return None
    if scope == "pool":
        return at.now.stalled_share
    shares = (s.stalled_share for s in at.now.sessions if s.priority >= IMPORTANT_PRIORITY)
    return max(shares, default=0.0)


# Ways back


def _ways_back(
    at: Situation, holds: dict[str, bool], signal: Signal, state: State
) -> tuple[list[Decision], bool]:
    """Undo what no ruleset wants any more; whether a call was let go on."""
    policy, leader = at.policy, at.leader
    wanted = {r.do.action for r in _done(policy) if holds[r.name]}
    decisions: list[Decision] = []
    free = show_bytes(max(0, at.now.free_bytes))
    if "deny" not in wanted:
        why = f"Memory may be asked for again: {free} of the pool are free."
        decisions += [Decision(Action.ALLOW, c.id, why) for c in at.now.calls
                      if c.denied_growth_bytes is not None]  # fmt: skip
    elif leader is not None and leader.denied_growth_bytes is not None:
        decisions.append(Decision(Action.ALLOW, leader.id, "Memory may be asked for again: it is "
                                  "its turn."))  # fmt: skip
    if "throttle" in wanted and leader is not None and leader.throttled_growth_bytes is not None:
        decisions.append(Decision(Action.UNTHROTTLE, leader.id, "At full speed again: it is its "
                                  "turn."))  # fmt: skip
    if "throttle" not in wanted:
        why = f"At full speed again: {free} of the pool are free."
        decisions += [Decision(Action.UNTHROTTLE, c.id, why) for c in at.now.calls
                      if c.throttled_growth_bytes is not None]  # fmt: skip
    if "slow" not in wanted:
        why = "CPU as before: it no longer waits for memory."
        decisions += [Decision(Action.RESTORE, s.id, why) for s in at.now.sessions if s.slowed]
    thawed = _thaw(at, "freeze" in wanted, signal, state)
    return decisions + thawed, bool(thawed)


def _thaw(at: Situation, short: bool, signal: Signal, state: State) -> list[Decision]:
    """Who goes on: the leader whenever it is paused (another led when it was), one when nothing
    else runs, whoever fits when there is room, one whose lease is over when there is any at all."""
    if not at.frozen:
        return []
    now, head = at.now, at.policy.headroom
    free = show_bytes(max(0, now.free_bytes))
    leader = at.leader
    if leader is not None and leader.frozen_for_usec is not None:
        why = "it is its turn" if at.running else "nothing else is running"
        return [_go_on(leader, f"{why}, and {free} of the pool are free")]
    since = now.now_usec - state.thawed_usec
    if 0 <= since < head.thaw_every and signal.kind is not SignalKind.ENDED:
        return []
    if not short:
        return _as_many_as_fit(at, f"{free} of the pool are free")
    heir = at.heir
    if heir is not None and heir.frozen_for_usec is not None:
        if now.free_bytes >= max(at.needs(heir), resume_mark(at.policy, now.limit_bytes)):
            return [_go_on(heir, f"it is nearest to its end, and {free} of the pool are free")]
    expired = next((c for c in at.frozen if (c.frozen_for_usec or 0) >= head.lease), None)
    if expired is not None and now.free_bytes > _stop_mark(at.policy, now.limit_bytes):
        return [_go_on(expired, f"{free} of the pool are free")]
    return []


def _as_many_as_fit(at: Situation, why: str) -> list[Decision]:
    """In order of importance, while room is left for what they may still take; at least one."""
    left = at.now.free_bytes - resume_mark(at.policy, at.now.limit_bytes) - at.room_bytes
    decisions: list[Decision] = []
    for call in at.frozen:
        left -= still_needs(at.now, call, THAW_SHARE)
        if decisions and left < 0:
            break
        decisions.append(_go_on(call, why))
    return decisions


def _go_on(call: CallView, why: str) -> Decision:
    paused = show_usec(call.frozen_for_usec or 0)
    return Decision(Action.THAW, call.id, f"Going on after {paused}: {why}.")


# Marks


def _done(policy: Policy) -> list[Ruleset]:
    """Those that do what they decide."""
    return [r for r in policy.rulesets if r.enabled and not (r.dry_run or policy.dry_run)]


def _freezing(policy: Policy) -> list[PoolFree]:
    return [d for r in _done(policy) if r.do.action in ("freeze", "deny")
            for d in r.when if isinstance(d, PoolFree)]  # fmt: skip


def _stop_mark(policy: Policy, limit_bytes: int) -> int:
    """Free bytes below which calls are stopped, 0 if no ruleset does."""
    return max((d.below.of(limit_bytes) for d in _freezing(policy)), default=0)


def resume_mark(policy: Policy, limit_bytes: int) -> int:
    """Free bytes above which paused calls go on."""
    return max((d.until.of(limit_bytes) for d in _freezing(policy)), default=0)


def marks(policy: Policy, limit_bytes: int) -> tuple[int, int]:
    """Use of the pool in bytes at which to look at once, and below which that is over. A policy
    that stops nobody has its mark at the limit."""
    stop, resume = _stop_mark(policy, limit_bytes), resume_mark(policy, limit_bytes)
    return limit_bytes - stop, limit_bytes - max(stop, resume)


def attention_bytes(policy: Policy, limit_bytes: int) -> int:
    """Free bytes above which no ruleset on the pool's use can hold, whoever leads."""
    most = policy.headroom.leader_most.of(limit_bytes)
    free = [d for r in policy.rulesets if r.enabled for d in r.when if isinstance(d, PoolFree)]
    edges = [d.until.of(limit_bytes) + (most if d.keep_room else 0) for d in free]
    return max(edges, default=0)


def claim_bytes(policy: Policy, limit_bytes: int) -> int:
    """How far a call of which nothing is known is taken to go."""
    return min(policy.headroom.prior.of(limit_bytes), policy.headroom.leader_most.of(limit_bytes))
