"""Whose turn it is: properties of the decisions, with tenants that come, go, work and rest."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from agentcgroupd.gpu.arbiter import Arbiter, Settings, Tenant
from agentcgroupd.units import IMPORTANT_PRIORITY

GPU0, GPU1 = "GPU-0", "GPU-1"
SETTINGS = Settings(period_usec=200_000, least_turn_usec=10_000, least_percent=5)


def arbiter(*tenants: tuple[str, int, int], devices: frozenset[str] = frozenset({GPU0})) -> Arbiter:
    """With tenants that want: (id, percent, priority)."""
    made = Arbiter(SETTINGS)
    for name, percent, priority in tenants:
        made.add(Tenant(name, percent, priority, devices), 0)
        made.want(name, True, 0)
    return made


def run(
    made: Arbiter, until_usec: int, now: int = 0, each: Callable[[int], None] = lambda now: None
) -> int:
    """Turn after turn, as the daemon does; the time then."""
    while now < until_usec:
        turn = made.decide(now)
        each(now)
        now = min(until_usec, turn.until_usec) if turn.until_usec is not None else until_usec
    made.decide(now)
    return now


shares = st.lists(st.integers(2, 60), min_size=2, max_size=5).filter(lambda s: sum(s) <= 100)


@given(shares)
def test_time_is_had_in_proportion(percents: list[int]) -> None:
    made = arbiter(*((f"t{i}", p, 50) for i, p in enumerate(percents)))
    run(made, 20_000_000)
    had = [made.tenants[f"t{i}"].had_usec for i in range(len(percents))]
    assert sum(had) == 20_000_000
    for time, percent in zip(had, percents, strict=True):
        assert abs(time / sum(had) - percent / sum(percents)) < 0.01


@given(shares)
def test_everyone_has_a_turn_soon(percents: list[int]) -> None:
    """Within two periods, and as many shortest turns as there are others."""
    made = arbiter(*((f"t{i}", p, 50) for i, p in enumerate(percents)))
    last = dict.fromkeys(made.tenants, 0)
    worst = 0

    def note(now: int) -> None:
        nonlocal worst
        for name in made.turn.run:
            last[name] = now
        worst = max(worst, *(now - at for at in last.values()))

    run(made, 20_000_000, each=note)
    least = min(percents) / sum(percents)
    assert worst <= 2 * max(SETTINGS.period_usec, SETTINGS.least_turn_usec / least)


def test_alone_nobody_waits() -> None:
    made = arbiter(("a", 10, 20), ("b", 80, 50))
    made.want("b", False, 0)
    turn = made.decide(0)
    assert turn.hold == frozenset() and turn.until_usec is None and turn.run == {"a", "b"}
    # Back again, it is not owed what it did not want.
    run(made, 10_000_000)
    made.want("b", True, 10_000_000)
    before = made.tenants["a"].had_usec
    run(made, 11_000_000, 10_000_000)
    had = made.tenants["a"].had_usec - before
    assert 50_000 < had < 250_000


@given(st.integers(0, 400_000), st.integers(1, 40), st.integers(1, 50))
def test_an_important_one_goes_first_when_it_begins(at: int, percent: int, other: int) -> None:
    made = arbiter(("a", other, 20), ("b", other, 50))
    made.add(Tenant("vip", percent, IMPORTANT_PRIORITY, frozenset({GPU0})), 0)
    run(made, at)
    assert made.want("vip", True, at)
    turn = made.decide(at)
    assert "vip" in turn.run and turn.hold == {"a", "b"}


def test_a_batch_call_keeps_a_minimum() -> None:
    made = arbiter(("vip", 50, IMPORTANT_PRIORITY), ("a", 30, 20), ("b", 20, 20))
    run(made, 20_000_000)
    had = {name: t.had_usec / 20_000_000 for name, t in made.tenants.items()}
    assert abs(had["vip"] - 0.95) < 0.01
    assert abs(had["a"] - 0.03) < 0.005 and abs(had["b"] - 0.02) < 0.005


def test_devices_are_apart() -> None:
    """Those on one device do not wait for those on another; who needs both waits for both."""
    made = Arbiter(SETTINGS)
    for name, devices in (("a", {GPU0}), ("b", {GPU1}), ("both", {GPU0, GPU1})):
        made.add(Tenant(name, 50, 50, frozenset(devices)), 0)
    for name in ("a", "b"):
        made.want(name, True, 0)
    assert made.decide(0).hold == frozenset()
    made.want("both", True, 0)
    run(made, 30_000_000)
    had = {name: t.had_usec / 30_000_000 for name, t in made.tenants.items()}
    assert all(abs(share - 0.5) < 0.02 for share in had.values())


events = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "want", "rest", "change", "pass"]),
        st.integers(0, 4), st.integers(1, 100), st.integers(0, 100), st.integers(0, 300_000),
        st.sampled_from([frozenset({GPU0}), frozenset({GPU1}), frozenset({GPU0, GPU1})]),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=300)
@given(events)
def test_whatever_happens(
    steps: list[tuple[str, int, int, int, int, frozenset[str]]],
) -> None:
    """Never two that want one device at a time, never a device that is wanted and stands idle,
    never one held back that wants nothing, and always an end to a turn that holds somebody back."""
    made, now = Arbiter(SETTINGS), 0
    for what, number, percent, priority, passed, devices in steps:
        name, now = f"t{number}", now + passed
        known = name in made.tenants
        if what == "add" and not known:
            made.add(Tenant(name, percent, priority, devices), now)
        elif what == "remove":
            made.remove(name, now)
        elif what in ("want", "rest") and known:
            made.want(name, what == "want", now)
        elif what == "change" and known:
            made.change(name, percent, priority, now)
        turn = made.decide(now)
        wanting = {t.id for t in made.tenants.values() if t.wants}
        assert turn.run | turn.hold == set(made.tenants) and not turn.run & turn.hold
        assert turn.hold <= wanting
        for device in (GPU0, GPU1):
            runs = [i for i in turn.run & wanting if device in made.tenants[i].devices]
            held = [i for i in turn.hold if device in made.tenants[i].devices]
            assert len(runs) <= 1
            if held and not runs:
                # Only one that lacks another device may leave this one idle.
                assert all(len(made.tenants[i].devices) > 1 for i in held)
        assert (turn.until_usec is not None) == bool(turn.hold)
        assert turn.until_usec is None or turn.until_usec >= now + SETTINGS.least_turn_usec
