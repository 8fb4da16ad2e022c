"""What is written into the store: one class for each thing, which knows its SQL."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Protocol

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.usage import Sums, add_usage

ROW_BYTES = 220
"""What a row takes beside its message: its other columns, and its part of the indexes."""
GONE = (
    "it was not there any more when the daemon was started: the host had been restarted, or its "
    "cgroup was removed meanwhile"
)


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A session by its name and by when it was opened: names come again."""

    name: str
    opened_usec: int


class Row(Protocol):
    """Something to be written."""

    @property
    def owner(self) -> str:
        """Name of the session whose share of the queue it takes; empty: of none."""

    @property
    def size_bytes(self) -> int:
        """What it takes in the queue, about."""

    def write(self, db: sqlite3.Connection, keys: dict[SessionKey, int]) -> None:
        """Write it, within a transaction. `keys`: rows of sessions that are known already. Raises
        sqlite3.Error."""


def row_of(db: sqlite3.Connection, keys: dict[SessionKey, int], session: SessionKey) -> int:
    """Find the row of a session, and make one where it has none yet. Raises sqlite3.Error."""
    known = keys.get(session)
    if known is not None:
        return known
    where = (session.name, session.opened_usec)
    message = pb.Session(id=session.name, opened_unix_usec=session.opened_usec)
    db.execute(
        "INSERT OR IGNORE INTO sessions (name, opened_usec, message, bytes) VALUES (?, ?, ?, ?)",
        (*where, message.SerializeToString(), ROW_BYTES),
    )
    found = db.execute("SELECT key FROM sessions WHERE name = ? AND opened_usec = ?", where)
    key = keys[session] = int(found.fetchone()[0])
    return key


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that was opened or taken up, or whose limits were changed."""

    session: SessionKey
    message: bytes
    owner: str = ""

    @property
    def size_bytes(self) -> int:
        """What it takes in the queue."""
        return len(self.message)

    def write(self, db: sqlite3.Connection, keys: dict[SessionKey, int]) -> None:
        """Describe the session, and count it as open."""
        key = row_of(db, keys, self.session)
        db.execute(
            "UPDATE sessions SET message = ?, closed_usec = 0, closed_why = '' WHERE key = ?",
            (self.message, key),
        )


@dataclass(frozen=True, slots=True)
class Closed:
    """A session that was closed. `message`: as it was at last; empty: as before."""

    session: SessionKey
    at_usec: int
    why: str
    message: bytes
    owner: str = ""

    @property
    def size_bytes(self) -> int:
        """What it takes in the queue."""
        return len(self.message) + len(self.why)

    def write(self, db: sqlite3.Connection, keys: dict[SessionKey, int]) -> None:
        """Count the session as closed."""
        key = row_of(db, keys, self.session)
        db.execute(
            "UPDATE sessions SET closed_usec = ?, closed_why = ?, message = coalesce(?, message) "
            "WHERE key = ?",
            (self.at_usec, self.why, self.message or None, key),
        )
        keys.pop(self.session, None)


@dataclass(frozen=True, slots=True)
class Settled:
    """All sessions that are open now; others that the store has as open are not there any more."""

    open: frozenset[SessionKey]
    at_usec: int
    owner: str = ""
    size_bytes: int = 0

    def write(self, db: sqlite3.Connection, keys: dict[SessionKey, int]) -> None:
        """Count the others as closed."""
        found = db.execute("SELECT key, name, opened_usec FROM sessions WHERE closed_usec = 0")
        for key, name, opened_usec in found.fetchall():
            if SessionKey(name, opened_usec) not in self.open:
                db.execute(
                    "UPDATE sessions SET closed_usec = ?, closed_why = ? WHERE key = ?",
                    (self.at_usec, GONE, key),
                )


@dataclass(frozen=True, slots=True)
class Entry:
    """A decision, a signal or another event of a session, or of a call of it.

    `call`: empty: of the session itself. `fields`: what more is known, as JSON.
    """

    session: SessionKey
    call: str
    at_usec: int
    event: str
    fields: str

    @property
    def owner(self) -> str:
        """Name of its session."""
        return self.session.name

    @property
    def size_bytes(self) -> int:
        """What it takes in the queue and in the store."""
        return len(self.fields) + len(self.event) + ROW_BYTES

    def write(self, db: sqlite3.Connection, keys: dict[SessionKey, int]) -> None:
        """Add it to its session's."""
        key, size = row_of(db, keys, self.session), self.size_bytes
        db.execute(
            "INSERT INTO entries (session, call, at_usec, event, bytes, fields) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (key, self.call, self.at_usec, self.event, size, self.fields),
        )
        db.execute("UPDATE sessions SET bytes = bytes + ? WHERE key = ?", (size, key))


