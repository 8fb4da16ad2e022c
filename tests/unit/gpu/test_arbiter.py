"""The arbiter's decisions, with tenants that come, go, work and rest."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from agentcgroupd.gpu.arbiter import Arbiter, Settings, Tenant
from agentcgroupd.units import IMPORTANT_PRIORITY

GPU0, GPU1 = "GPU-0", "GPU-1"
SETTINGS = Settings(period_usec=200_000, shortest_slice_usec=10_000, least_percent=5)


def arbiter(*tenants: tuple[str, int, int], devices: frozenset[str] = frozenset({GPU0})) -> Arbiter:
    """An arbiter whose tenants, (id, percent, priority), all want their devices."""
    made = Arbiter(SETTINGS)
    for name, percent, priority in tenants:
        made.add(Tenant(name, percent, priority, devices), 0)
        made.set_wants(name, True, 0)
    return made


def run(
    made: Arbiter, until_usec: int, now: int = 0, each: Callable[[int], None] = lambda now: None
) -> int:
    """Decide again whenever a slice ends, as the daemon does; returns the time at the end."""
    while now < until_usec:
        decided = made.decide(now)
        each(now)
        now = until_usec if decided.until_usec is None else min(until_usec, decided.until_usec)
    made.decide(now)
    return now


shares = st.lists(st.integers(2, 60), min_size=2, max_size=5).filter(lambda s: sum(s) <= 100)


@settings(deadline=None)
@given(shares)
def test_time_is_had_in_proportion(percents: list[int]) -> None:
    made = arbiter(*((f"t{i}", p, 50) for i, p in enumerate(percents)))
    run(made, 20_000_000)
    had = [made.tenants[f"t{i}"].had_usec for i in range(len(percents))]
    assert sum(had) == 20_000_000
    for time, percent in zip(had, percents, strict=True):
        assert abs(time / sum(had) - percent / sum(percents)) < 0.01


@settings(deadline=None)
@given(shares)
def test_everyone_has_a_slice_soon(percents: list[int]) -> None:
    """Nobody waits for longer than two periods, or than slices of the shortest length allow."""
    made = arbiter(*((f"t{i}", p, 50) for i, p in enumerate(percents)))
    last = dict.fromkeys(made.tenants, 0)
    worst = 0

    def note(now: int) -> None:
        nonlocal worst
        for name in made.slice.run:
            last[name] = now
        worst = max(worst, *(now - at for at in last.values()))

    run(made, 20_000_000, each=note)
    least = min(percents) / sum(percents)
    assert worst <= 2 * max(SETTINGS.period_usec, SETTINGS.shortest_slice_usec / least)


def test_alone_nobody_waits() -> None:
    made = arbiter(("a", 10, 20), ("b", 80, 50))
    made.set_wants("b", False, 0)
    decided = made.decide(0)
    assert decided.hold == frozenset() and decided.until_usec is None and decided.run == {"a", "b"}
    # Back again, it is not owed what it did not want.
    run(made, 10_000_000)
    made.set_wants("b", True, 10_000_000)
    before = made.tenants["a"].had_usec
    run(made, 11_000_000, 10_000_000)
    had = made.tenants["a"].had_usec - before
    assert 50_000 < had < 250_000


@settings(deadline=None)
@given(st.integers(0, 400_000), st.integers(1, 40), st.integers(1, 50))
def test_an_important_one_goes_first_when_it_begins(at: int, percent: int, other: int) -> None:
    made = arbiter(("a", other, 20), ("b", other, 50))
    made.add(Tenant("vip", percent, IMPORTANT_PRIORITY, frozenset({GPU0})), 0)
    run(made, at)
    assert made.set_wants("vip", True, at)
    decided = made.decide(at)
    assert "vip" in decided.run and decided.hold == {"a", "b"}


def test_a_batch_call_keeps_a_minimum() -> None:
    made = arbiter(("vip", 50, IMPORTANT_PRIORITY), ("a", 30, 20), ("b", 20, 20))
    run(made, 20_000_000)
    had = {name: t.had_usec / 20_000_000 for name, t in made.tenants.items()}
    assert abs(had["vip"] - 0.95) < 0.01
    assert abs(had["a"] - 0.03) < 0.005 and abs(had["b"] - 0.02) < 0.005


def test_devices_are_apart() -> None:
    """Tenants of one device do not wait for those of another; who needs both waits for both."""
    made = Arbiter(SETTINGS)
    for name, devices in (("a", {GPU0}), ("b", {GPU1}), ("both", {GPU0, GPU1})):
        made.add(Tenant(name, 50, 50, frozenset(devices)), 0)
    for name in ("a", "b"):
        made.set_wants(name, True, 0)
    assert made.decide(0).hold == frozenset()
    made.set_wants("both", True, 0)
    run(made, 30_000_000)
    had = {name: t.had_usec / 30_000_000 for name, t in made.tenants.items()}
    assert all(abs(share - 0.5) < 0.02 for share in had.values())


Step = tuple[str, int, int, int, int, frozenset[str]]
"""What happens, to which tenant, its percent and priority, after how long, its devices."""

steps = st.tuples(
    st.sampled_from(["add", "remove", "want", "rest", "change", "pass"]),
    st.integers(0, 4),
    st.integers(1, 100),
    st.integers(0, 100),
    st.integers(0, 300_000),
    st.sampled_from([frozenset({GPU0}), frozenset({GPU1}), frozenset({GPU0, GPU1})]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=60))
def test_whatever_happens(taken: list[Step]) -> None:
    """No device has two tenants that want it at a time or stands idle while one wants it; nobody is
    held back who wants nothing; a slice that holds somebody back ends."""
    made, now = Arbiter(SETTINGS), 0
    for what, number, percent, priority, passed, devices in taken:
        name, now = f"t{number}", now + passed
        known = name in made.tenants
        if what == "add" and not known:
            made.add(Tenant(name, percent, priority, devices), now)
        elif what == "remove":
            made.remove(name, now)
        elif what in ("want", "rest") and known:
            made.set_wants(name, what == "want", now)
        elif what == "change" and known:
            made.change(name, percent, priority, now)
        decided = made.decide(now)
        wanting = {t.id for t in made.tenants.values() if t.wants}
        assert decided.run | decided.hold == set(made.tenants) and not decided.run & decided.hold
        assert decided.hold <= wanting
        for device in (GPU0, GPU1):
            runs = [i for i in decided.run & wanting if device in made.tenants[i].devices]
            held = [i for i in decided.hold if device in made.tenants[i].devices]
            assert len(runs) <= 1
            if held and not runs:
                # Only one that lacks another device may leave this one idle.
                assert all(len(made.tenants[i].devices) > 1 for i in held)
        assert (decided.until_usec is not None) == bool(decided.hold)
        assert (
            decided.until_usec is None or decided.until_usec >= now + SETTINGS.shortest_slice_usec
        )
