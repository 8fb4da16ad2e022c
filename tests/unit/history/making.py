"""Reports and stores for the tests of this folder."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Coroutine, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history import read
from agentcgroupd.history.history import History
from agentcgroupd.history.read import ALL, Scope, Wanted
from agentcgroupd.history.room import Bounds
from agentcgroupd.history.rows import Ended, SessionKey
from agentcgroupd.history.schema import open_for_reading
from agentcgroupd.history.store import Store

T = TypeVar("T")

DAY_USEC = 86_400_000_000
OPENED_USEC = time.time_ns() // 1000 - 3_600_000_000
ALPHA, BETA = SessionKey("alpha", OPENED_USEC), SessionKey("beta", OPENED_USEC)
WAIT_S = 30.0


def bounds(max_bytes: int = 64 << 20, percent: int = 100, days: float = 30) -> Bounds:
    """Bounds of a store, wide if nothing is said."""
    return Bounds(max_bytes, percent, int(days * DAY_USEC))


def report(call: str, session: str = "alpha", **fields: Any) -> pb.Report:
    """A report; it ended a moment after the session was opened, if nothing is said."""
    values = {
        "name": "tool",
        "verdict": pb.VERDICT_OK,
        "began_unix_usec": OPENED_USEC + 1000,
        "wall_usec": 500,
        **fields,
    }
    return pb.Report(call_id=call, session_id=session, **values)


def ended(key: SessionKey, call: str, **fields: Any) -> Ended:
    """The row of a call that has ended."""
    return Ended.of(key, report(call, key.name, **fields))


def written(store: Store) -> None:
    """Wait until all that was put has been written, or lost."""
    store.mark().reached.result(WAIT_S)


def started(path: Path, limits: Bounds | None = None) -> Store:
    """A store whose thread runs."""
    store = Store(path, limits or bounds())
    store.thread.start()
    return store


def kept(path: Path, scope: Scope = ALL, **wanted: Any) -> list[str]:
    """Ids of the calls in a file, newest first, read page by page."""
    with_all = {"limit": 500, **wanted}
    found: list[str] = []
    with read_only(path) as db:
        before = (read.NO_END, read.NO_END)
        while True:
            page, place = read.reports(db, scope, Wanted(**with_all, before=before))
            found += [each.call_id for each in page]
            if place is None:
                return found
            before = place


@contextmanager
def read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to read a file with, which is closed then."""
    with closing(open_for_reading(path)) as db:
        yield db


def run(work: Coroutine[Any, Any, T]) -> T:
    """Carry out what is asynchronous."""
    return asyncio.run(work)


def history_at(path: Path, limits: Bounds | None = None) -> History:
    """History in a file."""
    return History(path, limits or bounds())
