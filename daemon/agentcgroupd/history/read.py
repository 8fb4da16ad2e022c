"""What is asked of the store: reports, sessions, and what happened to a call. Pages are bounded."""

from __future__ import annotations

import heapq
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.rows import SessionKey

PAGE_BYTES = 60 << 10
"""A page of history holds no more, so that its message has at most 64 KiB; a report that is larger
comes alone."""
ITEMS_MAX = 500
ENTRIES_MOST = 1000
"""Entries that are read for a story."""
NO_END = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Scope:
    """What a caller may see. `session` None: all; `roots` None: every call of it, else those that
    were begun inside these calls, at whatever depth."""

    session: SessionKey | None = None
    roots: tuple[str, ...] | None = None


ALL = Scope()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which reports are asked for. `session`: a name; empty: of all. `before`: the end and the
    number of the last row of the page before."""

    session: str = ""
    verdicts: tuple[int, ...] = ()
    since_usec: int = 0
    limit: int = 20
    before: tuple[int, int] = (NO_END, NO_END)
    page_bytes: int = PAGE_BYTES


Place = tuple[int, int]
"""Where a page ended: a time in microseconds, and the number of a row."""


@dataclass(frozen=True, slots=True)
class Happened:
    """An entry as it was kept."""

    at_usec: int
    event: str
    fields: dict[str, Any]
    of_session: bool
    """Whether it concerned the session as a whole."""


_KEY = "(SELECT key FROM sessions WHERE name = ? AND opened_usec = ?)"
_INSIDE = """
WITH RECURSIVE inside(id) AS (
  SELECT value FROM json_each(?)
  UNION SELECT calls.id FROM calls JOIN inside ON calls.outer = inside.id
)
"""


def reports(
    db: sqlite3.Connection, scope: Scope, wanted: Wanted
) -> tuple[list[pb.Report], Place | None]:
    """A page of reports, newest first, and where it ended; None: it is the last. Raises
    sqlite3.Error."""
    rows = _newest(db, scope, wanted)
    limit = min(wanted.limit, ITEMS_MAX)
    found: list[pb.Report] = []
    place, size = (0, 0), 0
    for ended_usec, seq, report in islice(rows, limit + 1):
        size += len(report)
        if found and (len(found) == limit or size > wanted.page_bytes):
            return found, place
        found.append(pb.Report.FromString(report))
        place = ended_usec, seq
    return found, None


Rows = Iterator[tuple[int, int, bytes]]


def _newest(db: sqlite3.Connection, scope: Scope, wanted: Wanted) -> Rows:
    """Rows of reports, newest first: for each verdict by an index of its own, then merged, so that
    no query has to look at rows that are not wanted."""
    name = scope.session.name if scope.session is not None else wanted.session
    conditions: list[str] = []
    values: list[Any] = []
    if name:
        conditions, values = ["calls.name = ?"], [name]
    if scope.session is not None:
        # The unary plus keeps it from the choice of the index: the name's has the right order.
        conditions.append(
            "+calls.session = (SELECT key FROM sessions WHERE name = ? AND opened_usec = ?)"
        )
        values += [scope.session.name, scope.session.opened_usec]
    verdicts: Sequence[int | None] = wanted.verdicts or (None,)
    each = [_of_verdict(db, scope, wanted, verdict, conditions, values) for verdict in verdicts]
    return heapq.merge(*each, key=lambda row: row[:2], reverse=True)


def _of_verdict(
    db: sqlite3.Connection,
    scope: Scope,
    wanted: Wanted,
    verdict: int | None,
    conditions: Iterable[str],
    values: Iterable[Any],
) -> Rows:
    sql, parts, bound = "", list(conditions), list(values)
    if scope.roots is not None:
        sql = _INSIDE
        parts.append("calls.outer IN inside")
        bound.insert(0, json.dumps(scope.roots))
    if verdict is not None:
        parts.append("calls.verdict = ?")
        bound.append(verdict)
    parts.append("calls.ended_usec >= ? AND (calls.ended_usec, calls.seq) < (?, ?)")
    bound += [wanted.since_usec, *wanted.before]
    sql += (
        f"SELECT ended_usec, seq, report FROM calls WHERE {' AND '.join(parts)} "
        "ORDER BY ended_usec DESC, seq DESC LIMIT ?"
    )
    return iter(db.execute(sql, (*bound, min(wanted.limit, ITEMS_MAX) + 1)))


def report(db: sqlite3.Connection, scope: Scope, call: str) -> pb.Report | None:
    """The report of a call; None where there is none that the caller may see. Raises
    sqlite3.Error."""
    found = db.execute(
        "SELECT calls.report, sessions.name, sessions.opened_usec FROM calls "
        "LEFT JOIN sessions ON sessions.key = calls.session WHERE calls.id = ?",
        (call,),
    ).fetchone()
    if found is None or not _may_see(db, scope, call, found[1], found[2]):
        return None
    return pb.Report.FromString(found[0])


def _may_see(
    db: sqlite3.Connection, scope: Scope, call: str, name: str | None, opened: int | None
) -> bool:
    if scope.session is None:
        return True
    if (name, opened) != (scope.session.name, scope.session.opened_usec):
        return False
    if scope.roots is None:
        return True
    sql = f"{_INSIDE} SELECT 1 FROM calls WHERE id = ? AND outer IN inside"
    return db.execute(sql, (json.dumps(scope.roots), call)).fetchone() is not None


def happened(db: sqlite3.Connection, session: SessionKey, call: str) -> list[Happened]:
    """What was kept about a call, oldest first. Raises sqlite3.Error."""
    found = db.execute(
        f"SELECT at_usec, event, fields FROM entries WHERE call = ? AND session = {_KEY} "
        "ORDER BY seq LIMIT ?",
        (call, session.name, session.opened_usec, ENTRIES_MOST),
    )
    return [_happened(row, False) for row in found]


def happened_to_session(
    db: sqlite3.Connection, session: SessionKey, from_usec: int, until_usec: int
) -> list[Happened]:
    """What happened to a session as a whole in a time, oldest first. Raises sqlite3.Error."""
    found = db.execute(
        f"SELECT at_usec, event, fields FROM entries WHERE call = '' AND session = {_KEY} "
        "AND at_usec BETWEEN ? AND ? ORDER BY seq LIMIT ?",
        (session.name, session.opened_usec, from_usec, until_usec, ENTRIES_MOST),
    )
    return [_happened(row, True) for row in found]


def _happened(row: tuple[int, str, str], of_session: bool) -> Happened:
    fields = json.loads(row[2])
    return Happened(row[0], row[1], fields if isinstance(fields, dict) else {}, of_session)


def session_of(db: sqlite3.Connection, call: str) -> SessionKey | None:
    """The session of a call that has a report or an entry; None: it is not known. Raises
    sqlite3.Error."""
    found = db.execute(
        "SELECT name, opened_usec FROM sessions WHERE key = "
        "coalesce((SELECT session FROM calls WHERE id = :id), "
        "(SELECT session FROM entries WHERE call = :id LIMIT 1))",
        {"id": call},
    ).fetchone()
    return None if found is None else SessionKey(found[0], found[1])


def sessions(
    db: sqlite3.Connection, name: str, since_usec: int, limit: int, before: Place
) -> tuple[list[pb.PastSession], Place | None]:
    """A page of sessions, the one opened last first, and where it ended; None: it is the last.
    `name`: empty: of every name. Raises sqlite3.Error."""
    limit = min(limit, ITEMS_MAX)
    rows = db.execute(
        "SELECT opened_usec, key, closed_usec, closed_why, message, calls, calls_not_ok, "
        "wall_usec, waited_usec, frozen_usec, cpu_usage_usec, memory_peak_bytes, "
        "memory_byte_seconds FROM sessions WHERE (? = '' OR name = ?) "
        "AND (closed_usec = 0 OR closed_usec >= ?) AND (opened_usec, key) < (?, ?) "
        "ORDER BY opened_usec DESC, key DESC LIMIT ?",
        (name, name, since_usec, *before, limit + 1),
    )
    found: list[pb.PastSession] = []
    place, size = (0, 0), 0
    for opened_usec, key, closed_usec, why, message, *sums in rows:
        size += len(message) + len(why) + 100
        if found and (len(found) == limit or size > PAGE_BYTES):
            return found, place
        found.append(
            pb.PastSession(
                session=pb.Session.FromString(message),
                closed_unix_usec=closed_usec,
                closed_why=why,
                sums=_sums_of(sums),
            )
        )
        place = opened_usec, key
    return found, None


def _sums_of(values: Sequence[Any]) -> pb.SessionSums:
    calls, not_ok, wall, waited, frozen, cpu, peak, byte_seconds = values
    return pb.SessionSums(
        calls=calls,
        calls_not_ok=not_ok,
        wall_usec=wall,
        waited_usec=waited,
        frozen_usec=frozen,
        cpu_usage_usec=cpu,
        memory_peak_bytes=peak,
        memory_byte_seconds=byte_seconds,
    )
