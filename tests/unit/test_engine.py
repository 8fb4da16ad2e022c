"""decide(): pure, deterministic, and never without a way forward."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.policy.engine import Action, CallView, Snapshot, decide

MIB = 1 << 20


def call(name: str, **changes: object) -> CallView:
    """A running call of 100 MiB that does not grow."""
    base = CallView(
        id=name, name=name, priority=50, began_usec=0, memory_bytes=100 * MIB,
        growth_bytes_per_s=0.0, cpu_usec=1_000_000,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def snapshot(*calls: CallView, free: int, **changes: object) -> Snapshot:
    """A pool of 1,000 MiB with `free` MiB left."""
    base = Snapshot(
        limit_bytes=1000 * MIB, usage_bytes=(1000 - free) * MIB,
        growth_bytes_per_s=sum(c.growth_bytes_per_s for c in calls),
        reserve_bytes=60 * MIB, resume_bytes=120 * MIB, lease_usec=120_000_000,
        since_thaw_usec=10_000_000, cooldown_usec=250_000, calls=calls,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def actions(now: Snapshot) -> list[tuple[Action, str]]:
    """What is decided, without the words."""
    return [(d.action, d.call_id) for d in decide(now)]


FAST = 200.0 * MIB


def test_with_room_nothing_happens() -> None:
    assert decide(snapshot(call("a", growth_bytes_per_s=FAST), call("b"), free=500)) == []


def test_the_least_important_growing_call_is_frozen_first() -> None:
    now = snapshot(
        call("vip", priority=80, growth_bytes_per_s=FAST),
        call("batch", priority=20, growth_bytes_per_s=FAST),
        call("still", priority=20),
        free=50,
    )
    assert actions(now) == [(Action.FREEZE, "batch")]
    assert "vip" in decide(now)[0].why and "50 MiB" in decide(now)[0].why


def test_room_is_kept_for_a_growing_leader() -> None:
    vip = call("vip", priority=80, growth_bytes_per_s=FAST, memory_bytes=200 * MIB)
    batch = call("batch", priority=20, growth_bytes_per_s=FAST)
    assert actions(snapshot(vip, batch, free=240)) == [(Action.FREEZE, "batch")]
    assert actions(snapshot(vip, batch, free=280)) == []
    limited = replace(vip, memory_max_bytes=210 * MIB)
    assert actions(snapshot(limited, batch, free=240)) == []
    expecting = replace(vip, memory_expected_bytes=600 * MIB)
    assert actions(snapshot(expecting, batch, free=400)) == [(Action.FREEZE, "batch")]


def test_among_equals_the_oldest_leads() -> None:
    old = call("old", growth_bytes_per_s=FAST, began_usec=1)
    new = call("new", growth_bytes_per_s=FAST, began_usec=2)
    assert actions(snapshot(new, old, free=50)) == [(Action.FREEZE, "new")]


def test_a_frozen_call_holds_until_there_is_room_again() -> None:
    frozen = call("batch", priority=20, frozen_for_usec=5_000_000)
    assert actions(snapshot(call("vip", priority=80), frozen, free=100)) == []
    assert actions(snapshot(call("vip", priority=80), frozen, free=130)) == [(Action.THAW, "batch")]


def test_one_is_thawed_at_a_time_and_the_most_important_first() -> None:
    a = call("a", priority=20, frozen_for_usec=1)
    b = call("b", priority=40, frozen_for_usec=1)
    now = snapshot(call("vip", priority=80), a, b, free=500)
    assert actions(now) == [(Action.THAW, "b")]
    assert actions(replace(now, since_thaw_usec=1000)) == []


def test_a_lease_ends_earlier_than_the_room_for_all() -> None:
    frozen = call("batch", priority=20, frozen_for_usec=121_000_000)
    assert actions(snapshot(call("vip"), frozen, free=70)) == [(Action.THAW, "batch")]


def test_when_nothing_runs_something_is_thawed_however_full_the_pool_is() -> None:
    frozen = call("batch", frozen_for_usec=1)
    assert actions(snapshot(frozen, free=0)) == [(Action.THAW, "batch")]


def test_killing_is_last_and_takes_the_least_work_for_the_most_memory() -> None:
    leader = call("vip", priority=80, growth_bytes_per_s=FAST)
    worked = call("worked", priority=20, frozen_for_usec=1, cpu_usec=600_000_000)
    fresh = call("fresh", priority=20, frozen_for_usec=1, cpu_usec=100_000)
    assert actions(snapshot(leader, worked, fresh, free=50)) == []
    now = snapshot(leader, worked, fresh, free=10)
    assert actions(now) == [(Action.KILL, "fresh")]
    willing = replace(worked, on_pressure="kill")
    assert actions(snapshot(leader, willing, fresh, free=10)) == [(Action.KILL, "worked")]


def test_nobody_is_killed_for_a_leader_that_does_not_grow() -> None:
    frozen = call("batch", priority=20, frozen_for_usec=1)
    assert actions(snapshot(call("vip", priority=80), frozen, free=5)) == []


def test_nobody_more_important_is_killed() -> None:
    leader = call("leader", priority=20, growth_bytes_per_s=FAST)
    vip = call("vip", priority=80, frozen_for_usec=1)
    assert actions(snapshot(leader, vip, free=5)) == []


views = st.builds(
    CallView,
    id=st.sampled_from("abcdefgh"), name=st.just("tool"), priority=st.integers(0, 100),
    began_usec=st.integers(0, 10), memory_bytes=st.integers(0, 500 * MIB),
    growth_bytes_per_s=st.floats(0, 2e9), cpu_usec=st.integers(0, 10**9),
    frozen_for_usec=st.none() | st.integers(0, 10**9),
    on_pressure=st.sampled_from(["freeze", "throttle", "kill"]),
)  # fmt: skip


@given(st.lists(views, max_size=8, unique_by=lambda c: c.id), st.integers(-100, 1000))
def test_properties(calls: list[CallView], free: int) -> None:
    now = snapshot(*calls, free=free)
    decisions = decide(now)
    assert decisions == decide(now), "deterministic"
    by_id = {c.id: c for c in calls}
    running = {c.id for c in calls if c.frozen_for_usec is None}
    for decision in decisions:
        target = by_id[decision.call_id]
        assert decision.why
        if decision.action is Action.FREEZE:
            assert target.id in running
        if decision.action is Action.THAW:
            assert target.id not in running
    frozen_now = {d.call_id for d in decisions if d.action is Action.FREEZE}
    killed = {d.call_id for d in decisions if d.action is Action.KILL}
    thawed = {d.call_id for d in decisions if d.action is Action.THAW}
    if calls:
        # Something always goes on, so that memory comes back.
        assert (running - frozen_now - killed) | thawed
    if running:
        top = max(by_id[i].priority for i in running)
        leaders = [i for i in running if by_id[i].priority == top]
        assert set(leaders) - frozen_now - killed, "the most important call is never held up"
    assert len(killed) <= 1 and len(thawed) <= 1
    assert not (killed and frozen_now), "killed only when freezing has nothing left to do"


def test_a_call_that_would_rather_be_denied_is_denied_where_that_works() -> None:
    vip = call("vip", priority=80, growth_bytes_per_s=FAST)
    eager = call("eager", priority=20, growth_bytes_per_s=FAST, on_pressure="deny")
    assert actions(snapshot(vip, eager, free=50, can_deny=True)) == [(Action.DENY, "eager")]
    assert actions(snapshot(vip, eager, free=50)) == [(Action.FREEZE, "eager")]


def test_denying_is_followed_by_freezing_only_when_it_was_not_enough() -> None:
    vip = call("vip", priority=80, growth_bytes_per_s=FAST)
    held = call("eager", priority=20, growth_bytes_per_s=FAST, on_pressure="deny",
                denied_growth_bytes=10 * MIB)  # fmt: skip
    assert actions(snapshot(vip, held, free=50, can_deny=True)) == []
    loose = replace(held, denied_growth_bytes=100 * MIB)
    assert actions(snapshot(vip, loose, free=50, can_deny=True)) == [(Action.FREEZE, "eager")]


def test_growth_is_allowed_again_when_the_leader_has_its_room() -> None:
    vip = call("vip", priority=80, growth_bytes_per_s=FAST, memory_bytes=200 * MIB)
    held = call("eager", priority=20, denied_growth_bytes=0)
    assert actions(snapshot(vip, held, free=300, can_deny=True)) == []
    assert actions(snapshot(vip, held, free=330, can_deny=True)) == [(Action.ALLOW, "eager")]
    still = replace(vip, growth_bytes_per_s=0.0)
    assert actions(snapshot(still, held, free=130, can_deny=True)) == [(Action.ALLOW, "eager")]
