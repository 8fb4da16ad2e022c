"""Rungs on disks: who is held back while important work waits for them, and when that ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from agentcgroupd.policy.engine import decide
from agentcgroupd.policy.explain import policy_state
from agentcgroupd.policy.load import Loaded
from agentcgroupd.policy.schedule import holds_back
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import TICK, Action, CallIo, Host, Snapshot, State
from tests.unit.policy.test_engine import call, session, shipped, snapshot

MIB = 1 << 20
HOST = Host(has_io_max=True)
WITH_WEIGHTS = replace(HOST, has_io_weight=True)
VIP = session("vip", priority=80, io_stalled_share=0.6)
POLICY = shipped("default")


def uses(name: str, mib_per_s: float, **changes: Any) -> CallIo:
    """A call of normal priority that reads and writes so much."""
    base = CallIo(name, name, "s", 50, mib_per_s * MIB)
    return replace(base, **changes)


def waiting(*calls: CallIo, host: Host = HOST, **changes: Any) -> Snapshot:
    """A roomy pool in which important work waits for disks."""
    given = {"sessions": (VIP,), "io_stalled_share": 0.7, "io_calls": calls, "host": host}
    return snapshot(call("any"), free=900, **{**given, **changes})


def actions(now: Snapshot, state: State | None = None) -> list[tuple[Action, str, int]]:
    decided = decide(POLICY, now, TICK, state or State()).decisions
    return [(d.action, d.subject, d.amount) for d in decided]


def test_the_least_important_who_use_most_are_held_first() -> None:
    calls = (uses("a", 12), uses("b", 50), uses("low", 10, priority=20), uses("little", 0.5))
    found = actions(waiting(*calls))
    assert found == [(Action.IO_MAX, "low", MIB // 2), (Action.IO_MAX, "b", 5 * MIB // 2)]
    (why, _) = (d.why for d in decide(POLICY, waiting(*calls), TICK, State()).decisions)
    assert "10 MiB a second" in why and why.startswith("Held to 512 KiB a second of each disk")


def test_those_that_use_nearly_as_much_are_held_together() -> None:
    alike = [uses(f"hog{n}", 10 - 0.75 * n) for n in range(10)]
    found = actions(waiting(*alike, uses("less", 2), uses("other", 9.9, priority=51)))
    assert [subject for _, subject, _ in found] == [call.id for call in alike]


def test_what_is_left_at_least() -> None:
    calls = (uses("small", 0.3), uses("least", 0.2), uses("tiny", 0.1))
    assert actions(waiting(*calls)) == [(Action.IO_MAX, "small", MIB // 4)]
    inside = (replace(each, session_id="vip") for each in calls)
    assert actions(waiting(*inside, host=WITH_WEIGHTS)) == [(Action.IO_WEIGHT, "small", 10)]


def test_important_calls_are_spared() -> None:
    assert actions(waiting(uses("vip", 100, priority=80))) == []


def test_weights_come_before_rates() -> None:
    busy = uses("a", 100, session_id="vip")
    assert actions(waiting(busy, host=WITH_WEIGHTS)) == [(Action.IO_WEIGHT, "a", 10)]
    lowered = replace(busy, weight_lowered_usec=1000)
    assert actions(waiting(lowered, host=WITH_WEIGHTS)) == [(Action.IO_MAX, "a", 5 * MIB)]
    held = replace(lowered, held_usec=1000)
    assert actions(waiting(held, host=WITH_WEIGHTS)) == []


def test_the_weight_of_a_call_in_another_session_helps_nobody() -> None:
    """The kernel weighs it against other calls of its own session."""
    now = waiting(uses("a", 100), host=WITH_WEIGHTS)
    assert actions(now) == [(Action.IO_MAX, "a", 5 * MIB)]


def test_nothing_is_decided_where_the_kernel_can_do_neither() -> None:
    assert actions(waiting(uses("a", 100), host=Host())) == []


@pytest.mark.parametrize("share", [0.0, 0.29, None])
def test_nobody_is_held_while_nobody_important_waits(share: float | None) -> None:
    vip = replace(VIP, io_stalled_share=share or 0.0)
    now = waiting(uses("a", 100), sessions=(vip,), io_stalled_share=share)
    assert actions(now) == []


def test_what_was_held_back_is_given_back_when_the_pressure_is_over() -> None:
    first = decide(POLICY, waiting(uses("a", 100)), TICK, State())
    held = uses("a", 10, held_usec=2_000_000, weight_lowered_usec=11_000_000)
    less = replace(VIP, io_stalled_share=0.2)
    assert actions(waiting(held, sessions=(less,)), first.state) == [], "hysteresis"
    calm = waiting(held, sessions=(replace(VIP, io_stalled_share=0.05),))
    assert actions(calm, first.state) == [(Action.IO_UNWEIGHT, "a", 0)], "the rate is not 10 s old"
    older = replace(held, held_usec=10_000_000, weight_lowered_usec=None)
    assert actions(replace(calm, io_calls=(older,)), first.state) == [(Action.IO_UNMAX, "a", 0)]
    assert holds_back(replace(calm, io_calls=(older,)), ())
    assert not holds_back(replace(calm, io_calls=(uses("a", 10),)), ())


def test_without_its_ruleset_nothing_stays_held() -> None:
    held = uses("a", 10, held_usec=0, weight_lowered_usec=0)
    decided = decide(Policy(), waiting(held), TICK, State()).decisions
    assert {d.action for d in decided} == {Action.IO_UNWEIGHT, Action.IO_UNMAX}


def test_a_call_that_uses_disks_is_paused_all_the_same() -> None:
    grows = call("hog", growth_bytes_per_s=200.0 * MIB, began_usec=5, memory_bytes=600 * MIB)
    vip = call("vip", priority=80)
    now = replace(
        snapshot(grows, vip, free=5),
        sessions=(VIP,),
        io_stalled_share=0.7,
        io_calls=(uses("hog", 100),),
        host=HOST,
    )
    first = POLICY.model_copy(update={"rulesets": (POLICY.rulesets[-1], *POLICY.rulesets)})
    for policy, expected in ((POLICY, {Action.FREEZE}), (first, {Action.FREEZE, Action.IO_MAX})):
        decided = decide(policy, now, TICK, State()).decisions
        assert {d.action for d in decided if d.subject == "hog"} == expected


def test_how_a_ruleset_stands_is_said() -> None:
    loaded = Loaded(POLICY, (), "")
    state = policy_state(loaded, snapshot=waiting(uses("a", 100)), state=State())
    (said,) = next(r.detectors for r in state.rulesets if r.name == "hold-disks")
    assert said == (
        "io_stalled: stalled on disks 0.6 of the time; holds: more than 0.3 of the time of an "
        "important session goes into waiting for disks, until 0.1"
    )


def test_until_lies_below_above() -> None:
    when = {"detector": "io_stalled", "above": 0.1, "until": 0.2}
    ruleset = {"name": "x", "when": [when], "do": {"action": "io_max"}}
    with pytest.raises(ValueError, match=r"less than above, which is 0\.1"):
        Policy.model_validate({"rulesets": [ruleset]})
