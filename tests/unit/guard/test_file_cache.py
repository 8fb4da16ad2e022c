"""How much of file cache counts as free, and which calls have it to grow into."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.guard.ledgers import CACHE_USEC, Ledger
from agentcgroupd.guard.look import STAYS_MOST_BYTES, FileCache, file_cache

MIB, GIB = 1 << 20, 1 << 30


class FakeCgroup:
    """A cgroup of which only memory.stat can be read."""

    def __init__(self, **stat: int) -> None:
        self.stat, self.reads = stat, 0

    def read(self, knob: Knob[Any]) -> Any:
        assert knob is knobs.MEMORY_STAT
        self.reads += 1
        return self.stat


@pytest.mark.parametrize(
    ("stat", "cold", "clean"),
    [
        ({}, 0, 0),
        ({"inactive_file": 7}, 7, 7),
        ({"inactive_file": 7, "active_file": 30}, 7, 37),
        ({"inactive_file": 7, "active_file": 30, "file_dirty": 4, "file_writeback": 3}, 7, 30),
        ({"inactive_file": 7, "file_dirty": 9}, 7, 0),
        ({"anon": 90, "shmem": 50, "unevictable": 20, "active_file": 1}, 0, 1),
    ],
)
def test_what_needs_no_writing_is_clean(stat: dict[str, int], cold: int, clean: int) -> None:
    found: Any = FakeCgroup(**stat)
    assert file_cache(found) == FileCache(cold, clean)


@pytest.mark.parametrize(
    ("cold", "clean", "limit", "free"),
    [
        (0, 0, 160 * MIB, 0),
        (0, 100 * MIB, 160 * MIB, 90 * MIB),  # a sixteenth of the limit stays
        (0, 12 * MIB, 160 * MIB, 6 * MIB),  # half of a little stays
        (0, 30 * GIB, 64 * GIB, 30 * GIB - STAYS_MOST_BYTES),  # and never more than so much
        (12 * MIB, 12 * MIB, 160 * MIB, 12 * MIB),  # what is cold may all go
        (12 * MIB, 0, 160 * MIB, 12 * MIB),  # also where it has to be written first
    ],
)
def test_some_of_the_cache_in_use_stays(cold: int, clean: int, limit: int, free: int) -> None:
    assert FileCache(cold, clean).freeable_bytes(limit) == free


def ledger(held: int, **stat: int) -> tuple[Ledger, FakeCgroup]:
    """The ledger of a call that holds so much."""
    cgroup = FakeCgroup(**stat)
    call: Any = SimpleNamespace(cgroup=cgroup)
    return Ledger(call, bound=held, priority=0, seen=held), cgroup


def test_a_call_with_a_quarter_in_cache_has_it_to_grow_into() -> None:
    of_cache, _ = ledger(100 * MIB, active_file=25 * MIB)
    of_cache.find_cache(1)
    assert of_cache.lives_on_cache
    of_memory, _ = ledger(100 * MIB, active_file=25 * MIB, file_dirty=MIB)
    of_memory.find_cache(1)
    assert not of_memory.lives_on_cache, "what has to be written first cannot be grown into"


def test_its_cache_is_read_now_and_then_only() -> None:
    kept, cgroup = ledger(100 * MIB, active_file=50 * MIB)
    for now in (1, 2, CACHE_USEC):
        kept.find_cache(now)
    assert cgroup.reads == 1
    cgroup.stat = {}
    kept.find_cache(1 + CACHE_USEC)
    assert cgroup.reads == 2 and not kept.lives_on_cache
