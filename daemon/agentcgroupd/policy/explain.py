"""How things stand under the policy, in words: each ruleset with its numbers, and one call.

Pure, as the engine is; the engine's own functions say what holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.policy.choose import can_throttle
from agentcgroupd.policy.engine import detector_holds, stalled_share
from agentcgroupd.policy.headroom import Situation
from agentcgroupd.policy.schema import Growing, Policy, PoolFills, PoolFree, Ruleset, Stalled
from agentcgroupd.policy.snapshot import CallView, RuleState, Snapshot, State
from agentcgroupd.units import show_bytes, show_usec

if TYPE_CHECKING:
    from agentcgroupd.policy.load import Loaded

AnyDetector = PoolFree | PoolFills | Stalled | Growing
_DOES = {
    "throttle": "is slowed",
    "deny": "gets no more memory",
    "freeze": "is paused",
    "kill": "may be ended",
}
"""Actions on calls, in words; the others are on sessions."""


# Rulesets


def policy_state(
    loaded: Loaded, error: str = "", loaded_unix_usec: int = 0,
    snapshot: Snapshot | None = None, state: State | None = None,
) -> pb.PolicyState:  # fmt: skip
    """The policy and how each ruleset stands; without a snapshot, what each one looks for."""
    policy = loaded.policy
    at = None if snapshot is None else Situation(policy, snapshot)
    rules = state.rules if state is not None else {}
    return pb.PolicyState(
        name=policy.name, document=loaded.text, sources=[str(s) for s in loaded.sources],
        loaded_unix_usec=loaded_unix_usec, error=error, dry_run=policy.dry_run,
        rulesets=[_ruleset_state(at, r, rules.get(r.name, RuleState()), policy.dry_run)
                  for r in policy.rulesets],
    )  # fmt: skip


def _ruleset_state(
    at: Situation | None, ruleset: Ruleset, rule: RuleState, dry_run: bool
) -> pb.RulesetState:
    words = [] if ruleset.enabled else ["disabled: it is not tried"]
    holding = [_holds(at, ruleset, rule, i) for i in range(len(ruleset.when))]
    found = pb.RulesetState(
        name=ruleset.name, action=ruleset.do.action, dry_run=dry_run or ruleset.dry_run,
        holds=ruleset.enabled and all(holding), decisions=rule.decisions,
        detectors=words + [_in_words(at, *d) for d in zip(ruleset.when, holding, strict=True)],
    )  # fmt: skip
    if at is not None and rule.acted_usec is not None:
        found.acted_usec_ago = max(0, at.now.now_usec - rule.acted_usec)
    return found


def _holds(at: Situation | None, ruleset: Ruleset, rule: RuleState, index: int) -> bool:
    held = len(rule.holding) == len(ruleset.when) and rule.holding[index]
    return at is not None and detector_holds(at, ruleset.when[index], held)


def _in_words(at: Situation | None, detector: AnyDetector, holds: bool) -> str:
    """One sentence: what is looked at, its number now, whether it holds."""
    looks = _looks_for(at, detector)
    if at is None:
        return f"{detector.detector}: {looks}"
    return f"{detector.detector}: {_reading(at, detector)}; {'holds' if holds else 'not'}: {looks}"


def _looks_for(at: Situation | None, detector: AnyDetector) -> str:
    match detector:
        case PoolFree():
            room = " beside the room kept" if detector.keep_room else ""
            return f"less than {detector.below} free{room}, until {detector.until}"
        case PoolFills():
            return f"full within {show_usec(detector.within)}"
        case Stalled():
            whose = "of the pool" if detector.scope == "pool" else "of an important session"
            return f"more than {detector.above:.3g} of the time {whose}, until {detector.until:.3g}"
        case Growing():
            return f"more than {detector.above} a second"


def _reading(at: Situation, detector: AnyDetector) -> str:
    now = at.now
    match detector:
        case PoolFree():
            room = ""
            if detector.keep_room and at.room_bytes:
                room = f", of which {show_bytes(at.room_bytes)} are room kept"
            return f"{_free(now)} free{room}"
        case PoolFills():
            left = _until_free(at, 0)
            return "it does not grow" if left is None else f"full in {_soon(left)} as it grows now"
        case Stalled():
            share = stalled_share(at, detector.scope)
            if share is None:
                return "this kernel does not tell (no PSI)"
            return f"stalled {share:.3g} of the time"
        case Growing():
            return f"grows by {show_bytes(max(0.0, at.growth_bytes_per_s))} a second"


def _free(now: Snapshot) -> str:
    percent = 100 * now.free_bytes / now.limit_bytes if now.limit_bytes else 0.0
    return f"{show_bytes(max(0, now.free_bytes))} of {show_bytes(now.limit_bytes)} ({percent:.3g}%)"


def _until_free(at: Situation, edge_bytes: int) -> float | None:
    """Seconds until no more than this is free, at the present growth; None: never."""
    above = at.now.free_bytes - edge_bytes
    if above <= 0:
        return 0.0
    return above / at.growth_bytes_per_s if at.growth_bytes_per_s > 0 else None


def _soon(seconds: float) -> str:
    return show_usec(seconds * 1e6) if math.isfinite(seconds) and seconds < 86_400 else "days"


# One call


def explain(
    policy: Policy, snapshot: Snapshot, state: State, call_id: str,
    history: Iterable[pb.Feedback] = (),
) -> pb.Explanation:  # fmt: skip
    """How the policy sees a call of the snapshot, what it did to it, what would come next. KeyError
    if the call is not there."""
    call = next((c for c in snapshot.calls if c.id == call_id), None)
    if call is None:
        raise KeyError(call_id)
    at = Situation(policy, snapshot)
    return pb.Explanation(
        call_id=call_id, sentence=_standing(at, call), numbers=_numbers(at, call),
        history=history, outlook=[*_ways_back(at, state, call), *_outlook(at, state, call)],
    )  # fmt: skip


def _standing(at: Situation, call: CallView) -> str:
    doing = f"runs with {show_bytes(call.memory_bytes)}"
    if call.frozen_for_usec is not None:
        doing = f"has been paused for {show_usec(call.frozen_for_usec)} with " + show_bytes(
            call.memory_bytes
        )
    elif call.growth_bytes_per_s > 0:
        doing += f", growing by {show_bytes(call.growth_bytes_per_s)} a second"
    held = [word for word, there in (
        ("more memory is denied", call.denied_growth_bytes is not None),
        ("it is slowed", call.throttled_growth_bytes is not None),
    ) if there]  # fmt: skip
    leader = at.leader
    if leader is None or leader.id == call.id:
        place = "it leads: it is never paused while it runs"
    else:
        why = "more important" if leader.priority > call.priority else "further on"
        place = f"{leader.name!r} of session {leader.session_id} goes first, which is {why}"
    parts = (f"{call.name!r} {doing} (priority {call.priority})", *held, place)
    return "; ".join(parts) + f"; {_free(at.now)} are free."


def _numbers(at: Situation, call: CallView) -> dict[str, float]:
    """What is known; the rest is absent."""
    now = at.now
    known = {
        "priority": call.priority,
        "memory_bytes": call.memory_bytes,
        "growth_bytes_per_s": call.growth_bytes_per_s,
        "cpu_usec": call.cpu_usec,
        "age_usec": max(0, now.now_usec - call.began_usec),
        "expected_bytes": call.expected_bytes or None,
        "memory_max_bytes": call.memory_max_bytes,
        "frozen_for_usec": call.frozen_for_usec,
        "denied_growth_bytes": call.denied_growth_bytes,
        "throttled_growth_bytes": call.throttled_growth_bytes,
        "pool_limit_bytes": now.limit_bytes,
        "pool_free_bytes": now.free_bytes,
        "pool_growth_bytes_per_s": now.growth_bytes_per_s,
        "pool_stalled_share": now.stalled_share,
        "leader_room_bytes": at.room_bytes,
    }
    return {name: float(value) for name, value in known.items() if value is not None}


def _ways_back(at: Situation, state: State, call: CallView) -> Iterator[str]:
    """When what was done to it ends."""
    wanted = {"denied": call.denied_growth_bytes is not None and "deny",
              "slowed": call.throttled_growth_bytes is not None and "throttle"}  # fmt: skip
    for word, action in wanted.items():
        if action:
            yield f"no longer {word} when {_over(at, action)}"
    if call.frozen_for_usec is None:
        return
    yield f"it goes on when {_over(at, 'freeze')}, or when nothing else runs"
    left = at.policy.headroom.lease - call.frozen_for_usec
    when = f"in {show_usec(left)} at the latest" if left > 0 else "now: its lease is over"
    yield f"it goes on {when}, as soon as there is any room"
    ahead = sum(
        1 for c in at.frozen if c.id != call.id and at.frozen.index(c) < at.frozen.index(call)
    )
    if ahead:
        yield f"{ahead} paused call{'s go' if ahead > 1 else ' goes'} on before it"


def _over(at: Situation, action: str) -> str:
    """What must be so for no ruleset of this action to hold."""
    needed = [
        d.until.of(at.now.limit_bytes) + (at.room_bytes if d.keep_room else 0)
        for r in at.policy.rulesets if r.enabled and r.do.action == action
        for d in r.when if isinstance(d, PoolFree)
    ]  # fmt: skip
    return f"{show_bytes(max(needed))} of the pool are free" if needed else "its ruleset ends"


def _outlook(at: Situation, state: State, call: CallView) -> Iterator[str]:
    """Each ruleset that could touch it next, the soonest first."""
    if call.frozen_for_usec is not None:
        steps = [s for s in _steps(at, state, call) if s[2].do.action == "kill"]
    else:
        steps = list(_steps(at, state, call))
    for _, sentence, _ in sorted(steps, key=lambda s: s[0]):
        yield sentence
    if not steps:
        yield "no ruleset would do anything to it as things are"


def _steps(at: Situation, state: State, call: CallView) -> Iterator[tuple[float, str, Ruleset]]:
    """Seconds until a ruleset may hold (infinite: not as things go), and that in words."""
    for ruleset in at.policy.rulesets:
        word = _DOES.get(ruleset.do.action)
        if not ruleset.enabled or word is None or not _touches(at, ruleset, call):
            continue
        rule = state.rules.get(ruleset.name, RuleState())
        waits = [0.0 if _holds(at, ruleset, rule, i) else _wait(at, d)
                 for i, d in enumerate(ruleset.when)]  # fmt: skip
        seconds = max(waits)
        conditions = " and ".join(_looks_for(at, d) for d in ruleset.when)
        if seconds == 0:
            when = "that is so now" + _but(at, ruleset, call)
        elif math.isinf(seconds):
            when = "not as things are going now"
        else:
            when = f"in {_soon(seconds)} as the pool grows now" + _but(at, ruleset, call)
        dry = " (dry run: only said)" if at.policy.dry_run or ruleset.dry_run else ""
        yield seconds, f"{ruleset.name}: it {word}{dry} at {conditions}: {when}", ruleset


def _wait(at: Situation, detector: AnyDetector) -> float:
    """Seconds until a detector that does not hold would, as the pool grows now."""
    if isinstance(detector, PoolFree):
        room = at.room_bytes if detector.keep_room else 0
        left = _until_free(at, detector.below.of(at.now.limit_bytes) + room)
    elif isinstance(detector, PoolFills):
        full = _until_free(at, 0)
        left = None if full is None else max(0.0, full - detector.within / 1e6)
    else:
        left = None  # nothing says how stalls or growth go on
    return math.inf if left is None else left


def _touches(at: Situation, ruleset: Ruleset, call: CallView) -> bool:
    """Whether this ruleset could ever choose this call, as the rungs choose."""
    host, do, leader = at.now.host, ruleset.do, at.leader
    if call.priority >= ruleset.spare_priority or leader is None or leader.id == call.id:
        return False
    if do.action == "throttle":
        return call.throttled_growth_bytes is None and can_throttle(host, do)
    if do.action == "deny":
        willing = do.whom == "all" or call.on_pressure == "deny"
        return host.can_deny and willing and call.denied_growth_bytes is None
    return True


def _but(at: Situation, ruleset: Ruleset, call: CallView) -> str:
    """Why it may be spared all the same."""
    if ruleset.do.action == "kill":
        return ", if nothing else could be done"
    return "" if call in at.growing else ", if it grows then"
