"""How things stand under the policy, in words: each ruleset with its numbers, and one call.

Pure, like the engine, whose own functions say what holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.policy.choose import can_throttle
from agentcgroupd.policy.engine import detector_holds, io_stalled_share, stalled_share
from agentcgroupd.policy.headroom import Headroom, lead_of
from agentcgroupd.policy.schema import (
    Detector,
    Growing,
    IoStalled,
    Policy,
    PoolFills,
    PoolFree,
    Ruleset,
    Stalled,
)
from agentcgroupd.policy.snapshot import CallView, RuleState, Snapshot, State
from agentcgroupd.units import show_bytes, show_usec

if TYPE_CHECKING:
    from agentcgroupd.policy.load import Loaded

_DOES = {
    "throttle": "is slowed",
    "deny": "gets no more memory",
    "freeze": "is paused",
    "kill": "may be ended",
}
"""Actions on calls, in words. The other actions are on sessions."""


# Rulesets


def policy_state(
    loaded: Loaded,
    error: str = "",
    loaded_unix_usec: int = 0,
    snapshot: Snapshot | None = None,
    state: State | None = None,
) -> pb.PolicyState:
    """Return the policy and how each ruleset stands; without a snapshot, what each one looks for.

    `error`: why the policy's files as they are now are not in force; empty: they are.
    """
    policy = loaded.policy
    headroom = None if snapshot is None else Headroom(policy, snapshot)
    rules = state.rules if state is not None else {}
    return pb.PolicyState(
        name=policy.name,
        document=loaded.text,
        sources=[str(s) for s in loaded.sources],
        loaded_unix_usec=loaded_unix_usec,
        error=error,
        dry_run=policy.dry_run,
        rulesets=[
            _ruleset_state(headroom, r, rules.get(r.name, RuleState()), policy.dry_run)
            for r in policy.rulesets
        ],
    )


def _ruleset_state(
    headroom: Headroom | None, ruleset: Ruleset, rule: RuleState, dry_run: bool
) -> pb.RulesetState:
    words = [] if ruleset.enabled else ["disabled: it is not tried"]
    holding = [_holds(headroom, ruleset, rule, i) for i in range(len(ruleset.when))]
    for detector, holds in zip(ruleset.when, holding, strict=True):
        words.append(_in_words(headroom, detector, holds))
    found = pb.RulesetState(
        name=ruleset.name,
        action=ruleset.do.action,
        dry_run=dry_run or ruleset.dry_run,
        holds=ruleset.enabled and all(holding),
        decisions=rule.decisions,
        detectors=words,
    )
    if headroom is not None and rule.acted_usec is not None:
        found.acted_usec_ago = max(0, headroom.now.now_usec - rule.acted_usec)
    return found


def _holds(headroom: Headroom | None, ruleset: Ruleset, rule: RuleState, index: int) -> bool:
    held = len(rule.holding) == len(ruleset.when) and rule.holding[index]
    return headroom is not None and detector_holds(headroom, ruleset.when[index], held)


def _in_words(headroom: Headroom | None, detector: Detector, holds: bool) -> str:
    """Say in a sentence what a detector looks at, its number now, and whether it holds."""
    wanted = _condition(detector)
    if headroom is None:
        return f"{detector.detector}: {wanted}"
    stands = "holds" if holds else "not"
    return f"{detector.detector}: {_reading(headroom, detector)}; {stands}: {wanted}"


def _condition(detector: Detector) -> str:
    match detector:
        case PoolFree():
            beside = " beside the room kept" if detector.keep_room else ""
            return f"less than {detector.below} free{beside}, until {detector.until}"
        case PoolFills():
            return f"full within {show_usec(detector.within)}"
        case Stalled():
            whose = "of the pool" if detector.scope == "pool" else "of an important session"
            return f"more than {detector.above:.3g} of the time {whose}, until {detector.until:.3g}"
        case IoStalled():
            whose = "of the pool" if detector.scope == "pool" else "of an important session"
            much = f"more than {detector.above:.3g} of the time {whose}"
            return f"{much} goes into waiting for disks, until {detector.until:.3g}"
        case Growing():
            return f"more than {detector.above} a second"


def _reading(headroom: Headroom, detector: Detector) -> str:
    match detector:
        case PoolFree():
            kept = ""
            if detector.keep_room and headroom.reserve_bytes:
                kept = f", of which {show_bytes(headroom.reserve_bytes)} are room kept"
            return f"{_free(headroom.now)} free{kept}"
        case PoolFills():
            left_s = _until_free_s(headroom, 0)
            if left_s is None:
                return "it does not grow"
            return f"full in {_soon(left_s)} as it grows now"
        case Stalled():
            share = stalled_share(headroom, detector.scope)
            if share is None:
                return "this kernel does not tell (no PSI)"
            return f"stalled {share:.3g} of the time"
        case IoStalled():
            share = io_stalled_share(headroom, detector.scope)
            if share is None:
                return "this kernel does not tell (no PSI)"
            return f"stalled on disks {share:.3g} of the time"
        case Growing():
            return f"grows by {show_bytes(max(0.0, headroom.growth_bytes_per_s))} a second"


def _free(now: Snapshot) -> str:
    percent = 100 * now.free_bytes / now.limit_bytes if now.limit_bytes else 0.0
    return f"{show_bytes(max(0, now.free_bytes))} of {show_bytes(now.limit_bytes)} ({percent:.3g}%)"


def _until_free_s(headroom: Headroom, edge_bytes: int) -> float | None:
    """Return the seconds until no more than `edge_bytes` are free, at the present growth; None:
    never."""
    above = headroom.now.free_bytes - edge_bytes
    if above <= 0:
        return 0.0
    growth = headroom.growth_bytes_per_s
    return above / growth if growth > 0 else None


def _soon(seconds: float) -> str:
    return show_usec(seconds * 1e6) if math.isfinite(seconds) and seconds < 86_400 else "days"


# One call


def explain(
    policy: Policy,
    snapshot: Snapshot,
    state: State,
    call_id: str,
    history: Iterable[pb.Feedback] = (),
    held: str = "",
) -> pb.Explanation:
    """Return how the policy sees a call of the snapshot, what was done to it (`history`), and what
    would come next. `held`: the call that the operator holds paused, this or one that it is in.
    Raises KeyError if the call is not there."""
    call = next((c for c in snapshot.calls if c.id == call_id), None)
    if call is None:
        raise KeyError(call_id)
    headroom = Headroom(policy, snapshot)
    outlook = [*_ways_back(headroom, call), *_outlook(headroom, state, call)]
    if held:
        outlook = [f"it goes on after 'agentcg resume {held}', whatever the policy decides"]
    return pb.Explanation(
        call_id=call_id,
        sentence=_standing(headroom, call, bool(held)),
        numbers=_numbers(headroom, call),
        history=history,
        outlook=outlook,
    )


def _standing(headroom: Headroom, call: CallView, held: bool) -> str:
    holds = show_bytes(call.memory_bytes)
    if held:
        doing = f"is held paused by the operator, with {holds}"
    elif call.frozen_for_usec is not None:
        doing = f"has been paused for {show_usec(call.frozen_for_usec)} with {holds}"
    elif call.growth_bytes_per_s > 0:
        doing = f"runs with {holds}, growing by {show_bytes(call.growth_bytes_per_s)} a second"
    else:
        doing = f"runs with {holds}"
    parts = [f"{call.name!r} {doing} (priority {call.priority})"]
    if call.denied_growth_bytes is not None:
        parts.append("more memory is denied")
    if call.throttled_growth_bytes is not None:
        parts.append("it is slowed")
    leader = headroom.leader
    if leader is None or leader.id == call.id:
        parts.append("it leads: the policy never pauses it while it runs")
    else:
        why = lead_of(leader, call)
        first = f"{leader.name!r} of session {leader.session_id}"
        parts.append(f"{first} goes first, which is {why}")
    return "; ".join(parts) + f"; {_free(headroom.now)} are free."


def _numbers(headroom: Headroom, call: CallView) -> dict[str, float]:
    """Return what is known in numbers; what is not known is absent."""
    now = headroom.now
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
        "leader_room_bytes": headroom.reserve_bytes,
    }
    return {name: float(value) for name, value in known.items() if value is not None}


def _ways_back(headroom: Headroom, call: CallView) -> Iterator[str]:
    """Say when what was done to a call ends."""
    if call.denied_growth_bytes is not None:
        yield f"no longer denied when {_enough(headroom, 'deny')}"
    if call.throttled_growth_bytes is not None:
        yield f"no longer slowed when {_enough(headroom, 'throttle')}"
    if call.frozen_for_usec is None:
        return
    yield f"it goes on when {_enough(headroom, 'freeze')}, or when nothing else runs"
    left = headroom.settings.lease - call.frozen_for_usec
    when = f"in {show_usec(left)} at the latest" if left > 0 else "now: its lease is over"
    yield f"it goes on {when}, as soon as there is any room"
    ahead = headroom.frozen.index(call)
    if ahead:
        yield f"{ahead} paused call{'s go' if ahead > 1 else ' goes'} on before it"


def _enough(headroom: Headroom, action: str) -> str:
    """Say how much must be free for no ruleset of this action to hold."""
    rulesets = [r for r in headroom.policy.rulesets if r.enabled and r.do.action == action]
    needed = [
        d.until.of(headroom.now.limit_bytes) + (headroom.reserve_bytes if d.keep_room else 0)
        for r in rulesets
        for d in r.when
        if isinstance(d, PoolFree)
    ]
    return f"{show_bytes(max(needed))} of the pool are free" if needed else "its ruleset ends"


# What comes next for a call


@dataclass(frozen=True, slots=True)
class _Step:
    """What a ruleset may do to a call, and in how many seconds (infinite: not as things go)."""

    seconds: float
    sentence: str
    action: str


def _outlook(headroom: Headroom, state: State, call: CallView) -> Iterator[str]:
    """Say what each ruleset could do to a call next, the soonest first."""
    steps = list(_steps(headroom, state, call))
    if call.frozen_for_usec is not None:
        steps = [s for s in steps if s.action == "kill"]
    for step in sorted(steps, key=lambda s: s.seconds):
        yield step.sentence
    if not steps:
        yield "no ruleset would do anything to it as things are"


def _steps(headroom: Headroom, state: State, call: CallView) -> Iterator[_Step]:
    """Yield a step for each ruleset that could choose a call, in the order of the policy."""
    for ruleset in headroom.policy.rulesets:
        action = ruleset.do.action
        if not ruleset.enabled or action not in _DOES or not _touches(headroom, ruleset, call):
            continue
        rule = state.rules.get(ruleset.name, RuleState())
        waits = [
            0.0 if _holds(headroom, ruleset, rule, index) else _wait_s(headroom, detector)
            for index, detector in enumerate(ruleset.when)
        ]
        seconds = max(waits)
        if seconds == 0:
            when = "that is so now" + _proviso(headroom, ruleset, call)
        elif math.isinf(seconds):
            when = "not as things are going now"
        else:
            proviso = _proviso(headroom, ruleset, call)
            when = f"in {_soon(seconds)} as the pool grows now{proviso}"
        dry = " (dry run: only said)" if headroom.policy.dry_run or ruleset.dry_run else ""
        conditions = " and ".join(_condition(d) for d in ruleset.when)
        sentence = f"{ruleset.name}: it {_DOES[action]}{dry} at {conditions}: {when}"
        yield _Step(seconds, sentence, action)


def _wait_s(headroom: Headroom, detector: Detector) -> float:
    """Return the seconds until a detector that does not hold would, as the pool grows now."""
    if isinstance(detector, PoolFree):
        reserve = headroom.reserve_bytes if detector.keep_room else 0
        edge = detector.below.of(headroom.now.limit_bytes) + reserve
        left = _until_free_s(headroom, edge)
    elif isinstance(detector, PoolFills):
        full = _until_free_s(headroom, 0)
        left = None if full is None else max(0.0, full - detector.within / 1e6)
    else:
        left = None  # Nothing says how stalls or growth go on.
    return math.inf if left is None else left


def _touches(headroom: Headroom, ruleset: Ruleset, call: CallView) -> bool:
    """Tell whether a ruleset's action chooser could ever choose a call."""
    host, do, leader = headroom.now.host, ruleset.do, headroom.leader
    if call.priority >= ruleset.spare_priority or leader is None or leader.id == call.id:
        return False
    if do.action == "throttle":
        return call.throttled_growth_bytes is None and can_throttle(host, do)
    if do.action == "deny":
        willing = do.whom == "all" or call.on_pressure == "deny"
        return host.can_deny and willing and call.denied_growth_bytes is None
    return True


def _proviso(headroom: Headroom, ruleset: Ruleset, call: CallView) -> str:
    """Say why the call may be spared all the same; nothing where it would not be."""
    if ruleset.do.action == "kill":
        return ", if nothing else could be done"
    return "" if call in headroom.growing else ", if it grows then"
