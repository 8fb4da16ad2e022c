"""When the pool is sampled again, by what is free and who runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agentcgroupd.policy.growth import APART_USEC, Growth
from agentcgroupd.policy.schedule import CALM_INTERVAL_S, Schedule, holds_back, rest_s
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import (
    TICK,
    Action,
    CallView,
    Decision,
    SessionView,
    Signal,
    SignalKind,
    Snapshot,
)

GIB = 1 << 30
LIMIT = 8 * GIB
TICK_S = 0.02
POLICY = Policy.model_validate(
    {
        "headroom": {"prior": "2G"},
        "rulesets": [
            {
                "name": "freeze",
                "when": [{"detector": "pool_free", "below": "1G", "until": "2G"}],
                "do": {"action": "freeze"},
            }
        ],
    }
)
CALL = CallView(
    id="c1",
    name="Bash",
    session_id="s1",
    priority=50,
    began_usec=0,
    memory_bytes=GIB,
    growth_bytes_per_s=0.0,
    cpu_usec=0,
)


def schedule(cores: int = 2) -> Schedule:
    return Schedule(POLICY, LIMIT, TICK_S, cores)


def test_the_marks_are_the_policys() -> None:
    assert (schedule().mark_bytes, schedule().resume_bytes) == (7 * GIB, 6 * GIB)


def test_a_pool_is_calm_until_something_happens_or_a_ruleset_may_hold() -> None:
    assert schedule().is_calm(2 * GIB + 1, TICK)
    assert not schedule().is_calm(2 * GIB, TICK)
    assert not schedule().is_calm(LIMIT, Signal(SignalKind.ENDED))


def test_the_time_to_the_next_sample_is_half_of_what_the_free_memory_lasts() -> None:
    # A call of which nothing is known may take 2 GiB, and growth is stopped with 1 GiB free.
    assert schedule().interval_s(3 * GIB + GIB // 2, 1) == pytest.approx(0.125)
    assert schedule().interval_s(3 * GIB + GIB // 2, 2) == pytest.approx(0.0625)
    assert schedule().interval_s(3 * GIB, 1) == TICK_S
    assert schedule().interval_s(LIMIT, 1) == CALM_INTERVAL_S
    assert schedule().interval_s(0, 0) == CALM_INTERVAL_S


def test_no_more_calls_grow_at_once_than_there_are_cores() -> None:
    free = 4 * GIB
    assert schedule(cores=2).interval_s(free, 500) == schedule(cores=2).interval_s(free, 2)
    assert schedule(cores=64).interval_s(free, 500) == schedule(cores=8).interval_s(free, 8)


def test_a_costly_sample_is_followed_by_a_rest() -> None:
    assert rest_s(0.01) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"frozen_for_usec": 0}, True),
        ({"denied_growth_bytes": 0}, True),
        ({"throttled_growth_bytes": 0}, True),
    ],
)
def test_what_was_done_to_a_call_is_to_be_undone(change: dict[str, Any], expected: bool) -> None:
    calls = (CALL, dataclasses.replace(CALL, **change))
    assert holds_back(Snapshot(1, LIMIT, 0, 0.0, calls), ()) is expected


def test_slowed_sessions_and_fresh_decisions_are_to_be_undone() -> None:
    session = SessionView("s1", 50, GIB, GIB)
    calm = Snapshot(1, LIMIT, 0, 0.0, (), (session,))
    slowed = Snapshot(1, LIMIT, 0, 0.0, (), (dataclasses.replace(session, slowed=True),))
    assert not holds_back(calm, ()) and holds_back(slowed, ())
    assert holds_back(calm, [Decision(Action.FREEZE, "c1", "why")])


def test_growth_is_seen_at_once_and_forgotten_over_a_few_samples() -> None:
    growth = Growth()
    assert growth.of("c1", 1_000_000, GIB) == 0.0
    assert growth.of("c1", 1_500_000, 2 * GIB) == 2 * GIB
    assert growth.of("c1", 1_500_000 + APART_USEC - 1, 5 * GIB) == 2 * GIB
    assert growth.of("c1", 2_000_000, 2 * GIB) == pytest.approx(1.4 * GIB)
    growth.keep({"c2"})
    assert growth.of("c1", 3_000_000, 3 * GIB) == 0.0


def test_what_began_empty_has_grown_since() -> None:
    assert Growth().of("c1", 3_000_000, GIB, since_usec=1_000_000) == GIB / 2