@dataclass(frozen=True, slots=True)
class Ended:
    """A call that has ended: its report, and what of it is added up and searched for."""

    session: SessionKey
    call: str
    tool: str
    ended_usec: int
    verdict: int
    outer: str
    sums: Sums
    report: bytes

    @classmethod
    def of(cls, session: SessionKey, report: pb.Report) -> Ended:
        """Make the row of a report."""
        return cls(
            session,
            report.call_id,
            report.name,
            report.began_unix_usec + report.wall_usec,
            report.verdict,
            report.parent_call_id,
            _sums(report),
            report.SerializeToString(),
        )

    @property
    def owner(self) -> str:
        """Name of its session."""
        return self.session.name

    @property
    def size_bytes(self) -> int:
        """What it takes in the queue and in the store."""
        return len(self.report) + ROW_BYTES

    def write(self, db: sqlite3.Connection, keys: dict[SessionKey, int]) -> None:
        """Add it to its session's. Of two reports of a call the later one counts."""
        key, size = row_of(db, keys, self.session), self.size_bytes
        before = db.execute("SELECT seq, session, bytes FROM calls WHERE id = ?", (self.call,))
        found = before.fetchone()
        values = (self.ended_usec, self.verdict, self.outer, size, self.report)
        if found is not None:
            if found[1] == key:
                db.execute(
                    "UPDATE calls SET ended_usec = ?, verdict = ?, outer = ?, bytes = ?, "
                    "report = ? WHERE seq = ?",
                    (*values, found[0]),
                )
                db.execute(
                    "UPDATE sessions SET bytes = bytes + ? WHERE key = ?", (size - found[2], key)
                )
            return
        db.execute(
            "INSERT INTO calls (id, session, name, ended_usec, verdict, outer, bytes, report) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self.call, key, self.session.name, *values),
        )
        db.execute(
            "UPDATE sessions SET bytes = bytes + :bytes, calls = calls + 1, "
            "calls_not_ok = calls_not_ok + :calls_not_ok, wall_usec = wall_usec + :wall_usec, "
            "waited_usec = waited_usec + :waited_usec, frozen_usec = frozen_usec + :frozen_usec, "
            "cpu_usage_usec = cpu_usage_usec + :cpu_usage_usec, "
            "memory_peak_bytes = "
            "coalesce(max(memory_peak_bytes, :peak), memory_peak_bytes, :peak), "
            "memory_byte_seconds = "
            "coalesce(memory_byte_seconds + :held, memory_byte_seconds, :held) WHERE key = :key",
            {**self.sums, "bytes": size, "key": key},
        )
        add_usage(db, self.session.name, self.tool, self.ended_usec, self.sums)


def _sums(report: pb.Report) -> Sums:
    """What a report adds to its session's sums. What a call inside another one used, is in the
    outer one's numbers."""
    counts = 0 if report.parent_call_id else 1
    # Memory that was not measured is absent, in the sums as well.
    peak = report.memory_peak_bytes if report.HasField("memory_peak_bytes") else None
    return {
        "calls_not_ok": int(report.verdict != pb.VERDICT_OK),
        "wall_usec": counts * report.wall_usec,
        "waited_usec": counts * report.waited_usec,
        "frozen_usec": counts * report.frozen_usec,
        "cpu_usage_usec": counts * report.cpu_usage_usec,
        "peak": peak,
        "held": None if peak is None else counts * peak * report.wall_usec / 1e6,
    }


@dataclass(frozen=True, slots=True)
class Found:
    """A report that the audit log has of a time whose rows a crash may have lost."""

    report: pb.Report
    owner: str = ""
    size_bytes: int = 0

    def write(self, db: sqlite3.Connection, keys: dict[SessionKey, int]) -> None:
        """Add it to the session of its name that was open when it began, unless it is there."""
        report = self.report
        if db.execute("SELECT 1 FROM calls WHERE id = ?", (report.call_id,)).fetchone():
            return
        found = db.execute(
            "SELECT opened_usec FROM sessions WHERE name = ? AND opened_usec <= ? "
            "ORDER BY opened_usec DESC LIMIT 1",
            (report.session_id, report.began_unix_usec),
        ).fetchone()
        opened_usec = report.began_unix_usec if found is None else int(found[0])
        Ended.of(SessionKey(report.session_id, opened_usec), report).write(db, keys)
