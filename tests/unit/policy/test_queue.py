"""admit(): who may start, by properties that hold whatever waits."""

from __future__ import annotations

import time
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.policy.queue import Waiting, admit, free_for_admission_bytes, in_order, is_small
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import CallView, SessionView, Snapshot

MIB = 1 << 20
SECOND = 1_000_000
POLICY = Policy.model_validate({"admission": {"small": "64M", "age_step": "5s"}})
NOW = 1000 * SECOND


def snapshot(free: int, *calls: CallView, sessions: tuple[SessionView, ...] = ()) -> Snapshot:
    """A pool of 4,000 MiB with `free` MiB left."""
    return Snapshot(
        now_usec=NOW,
        limit_bytes=4000 * MIB,
        usage_bytes=(4000 - free) * MIB,
        growth_bytes_per_s=0.0,
        calls=calls,
        sessions=sessions,
    )


def running(holds: int, expects: int = 0) -> CallView:
    """A running call; sizes in MiB."""
    return CallView(
        id="r",
        name="r",
        session_id="r",
        priority=50,
        began_usec=0,
        cpu_usec=0,
        memory_bytes=holds * MIB,
        growth_bytes_per_s=0.0,
        expected_bytes=expects * MIB,
    )


def waits(
    name: str,
    expects: int,
    priority: int = 50,
    age_s: float = 0.0,
    wait_s: float = 60.0,
    session: str = "s",
) -> Waiting:
    """A waiting call; sizes in MiB."""
    since = NOW - int(age_s * SECOND)
    return Waiting(name, session, priority, expects * MIB, since, since + int(wait_s * SECOND))


waiting = st.lists(
    st.builds(
        lambda expects, priority, age, wait: (expects, priority, age, wait),
        st.integers(1, 3000),
        st.integers(0, 100),
        st.floats(-5, 300),
        st.floats(0.1, 300),
    ),
    max_size=30,
).map(lambda rows: [waits(f"w{i}", *row) for i, row in enumerate(rows)])


@given(waiting, st.integers(0, 4000), st.integers(0, 2000))
def test_what_starts_fits_into_what_is_left(rows: list[Waiting], free: int, promised: int) -> None:
    now = snapshot(free, running(100, 100 + promised))
    started = admit(POLICY, now, rows)
    assert len(set(started)) == len(started) and set(started) <= {w.id for w in rows}
    large = [w for w in rows if w.id in started and not is_small(POLICY, w.expected_bytes, 1 << 32)]
    assert sum(w.expected_bytes for w in large) <= max(0, free_for_admission_bytes(POLICY, now))
    small = {w.id for w in rows if is_small(POLICY, w.expected_bytes, 1 << 32)}
    assert small <= set(started), "small calls never wait"


@given(waiting, st.integers(0, 4000))
def test_the_first_is_not_passed_for_ever(rows: list[Waiting], free: int) -> None:
    """Once a call that does not fit has waited for half of its time, no call behind it takes
    memory."""
    started = set(admit(POLICY, snapshot(free, running(100)), rows))
    blocked = False
    for w in in_order(POLICY, NOW, rows):
        if is_small(POLICY, w.expected_bytes, 1 << 32):
            continue
        if blocked:
            assert w.id not in started
        half = w.since_usec + (w.deadline_usec - w.since_usec) // 2
        blocked = blocked or (w.id not in started and half <= NOW)


@given(waiting)
def test_in_an_idle_pool_somebody_always_starts(rows: list[Waiting]) -> None:
    """The first call starts however large it is: no call is there that could give memory back."""
    assert bool(admit(POLICY, snapshot(0), rows)) == bool(rows)


def test_priority_then_age_and_age_outweighs_priority_in_time() -> None:
    batch, vip = waits("batch", 500, priority=20, age_s=31), waits("vip", 500, priority=80)
    assert [w.id for w in in_order(POLICY, NOW, [vip, batch])] == ["batch", "vip"]
    younger = replace(batch, since_usec=NOW - 29 * SECOND)
    assert [w.id for w in in_order(POLICY, NOW, [younger, vip])] == ["vip", "batch"]


def test_a_clock_that_jumps_back_lets_nobody_age_backwards() -> None:
    ahead = waits("ahead", 500, age_s=-3600)
    assert [w.id for w in in_order(POLICY, NOW, [waits("b", 500, age_s=1), ahead])] == [
        "b",
        "ahead",
    ]
    assert admit(POLICY, snapshot(4000, running(1)), [ahead]) == ["ahead"]


def test_a_guarantee_is_not_queued_for_and_given_once() -> None:
    owner = SessionView("owner", 50, 100 * MIB, 100 * MIB, guarantee_bytes=500 * MIB)
    now = snapshot(0, running(100), sessions=(owner,))
    mine = [waits("a", 300, session="owner"), waits("b", 300, session="owner", age_s=1)]
    assert admit(POLICY, now, mine) == ["b"]


def test_hundreds_in_one_tick() -> None:
    crowd = [waits(f"w{i}", 100 + i % 7, priority=i % 100, age_s=i / 100) for i in range(500)]
    began = time.perf_counter()
    started = admit(POLICY, snapshot(2500, running(100)), crowd)
    assert time.perf_counter() - began < 0.25
    order = [w.id for w in in_order(POLICY, NOW, crowd)]
    assert started == order[: len(started)], "the first in the queue"
    assert 20 <= len(started) <= 25


def names(rows: list[Waiting], turns: dict[str, int] | None = None) -> list[str]:
    """The order in which calls are to start, by name."""
    return [w.id for w in in_order(POLICY, NOW, rows, turns)]


@given(waiting, st.integers(1, 5))
def test_the_order_has_every_call_once(rows: list[Waiting], sessions: int) -> None:
    spread = [replace(w, session_id=str(i % sessions)) for i, w in enumerate(rows)]
    assert sorted(names(spread)) == sorted(w.id for w in rows)
    for session in range(sessions):
        mine = [w for w in spread if w.session_id == str(session)]
        in_all = [name for name in names(spread) if name in {w.id for w in mine}]
        assert in_all == names(mine)


def test_a_session_with_many_calls_delays_another_by_one() -> None:
    crowd = [waits(f"c{i:03}", 500, age_s=50, session="greedy") for i in range(200)]
    victim = waits("victim", 500, age_s=1, session="victim")
    assert names([*crowd, victim])[:3] == ["c000", "victim", "c001"]
    # After its turn it ages anew: who came before that turn is first.
    assert names([*crowd, victim], {"greedy": NOW})[:2] == ["victim", "c000"]


def test_who_holds_calls_unused_keeps_no_large_call_back() -> None:
    huge = waits("huge", 3900, age_s=40, session="greedy")
    victim = waits("victim", 500, age_s=1, session="victim")
    now = snapshot(2000, running(100))
    assert admit(POLICY, now, [huge, victim]) == []
    assert admit(POLICY, now, [huge, victim], {"greedy": NOW}) == ["victim"]
