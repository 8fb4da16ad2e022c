"""Cyclic garbage: found, and never by a look at all that is open."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from agentcgroupd import garbage
from agentcgroupd.garbage import Garbage


@dataclass
class Thing:
    """An object that may be part of a cycle."""

    other: Any = None
    more: list[Any] = field(default_factory=list)


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def open_calls() -> list[int]:
    return [0]


@pytest.fixture
def collector(now: list[float], open_calls: list[int]) -> Iterator[Garbage]:
    made = Garbage(lambda: open_calls[0], lambda: now[0])
    made.start()
    yield made
    made.stop()


def cycle() -> weakref.ref[Thing]:
    """Make two objects that hold each other, and let go of them."""
    one = Thing()
    one.other = Thing(one)
    return weakref.ref(one)


@pytest.mark.usefixtures("collector")
def test_what_survived_one_look_is_not_looked_at_again() -> None:
    alive = [Thing(more=[number]) for number in range(20_000)]
    gc.collect()
    assert len(gc.get_objects()) < 5_000, "all that was alive is left alone"
    lost = cycle()
    gc.collect()
    assert lost() is None, "what came since is found"
    assert len(alive) == 20_000


def test_a_cycle_that_was_left_alone_goes_in_the_end(
    collector: Garbage, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Thing()
    one.other = Thing(one)
    lost = weakref.ref(one)
    gc.collect()
    del one
    gc.collect()
    collector.check()
    assert lost() is not None
    now[0] += garbage.THOROUGH_S
    collector.check()
    assert lost() is None
    # And much sooner where memory has doubled, but not with each look.
    one = Thing()
    one.other = Thing(one)
    lost = weakref.ref(one)
    gc.collect()
    del one
    monkeypatch.setattr("sys.getallocatedblocks", lambda: 1 << 60)
    now[0] += garbage.THOROUGH_LEAST_S - 1
    collector.check()
    assert lost() is not None
    now[0] += 2
    collector.check()
    assert lost() is None


def left_alone() -> weakref.ref[Thing]:
    """Make a cycle that is let go of once the collector has looked at it."""
    one = Thing()
    one.other = Thing(one)
    gc.collect()
    return weakref.ref(one)


def test_a_look_waits_until_little_is_open(
    collector: Garbage, now: list[float], open_calls: list[int]
) -> None:
    lost, open_calls[0] = left_alone(), garbage.LITTLE_OPEN + 1
    now[0] += garbage.THOROUGH_S
    collector.check()
    assert lost() is not None, "so much is open that others would wait"
    open_calls[0] -= 1
    collector.check()
    assert lost() is None
    # But not for ever.
    lost, open_calls[0] = left_alone(), garbage.LITTLE_OPEN + 1
    now[0] += garbage.THOROUGH_MOST_S
    collector.check()
    assert lost() is None


def test_memory_of_what_is_open_brings_no_look(
    collector: Garbage, now: list[float], open_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, before = left_alone(), sys.getallocatedblocks()
    now[0] += garbage.THOROUGH_LEAST_S
    more = 10_000 * garbage.BLOCKS_OF_OPEN
    monkeypatch.setattr("sys.getallocatedblocks", lambda: before + more)
    open_calls[0] = 10_000
    collector.check()
    assert lost() is not None
    monkeypatch.setattr("sys.getallocatedblocks", lambda: 2 * before + more + 50_000)
    collector.check()
    assert lost() is None


def test_the_collector_is_left_as_it_was() -> None:
    before = gc.get_threshold(), len(gc.callbacks)
    made = Garbage(lambda: 0)
    made.start()
    assert gc.get_threshold()[2] == garbage.FULL_AFTER
    made.stop()
    assert (gc.get_threshold(), len(gc.callbacks)) == before
    assert gc.get_freeze_count() == 0
