"""Bounds of the store: size, shares, age; and whose rows go."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.clock import unix_usec
from agentcgroupd.history import read
from agentcgroupd.history import store as module
from agentcgroupd.history.room import Bounds
from agentcgroupd.history.rows import Closed, Entry, Opened, SessionKey
from agentcgroupd.history.store import Store
from tests.unit.history.making import (
    ALPHA,
    BETA,
    DAY_USEC,
    OPENED_USEC,
    WAIT_S,
    bounds,
    ended,
    kept,
    read_only,
    started,
    written,
)

SMALL = 16 << 20
WAL_MOST = 3 * 4096 * 1000
"""Three times what makes SQLite write it back."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


def fill(store: Store, key: SessionKey, mib: int, prefix: str = "") -> list[str]:
    """Put reports and entries of so many MiB, in the pace of the writer; returns the calls' ids."""
    ids = []
    for number in range(mib * 512):
        call = f"{prefix or key.name}{number}"
        store.put(ended(key, call, argv=["x" * 1100], began_unix_usec=OPENED_USEC + number))
        store.put(Entry(key, call, OPENED_USEC + number, "freeze", '{"why":"' + "x" * 400 + '"}'))
        ids.append(call)
        if number % 500 == 0:
            written(store)
    written(store)
    return ids


def size_of(path: Path) -> tuple[int, int]:
    """Bytes of the file and of its write-ahead log."""
    return path.stat().st_size, Path(f"{path}-wal").stat().st_size


def test_the_file_stays_within_its_size_whatever_comes(path: Path) -> None:
    store = started(path, bounds(SMALL))
    for turn in range(3):
        for key in (ALPHA, BETA, SessionKey("gamma", OPENED_USEC)):
            fill(store, key, 6, f"{key.name}-{turn}-")
            file, wal = size_of(path)
            assert file <= SMALL and wal <= WAL_MOST
    assert store.lost == 0
    assert store.used_bytes <= SMALL
    assert store.close(WAIT_S)
    assert kept(path)[0] in ("alpha-2-3071", "beta-2-3071", "gamma-2-3071")


def test_a_session_that_floods_the_store_erases_nobody_else(path: Path) -> None:
    """What others did is less than its own, and stays to the last row."""
    store = started(path, bounds(SMALL))
    others = set(fill(store, BETA, 3))
    flood = fill(store, ALPHA, 40)
    assert store.close(WAIT_S)
    there = set(kept(path))
    assert others <= there
    own = there & set(flood)
    assert own == set(flood[-len(own) :]) and 1000 < len(own) < len(flood)
    with read_only(path) as db:
        assert len(read.happened(db, BETA, "beta0")) == 1


def test_a_session_has_at_most_its_share_also_while_there_is_room(path: Path) -> None:
    store = started(path, bounds(SMALL, percent=25))
    flood = fill(store, ALPHA, 12)
    assert store.close(WAIT_S)
    there = kept(path)
    assert there[0] == flood[-1]
    assert 0.6 * SMALL / 4 < sum(1100 + 400 + 440 for _ in there) < 1.3 * SMALL / 4
    assert path.stat().st_size < SMALL * 0.7


def test_where_nobody_holds_much_the_session_closed_longest_ago_goes(path: Path) -> None:
    store = started(path, bounds(SMALL))
    keys = [SessionKey(f"s{number:03}", OPENED_USEC + number) for number in range(200)]
    for number, key in enumerate(keys):
        store.put(Opened(key, pb.Session(id=key.name).SerializeToString()))
        for call in range(100):
            store.put(ended(key, f"{key.name}.{call}", argv=["x" * 1100]))
        if number:
            store.put(Closed(key, OPENED_USEC + number, "done", b""))
        if number % 10 == 0:
            written(store)
    assert store.close(WAIT_S)
    left = {call.split(".")[0] for call in kept(path)}
    assert "s000" in left, "it is open"
    assert "s199" in left and "s001" not in left
    closed = sorted(left - {"s000"})
    assert closed == [key.name for key in keys[-len(closed) :]]
    with read_only(path) as db:
        found, _ = read.sessions(db, "s001", 0, 10, (read.NO_END, read.NO_END))
    assert found == []


def test_what_is_too_old_goes_with_its_session(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns() // 1000
    old, new = SessionKey("old", now - 20 * DAY_USEC), SessionKey("new", now)
    store = started(path, bounds(days=10))
    store.put(ended(old, "o", began_unix_usec=old.opened_usec))
    store.put(Entry(old, "o", old.opened_usec, "freeze", "{}"))
    store.put(Closed(old, old.opened_usec + 1, "done", b""))
    store.put(ended(new, "n", began_unix_usec=now))
    assert store.close(WAIT_S)
    monkeypatch.setattr(module, "KEEP_HOUSE_S", 0.01)
    again = started(path, bounds(days=10))
    written(again)
    time.sleep(0.1)
    assert again.close(WAIT_S)
    assert kept(path) == ["n"]
    with read_only(path) as db:
        found, _ = read.sessions(db, "", 0, 10, (read.NO_END, read.NO_END))
        assert read.happened(db, old, "o") == []
    assert [past.session.id for past in found] == ["new"]


def test_a_clock_that_jumps_calls_nothing_too_old(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEP_HOUSE_S", 0.01)
    store = started(path, bounds(days=10))
    store.put(ended(ALPHA, "c"))
    written(store)
    wall = unix_usec
    monkeypatch.setattr(module, "unix_usec", lambda: wall() + 1000 * DAY_USEC)
    time.sleep(0.1)
    written(store)
    assert store.close(WAIT_S)
    assert kept(path) == ["c"]


def test_a_bound_that_was_lowered_makes_the_file_smaller(path: Path) -> None:
    store = started(path)
    ids = fill(store, ALPHA, 40)
    assert store.close(WAIT_S)
    assert path.stat().st_size > 1.5 * SMALL
    again = started(path, Bounds(SMALL, 100, DAY_USEC))
    again.put(ended(BETA, "new"))
    written(again)
    assert again.close(WAIT_S)
    third = started(path, Bounds(SMALL, 100, DAY_USEC))
    written(third)
    assert third.close(WAIT_S)
    assert path.stat().st_size <= SMALL
    there = kept(path)
    assert "new" in there and ids[-1] in there
