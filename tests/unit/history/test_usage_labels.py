"""Sums by the labels of sessions, and tables of an earlier daemon that had none."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history import schema
from agentcgroupd.history.rows import Opened, SessionKey
from agentcgroupd.history.schema import open_store
from agentcgroupd.history.store import Store
from agentcgroupd.history.usage import usages
from tests.unit.history.making import ALPHA, BETA, OPENED_USEC, WAIT_S, ended, read_only, started

GAMMA = SessionKey("gamma", OPENED_USEC)
LATER = SessionKey("alpha", OPENED_USEC + 1_000_000)
S = 1_000_000


def opened(store: Store, key: SessionKey, **labels: str) -> None:
    message = pb.Session(id=key.name, opened_unix_usec=key.opened_usec, labels=labels)
    store.put(Opened(key, message.SerializeToString()))


def sums(path: Path, session: str = "", limit: int = 100) -> list[tuple[str, int, int]]:
    """Label, calls and seconds of CPU time."""
    with read_only(path) as db:
        found = usages(db, pb.USAGE_BY_LABEL, session, 0, limit)
    return [(u.key, u.sums.calls, u.sums.cpu_usage_usec // S) for u in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two sessions of a team, one of another, and one without labels; one name had two teams."""
    file = tmp_path / "history.db"
    store = started(file)
    opened(store, ALPHA, team="web", user="anna")
    opened(store, BETA, team="web")
    opened(store, GAMMA)
    store.put(ended(ALPHA, "a1", cpu_usage_usec=4 * S))
    store.put(ended(BETA, "b1", cpu_usage_usec=2 * S, memory_peak_bytes=1 << 20))
    store.put(ended(GAMMA, "g1", cpu_usage_usec=3 * S))
    opened(store, LATER, team="ops")
    store.put(ended(LATER, "a2", cpu_usage_usec=1 * S))
    assert store.close(WAIT_S)
    return file


def test_a_session_counts_for_each_label_and_those_without_any_are_told(path: Path) -> None:
    assert sums(path) == [
        ("team=web", 2, 6),
        ("user=anna", 1, 4),
        ("", 1, 3),
        ("team=ops", 1, 1),
    ]
    assert sums(path, "alpha") == [("team=web", 1, 4), ("user=anna", 1, 4), ("team=ops", 1, 1)]
    assert sums(path, limit=1) == [("team=web", 2, 6)]
    with read_only(path) as db:
        found = {u.key: u.sums for u in usages(db, pb.USAGE_BY_LABEL, "", 0, 100)}
        by_name = {u.key: u.sums.calls for u in usages(db, pb.USAGE_BY_SESSION, "", 0, 100)}
    assert found["team=web"].HasField("memory_byte_seconds"), "of one of them it was measured"
    assert not found["team=ops"].HasField("memory_byte_seconds")
    assert by_name == {"alpha": 2, "beta": 1, "gamma": 1}


def test_labels_are_known_to_calls_that_end_after_a_restart(path: Path) -> None:
    store = started(path)
    store.put(ended(ALPHA, "a3", cpu_usage_usec=5 * S))
    assert store.close(WAIT_S)
    assert sums(path)[:2] == [("team=web", 3, 11), ("user=anna", 2, 9)]


def version_2(path: Path) -> None:
    """Make a file as daemons made it before there were labels."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            f"PRAGMA auto_vacuum = INCREMENTAL; {schema._TABLES} {schema._FROM_1}"
            f"PRAGMA application_id = {schema.APPLICATION}; PRAGMA user_version = 2;"
        )
        db.execute(
            "INSERT INTO usage (day, name, tool, calls, cpu_usage_usec, io_read_bytes) "
            "VALUES (20000, 'alpha', 'make', 7, 9000000, 4096)"
        )
        db.commit()


def test_tables_of_version_2_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    version_2(path)
    store = started(path)
    opened(store, ALPHA, team="web")
    store.put(ended(ALPHA, "a1", cpu_usage_usec=2 * S))
    assert store.close(WAIT_S)
    assert sums(path) == [("", 7, 9), ("team=web", 1, 2)]
    with read_only(path) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == schema.VERSION
        (alpha,) = usages(db, pb.USAGE_BY_SESSION, "", 0, 100)
    assert (alpha.sums.calls, alpha.sums.io_read_bytes) == (8, 4096)


def test_an_upgrade_that_fails_leaves_version_2(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    version_2(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE usage_3 (something INTEGER)")
        db.commit()
    with pytest.raises(sqlite3.Error, match="usage_3"):
        open_store(path, 64 << 20)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 2
        assert db.execute("SELECT calls FROM usage").fetchall() == [(7,)]
