"""What is written into the store: one class for each thing, which knows its SQL."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import DecodeError

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.usage import Sums, add_usage, added, day_of, text_of

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

    def write(self, batch: Batch) -> None:
        """Write it with others, within a transaction. Raises sqlite3.Error."""


def row_of(db: sqlite3.Connection, keys: dict[SessionKey, int], session: SessionKey) -> int:
    """Find the row of a session, and make one where it has none yet. `keys`: those that are known
    already. Raises sqlite3.Error."""
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

    def write(self, batch: Batch) -> None:
        """Describe the session, and count it as open."""
        key = batch.key_of(self.session)
        batch.db.execute(
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

    def write(self, batch: Batch) -> None:
        """Count the session as closed."""
        key = batch.key_of(self.session)
        batch.db.execute(
            "UPDATE sessions SET closed_usec = ?, closed_why = ?, message = coalesce(?, message) "
            "WHERE key = ?",
            (self.at_usec, self.why, self.message or None, key),
        )
        batch.keys.pop(self.session, None)


@dataclass(frozen=True, slots=True)
class Settled:
    """All sessions that are open now; others that the store has as open are not there any more."""

    open: frozenset[SessionKey]
    at_usec: int
    owner: str = ""
    size_bytes: int = 0

    def write(self, batch: Batch) -> None:
        """Count the others as closed."""
        db = batch.db
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

    def write(self, batch: Batch) -> None:
        """Add it to its session's."""
        batch.add_entry(self)


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

    def write(self, batch: Batch) -> None:
        """Add it to its session's. Of two reports of a call the later one counts."""
        batch.calls[self.call] = self


def _sums(report: pb.Report) -> Sums:
    """What a report adds to its session's sums. What a call inside another one used, is in the
    outer one's numbers."""
    counts = 0 if report.parent_call_id else 1
    # Memory that was not measured is absent, in the sums as well.
    peak = report.memory_peak_bytes if report.HasField("memory_peak_bytes") else None
    return {
        "calls": 1,
        "calls_not_ok": int(report.verdict != pb.VERDICT_OK),
        "wall_usec": counts * report.wall_usec,
        "waited_usec": counts * report.waited_usec,
        "frozen_usec": counts * report.frozen_usec,
        "cpu_usage_usec": counts * report.cpu_usage_usec,
        "peak": peak,
        "held": None if peak is None else counts * peak * report.wall_usec / 1e6,
        **_more_sums(report, counts),
    }


