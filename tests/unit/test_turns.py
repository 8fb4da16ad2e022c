"""Turns: whose work is done next, and what is done without waiting for one."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from agentcgroupd.turns import KEYS_MOST, Turns, in_slices


def note(done: list[str], what: str, seconds: float = 0.0) -> Callable[[], None]:
    """Work that takes so long, and then is on the list."""

    def work() -> None:
        time.sleep(seconds)
        done.append(what)

    return work


async def settled(done: list[str], count: int) -> list[str]:
    """What has been done once the loop has gone round: that much."""
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(done) == count
    return done


async def in_turn() -> list[str]:
    turns, done = Turns(), list[str]()
    for number in range(3):
        turns.submit("much", note(done, f"much {number}", 0.001))
    turns.submit("little", note(done, "little"))
    assert not done, "nothing is done before its turn"
    return await settled(done, 4)


def test_who_has_had_least_is_next() -> None:
    done = asyncio.run(in_turn())
    assert done.index("little") <= 1
    assert [word for word in done if word != "little"] == ["much 0", "much 1", "much 2"]


async def at_once() -> list[str]:
    turns, done = Turns(), list[str]()
    turns.submit_or_do("one", note(done, "at once", 0.02))
    assert done == ["at once"]
    turns.submit_or_do("two", note(done, "queued"))
    assert done == ["at once"], "who has just had the loop would have all of it"
    return await settled(done, 2)


def test_what_keeps_nobody_waiting_is_done_at_once_but_not_all_the_time() -> None:
    assert asyncio.run(at_once()) == ["at once", "queued"]


async def with_somebody_waiting() -> list[str]:
    turns, done = Turns(), list[str]()
    turns.submit("one", note(done, "first"))
    turns.submit_or_do("two", note(done, "second"))
    assert not done
    return await settled(done, 2)


def test_nobody_goes_ahead_of_who_waits() -> None:
    assert asyncio.run(with_somebody_waiting()) == ["first", "second"]


async def what_follows() -> list[str]:
    turns, done = Turns(), list[str]()

    def first() -> None:
        turns.submit_or_do("its session", note(done, "what it led to"))
        done.append("first")

    turns.submit_or_do("somebody", first)
    return done


def test_what_work_leads_to_is_done_with_it() -> None:
    assert asyncio.run(what_follows()) == ["what it led to", "first"]


async def failing(how: str) -> list[str]:
    turns, done = Turns(), list[str]()

    def fail() -> None:
        raise RuntimeError("the work is broken")

    getattr(turns, how)("one", fail)
    turns.submit("two", note(done, "second"))
    return await settled(done, 1)


@pytest.mark.parametrize("how", ["submit", "submit_or_do"])
def test_what_fails_takes_nobody_along(how: str, caplog: pytest.LogCaptureFixture) -> None:
    assert asyncio.run(failing(how)) == ["second"]
    assert "the work is broken" in caplog.text


async def two_groups(others: int) -> list[str]:
    turns, done = Turns(), list[str]()
    for number in range(others):
        for _ in range(2):
            turns.submit(f"users/{number}", note(done, f"user {number}", 0.001))
    assert turns.waiting("users") == 2 * others and turns.waiting("users/0") == 2
    for number in range(3):
        turns.submit("session", note(done, f"session {number}", 0.001))
    await settled(done, 2 * others + 3)
    assert not turns.waiting("users") and not turns.waiting("users/0")
    return done


def test_who_has_many_keys_of_one_group_has_the_turns_of_one() -> None:
    done = asyncio.run(two_groups(30))
    assert done.index("session 2") <= 7
    users = [word for word in done if word.startswith("user")]
    assert sorted(users[:30]) == sorted(users[30:]), "its members take turns"


async def new_members(count: int) -> list[str]:
    """What is done while somebody new of a group comes whenever the last one has had its turn."""
    turns, done, coming = Turns(), list[str](), iter(range(count))

    def another() -> None:
        time.sleep(0.0005)
        done.append("new")
        if (number := next(coming, None)) is not None:
            turns.submit(f"users/{number}", another)

    turns.spent("session", 0.003)
    turns.submit("users/first", another)
    turns.submit("session", note(done, "session"))
    return await settled(done, count + 2)


def test_an_endless_row_of_newcomers_does_not_keep_their_group_ahead() -> None:
    assert asyncio.run(new_members(60)).index("session") < 20


async def many_at_once(count: int) -> int:
    turns, done = Turns(), list[str]()
    for number in range(count):
        turns.spent(f"users/{number}", 0.001)
        turns.spent(f"key {number}", 0.001)
    turns.submit("users/0", note(done, "done"))
    await settled(done, 1)
    return sum(len(fair._had) for fair in (turns._all, turns._groups["users"]))


def test_few_keys_are_remembered() -> None:
    assert asyncio.run(many_at_once(20_000)) <= 2 * KEYS_MOST


def test_time_that_others_take_is_not_that_of_the_steps() -> None:
    def steps() -> Iterator[None]:
        for _ in range(3):
            time.sleep(0.05)  # waits, as for a file that blocks
            yield

    assert asyncio.run(in_slices(steps())) < 0.05
