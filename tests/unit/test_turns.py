"""Turns: whose work is done next, and what is done without waiting for one."""

import asyncio
import time
from collections.abc import Callable

import pytest

from agentcgroupd.turns import Turns


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