def _more_sums(report: pb.Report, counts: int) -> Sums:
    """What a report adds of disks, network and GPUs."""
    net = report.net if report.HasField("net") else None
    gpu = report.gpu if report.HasField("gpu") else None
    has_energy = gpu is not None and gpu.HasField("energy_mj")
    vram = gpu.memory_peak_bytes if gpu is not None and gpu.HasField("memory_peak_bytes") else None
    found: dict[str, float | None] = {
        "io_read_bytes": report.io_read_bytes if report.HasField("io_read_bytes") else None,
        "io_write_bytes": report.io_write_bytes if report.HasField("io_write_bytes") else None,
        "net_receive_bytes": None if net is None else net.receive_bytes,
        "net_send_bytes": None if net is None else net.send_bytes,
        "gpu_energy_mj": report.gpu.energy_mj if has_energy else None,
        "gpu_memory_byte_seconds": None if vram is None else vram * report.wall_usec / 1e6,
    }
    return {name: None if value is None else counts * value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Found:
    """A report that the audit log has of a time whose rows a crash may have lost."""

    report: pb.Report
    owner: str = ""
    size_bytes: int = 0

    def write(self, batch: Batch) -> None:
        """Add it to the session of its name that was open when it began, unless it is there."""
        report, db = self.report, batch.db
        if db.execute("SELECT 1 FROM calls WHERE id = ?", (report.call_id,)).fetchone():
            return
        found = db.execute(
            "SELECT opened_usec FROM sessions WHERE name = ? AND opened_usec <= ? "
            "ORDER BY opened_usec DESC LIMIT 1",
            (report.session_id, report.began_unix_usec),
        ).fetchone()
        opened_usec = report.began_unix_usec if found is None else int(found[0])
        Ended.of(SessionKey(report.session_id, opened_usec), report).write(batch)


@dataclass(frozen=True, slots=True)
class FoundClosed:
    """The end of a session that the audit log has of such a time."""

    name: str
    at_usec: int
    why: str
    owner: str = ""
    size_bytes: int = 0

    def write(self, batch: Batch) -> None:
        """Say why the session was closed, if it is only known that it is not there any more."""
        batch.db.execute(
            "UPDATE sessions SET closed_usec = ?, closed_why = ? WHERE closed_why = ? AND key = "
            "(SELECT key FROM sessions WHERE name = ? AND opened_usec <= ? "
            "ORDER BY opened_usec DESC LIMIT 1)",
            (self.at_usec, self.why, GONE, self.name, self.at_usec),
        )


class Batch:
    """What is written in one transaction: rows of a kind at once, and each sum once."""

    def __init__(self, db: sqlite3.Connection, keys: dict[SessionKey, int]) -> None:
        """`keys`: rows of sessions that are known already; more are added."""
        self.db, self.keys = db, keys
        self.calls: dict[str, Ended] = {}
        """By their ids: of two reports of a call the later one counts."""
        self._entries: list[tuple[int, str, int, str, int, str]] = []
        self._bytes: dict[int, int] = {}
        self._labels: dict[int, str] = {}

    def key_of(self, session: SessionKey) -> int:
        """Find the row of a session. Raises sqlite3.Error."""
        return row_of(self.db, self.keys, session)

    @property
    def touched(self) -> set[int]:
        """Rows of the sessions that hold more than before."""
        return set(self._bytes)

    def add_entry(self, entry: Entry) -> None:
        """Have an entry written by `flush`. Raises sqlite3.Error."""
        key, size = self.key_of(entry.session), entry.size_bytes
        self._entries.append((key, entry.call, entry.at_usec, entry.event, size, entry.fields))
        self._grow(key, size)

    def _grow(self, key: int, size: int) -> None:
        self._bytes[key] = self._bytes.get(key, 0) + size

    def flush(self) -> None:
        """Write calls and entries, and add them up. Raises sqlite3.Error."""
        self.db.executemany(
            "INSERT INTO entries (session, call, at_usec, event, bytes, fields) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            self._entries,
        )
        new = self._without_known()
        self.db.executemany(
            "INSERT INTO calls (id, session, name, ended_usec, verdict, outer, bytes, report) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(row.call, self.key_of(row.session), row.session.name, *_values(row)) for row in new],
        )
        self._add_up(new)
        self.db.executemany(
            "UPDATE sessions SET bytes = bytes + ? WHERE key = ?",
            [(size, key) for key, size in self._bytes.items()],
        )

    def _without_known(self) -> list[Ended]:
        """The calls that are not there yet; those that are get their later report."""
        found = self.db.execute(
            "SELECT id, seq, session, bytes FROM calls "
            "WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps([*self.calls]),),
        ).fetchall()
        for call, seq, session, size in found:
            row = self.calls.pop(call)
            if session == self.key_of(row.session):
                self.db.execute(
                    "UPDATE calls SET ended_usec = ?, verdict = ?, outer = ?, bytes = ?, "
                    "report = ? WHERE seq = ?",
                    (*_values(row), seq),
                )
                self._grow(session, row.size_bytes - size)
        return [*self.calls.values()]

    def _add_up(self, new: list[Ended]) -> None:
        sums: dict[int, Sums] = {}
        usage: dict[tuple[int, str, str, str], Sums] = {}
        for row in new:
            key = self.key_of(row.session)
            self._grow(key, row.size_bytes)
            sums[key] = added(sums.get(key), row.sums)
            of = day_of(row.ended_usec), row.session.name, row.tool, self._labels_of(key)
            usage[of] = added(usage.get(of), row.sums)
        self.db.executemany(
            "UPDATE sessions SET calls = calls + :calls, "
            "calls_not_ok = calls_not_ok + :calls_not_ok, wall_usec = wall_usec + :wall_usec, "
            "waited_usec = waited_usec + :waited_usec, frozen_usec = frozen_usec + :frozen_usec, "
            "cpu_usage_usec = cpu_usage_usec + :cpu_usage_usec, memory_peak_bytes = "
            "coalesce(max(memory_peak_bytes, :peak), memory_peak_bytes, :peak), "
            "memory_byte_seconds = "
            "coalesce(memory_byte_seconds + :held, memory_byte_seconds, :held) WHERE key = :key",
            [{**values, "key": key} for key, values in sums.items()],
        )
        for of, values in usage.items():
            add_usage(self.db, *of, values)

    def _labels_of(self, key: int) -> str:
        """The labels of a session, as sums have them. Raises sqlite3.Error, or ValueError where its
        description is damaged."""
        known = self._labels.get(key)
        if known is None:
            found = self.db.execute("SELECT message FROM sessions WHERE key = ?", (key,)).fetchone()
            try:
                known = text_of(pb.Session.FromString(found[0]).labels)
            except DecodeError as error:
                raise ValueError(f"the description of session {key} is damaged: {error}") from None
            self._labels[key] = known
        return known


def _values(row: Ended) -> tuple[int, int, str, int, bytes]:
    return row.ended_usec, row.verdict, row.outer, row.size_bytes, row.report
