"""Credit: what all may take without asking is never more than what is free."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from agentcgroupd.policy import credit
from agentcgroupd.policy.credit import Account, Budget
from agentcgroupd.policy.engine import hold_free_bytes
from agentcgroupd.policy.load import load_policy
from agentcgroupd.policy.snapshot import CallView, Snapshot

MIB, GIB = 1 << 20, 1 << 30
POLICY = load_policy(None, None).policy
LIMIT = 8 * GIB
HOLD = hold_free_bytes(POLICY, LIMIT)


def account(
    name: str,
    held_mib: int,
    unused_mib: int = 0,
    *,
    priority: int = 50,
    asks: bool = True,
    held: bool = False,
    mib_per_s: float = math.inf,
    paused_s: int = 0,
) -> Account:
    """A call that grows, with so much more to take without asking."""
    view = CallView(
        id=name,
        name=name,
        session_id="s",
        priority=priority,
        began_usec=0,
        memory_bytes=held_mib * MIB,
        growth_bytes_per_s=mib_per_s * MIB,
        cpu_usec=0,
        paused_usec=paused_s * 1_000_000,
    )
    return Account(view, (held_mib + unused_mib) * MIB, asks, held=held)


def seen(*peaks_mib: int) -> Snapshot:
    peaks = tuple(sorted(p * MIB for p in peaks_mib))
    return Snapshot(
        now_usec=0,
        limit_bytes=LIMIT,
        usage_bytes=0,
        growth_bytes_per_s=0.0,
        calls=(),
        peaks_bytes=peaks,
    )


def served(free_mib: int, *accounts: Account, peaks: tuple[int, ...] = ()) -> dict[str, int]:
    """Tell who gets how many MiB more, in a pool of 8 GiB in which nobody else has credit."""
    unused = sum(a.unused_bytes for a in accounts)
    budget = Budget(free_mib * MIB, unused, len(accounts))
    given = credit.serve(POLICY, seen(*peaks), budget, accounts)
    bounds = {a.view.id: a.bound_bytes for a in accounts}
    return {name: (bound - bounds[name]) // MIB for name, bound in given.items()}


def test_who_grows_gets_64_mib_or_a_quarter_of_what_it_holds() -> None:
    assert served(8000, account("small", 10)) == {"small": 64}
    assert served(7000, account("large", 800)) == {"large": 200}
    assert served(6000, account("huge", 2000)) == {"huge": 256}


def test_of_many_of_which_nothing_is_known_a_few_grow_first() -> None:
    herd = [account(f"g{i:03}", 20) for i in range(100)]
    first = served(6000, *herd)
    assert 2 <= len(first) <= 6
    known = served(6000, *herd, peaks=(200, 200, 200))
    assert 25 <= len(known) <= 32


def test_the_more_important_goes_first_then_who_is_further_on() -> None:
    near, far = account("near", 100), account("far", 300)
    assert list(served(700, near, far)) == ["far"]
    vip = account("vip", 50, priority=80)
    assert list(served(700, near, far, vip)) == ["vip"]


def test_the_first_gets_what_is_there_and_the_others_leave_it_what_it_may_need() -> None:
    first, other = account("first", 400), account("other", 100)
    assert served(150, first, other) == {"first": 100}
    assert served(60, first, other)["first"] < 60
    assert served(5, first, other) == {}
    # 2 GiB less what it holds are kept for the first, and its overshoot is not its neighbours'.
    assert "other" not in served(2400, first, other)
    assert "other" in served(2900, first, other)


def test_of_one_that_grows_slowly_the_next_second_is_reckoned_with() -> None:
    """A tenth of the pool is kept for each of which nothing is known, so only a few may grow."""
    first = account("first", 400, 2000, asks=False)
    slow = [account(f"slow{i}", 20, mib_per_s=30) for i in range(20)]
    fast = [account(f"fast{i}", 20) for i in range(20)]
    free = HOLD // MIB + 2000 + 20 * (2 + 1) + 820  # with the overshoot of each
    assert len(served(free, first, *fast)) == 1
    assert 10 <= len(served(free, first, *slow)) <= 13  # steps of 64 MiB


def test_who_was_paused_longest_goes_before_who_is_further_on() -> None:
    first = account("first", 900, 2000, asks=False)
    far, late = account("far", 300), account("late", 20, paused_s=3)
    free = HOLD // MIB + 2000 + 900
    assert served(free, first, far, late).keys() == {"late"}
    assert served(free, first, far, replace(late, view=replace(late.view, paused_usec=999_999)))
    assert served(free, first, far, account("late", 20)).keys() == {"far"}
    # Among those that wait, not of all: who goes first is still the one that is furthest on.
    assert next(iter(served(2000, account("first", 900), late))) == "first"


def test_an_important_call_gets_at_once_what_is_kept_for_it() -> None:
    """What others may get is the same: it was kept from them before."""
    vip, other = account("vip", 400, priority=80), account("other", 100)
    given = served(6000, vip, other)
    assert given == {"vip": 2048 - 400, "other": 64}
    common = served(6000, replace(vip, view=replace(vip.view, priority=79)), other)
    assert common == {"vip": 100, "other": 64}
    # Where that is not there, what it is likely to need: to hold a tenth of the pool.
    assert served(800, vip, other) == {"vip": 819 - 400}
    assert served(300, vip, other) == {"vip": 300 - 27}  # less its overshoot, and no more


def test_an_important_call_that_begins_goes_before_those_that_hold_more() -> None:
    """Calls of which nothing is known; and less is free than an important one may take."""
    vip, other = account("vip", 8, priority=80), account("other", 100)
    assert list(served(1500, vip, other)) == ["vip"]
    common = account("vip", 8)
    assert next(iter(served(1500, common, other))) == "other"


def test_who_goes_first_while_a_more_important_one_rests_leaves_it_room() -> None:
    first = account("first", 400)
    budget = Budget(300 * MIB, 0, 2)
    alone = credit.serve(POLICY, seen(), budget, [first])
    beside = credit.serve(POLICY, seen(), budget, [first], first_leads=False)
    assert alone["first"] - first.bound_bytes == 100 * MIB
    assert beside == {} and HOLD > 300 * MIB
    more = Budget(HOLD + 50 * MIB, 0, 2)
    beside = credit.serve(POLICY, seen(), more, [first], first_leads=False)
    assert beside["first"] - first.bound_bytes == 50 * MIB


def test_a_call_that_may_not_go_on_yet_takes_nobody_s_room() -> None:
    first = account("first", 400, 64, asks=False)
    waits = replace(account("waits", 300, held=True), may_go_on=False)
    other = account("other", 100)
    assert served(2900, first, waits, other).keys() == {"other"}


accounts = st.builds(
    lambda name, held, unused, priority, asks, awaits_credit, speed, paused: account(
        name,
        held,
        unused,
        priority=priority,
        asks=asks,
        held=awaits_credit,
        mib_per_s=speed,
        paused_s=paused,
    ),
    name=st.text("abcdef", min_size=1, max_size=4),
    held=st.integers(0, 3000),
    unused=st.integers(0, 100),
    priority=st.sampled_from([20, 50, 80]),
    asks=st.booleans(),
    awaits_credit=st.booleans(),
    speed=st.sampled_from([0.0, 30.0, 1000.0, math.inf]),
    paused=st.integers(0, 10),
)


@settings(max_examples=300)
@given(
    st.lists(accounts, max_size=30, unique_by=lambda a: a.view.id),
    st.integers(-100, 8192),
    st.integers(0, 1000),
    st.lists(st.integers(5, 3000), max_size=40),
)
def test_what_all_may_take_is_never_more_than_what_is_free(
    found: list[Account], free_mib: int, others_mib: int, peaks: list[int]
) -> None:
    free, before = free_mib * MIB, sum(a.unused_bytes for a in found) + others_mib * MIB
    budget = Budget(free, before, len(found))
    given = credit.serve(POLICY, seen(*peaks), budget, found)
    by_id = {a.view.id: a for a in found}
    more = {name: bound - by_id[name].bound_bytes for name, bound in given.items()}
    assert all(size < 0 or by_id[name].asks for name, size in more.items())
    assert all(given[name] >= by_id[name].view.memory_bytes for name in more), "used is used"
    got = {name: size for name, size in more.items() if size > 0}
    # Beside an important one that may need more than there is, another gets what it needs to end.
    leading = 1 + any(a.view.priority >= 80 for a in found)
    if any(size < 0 for size in more.values()):
        assert len(got) <= leading, "what is taken back is for those that go first"
    elif len(got) > leading:
        assert before + sum(got.values()) <= free - HOLD
    if got:
        assert before + sum(got.values()) <= free


def test_what_is_not_used_is_taken_back_for_a_more_important_call() -> None:
    batch = account("batch", 1000, 1000, priority=20, asks=False)
    important = account("important", 200, priority=80)
    assert served(2200, batch, important) == {"important": 819 - 200, "batch": -1000}
    assert "batch" not in served(6000, batch, important)


def test_who_can_end_goes_first_where_the_first_cannot() -> None:
    """The important call may need 1,800 MiB more and the other one, as those before, a little."""
    peaks = (200, *[1000] * 20)
    important = account("important", 201, priority=80)
    near = account("near", 950, priority=50)
    assert served(6000, near, important, peaks=peaks)["important"] == 1000 - 201
    given = served(600, near, important, peaks=peaks)
    assert given["near"] > 0


def test_an_important_call_goes_first_as_long_as_another_can_still_end() -> None:
    """What the other one needs is left for it, and it gets that beside the important one."""
    peaks = (200, *[1000] * 20)
    near = account("near", 920)
    hold = HOLD // MIB
    got = served(hold + 600, near, account("important", 201, priority=80), peaks=peaks)
    assert 400 < got["important"] < 600 + hold - 70 and 0 < got["near"] <= 80
    using = account("important", 201, 400, priority=80, asks=False)
    got = served(hold + 600, near, using, peaks=peaks)
    assert "important" not in got, "what it has not used stays its own"
    got = served(hold + 82, near, account("important", 201, priority=80), peaks=peaks)
    assert "important" not in got and got["near"] > 0


@given(st.integers(-100, 8192), st.integers(0, 8192), st.integers(1, 20_000))
def test_first_and_resting_credit_fit_or_are_the_least(
    free_mib: int, unused_mib: int, calls: int
) -> None:
    budget = Budget(free_mib * MIB, unused_mib * MIB, calls)
    for size in (
        credit.first_bytes(POLICY, budget, LIMIT),
        credit.resting_bytes(POLICY, budget, LIMIT),
    ):
        fits = size * (calls + 1) * credit.SPREAD <= free_mib * MIB - HOLD
        assert size == credit.LEAST_BYTES or fits


def test_credit_grows_with_the_room() -> None:
    sizes = [credit.first_bytes(POLICY, Budget(f * GIB, 0, 20), LIMIT) for f in (1, 4, 8)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == 64 * MIB


def test_nobody_overtakes_the_first_by_a_guess() -> None:
    """Either may reach 2 GiB, for all that is known. Taking turns, both would be half done."""
    first, other = account("first", 1000), account("other", 450)
    assert list(served(HOLD // MIB + 1000, first, other)) == ["first"]
