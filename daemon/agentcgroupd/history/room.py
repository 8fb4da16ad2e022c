"""Room in the store: what goes when there is too much of it, or when it is too old.

A session has at most its share, and beyond that loses its own oldest rows. When the store is full,
the session that holds most gives way; once none of them holds much, the one that was closed the
longest ago goes. So what a session writes costs itself before others.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from agentcgroupd.history.usage import drop_oldest

FULL_SHARE, FREED_SHARE = 0.95, 0.92
"""Room is made when this part of the pages is in use, until only that part is."""
LEAST_SHARE = 1 / 64
"""A session that holds less than this part of the store does not give way while others are
closed."""
ROWS_AT_A_TIME = 200
PAGES_AT_A_TIME = 500
USAGE_BYTES = 4096
"""Sums are kept in one row for so much of the store, of which they take a few percent."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept."""

    max_bytes: int
    """Size of the file, its write-ahead log not counted."""
    session_percent: int
    """Share of it that one session may have."""
    max_age_usec: int


class Room:
    """Makes room, a few rows at a time, within the caller's transaction."""

    def __init__(self, db: sqlite3.Connection, bounds: Bounds) -> None:
        self._db, self._bounds = db, bounds
        self._page_bytes = self._number("PRAGMA page_size")
        self._pages_most = bounds.max_bytes // self._page_bytes
        self.evicted = 0
        """Rows that went so far, before they were too old."""

    def _number(self, sql: str, *values: int) -> int:
        found = self._db.execute(sql, values).fetchone()
        return int(found[0] or 0) if found is not None else 0

    def used_bytes(self) -> int:
        """Size of the pages that are in use."""
        return self._used_pages() * self._page_bytes

    def _used_pages(self) -> int:
        return self._number("PRAGMA page_count") - self._number("PRAGMA freelist_count")

    def is_full(self) -> bool:
        """Tell whether room has to be made."""
        return self._used_pages() > self._pages_most * FULL_SHARE

    def make_some(self) -> bool:
        """Remove some rows; returns whether that is to be done again. Raises sqlite3.Error."""
        if self._used_pages() <= self._pages_most * FREED_SHARE:
            return False
        victim = self._victim()
        if victim is None:
            return False
        self.evicted += self._drop_oldest(victim)
        return True

    def keep_to_shares(self, keys: set[int]) -> bool:
        """Remove some of the oldest rows of those of the given sessions that have more than their
        share; returns whether that is to be done again. Raises sqlite3.Error."""
        most = self._bounds.max_bytes * self._bounds.session_percent // 100
        again = False
        for key in keys:
            if self._number("SELECT bytes FROM sessions WHERE key = ?", key) > most:
                self.evicted += self._drop_oldest(key)
                again = True
        return again

    def _victim(self) -> int | None:
        """The session that gives way; None: there is none to be had anything from."""
        least = int(self._bounds.max_bytes * LEAST_SHARE)
        for sql, *values in (
            ("SELECT key FROM sessions WHERE bytes > ? ORDER BY bytes DESC LIMIT 1", least),
            ("SELECT key FROM sessions WHERE closed_usec > 0 ORDER BY closed_usec LIMIT 1",),
            ("SELECT key FROM sessions WHERE bytes > 0 ORDER BY bytes DESC LIMIT 1",),
        ):
            found = self._db.execute(sql, values).fetchone()
            if found is not None:
                return int(found[0])
        return None

    def _drop_oldest(self, key: int) -> int:
        """Remove the oldest rows of a session, and a closed one that has no other with them;
        returns how many."""
        gone = 0
        for table in ("calls", "entries"):
            rows = self._db.execute(
                f"SELECT seq, bytes FROM {table} WHERE session = ? ORDER BY seq LIMIT ?",
                (key, ROWS_AT_A_TIME),
            ).fetchall()
            self._db.executemany(f"DELETE FROM {table} WHERE seq = ?", [(r[0],) for r in rows])
            self._take_off(key, sum(r[1] for r in rows))
            gone += len(rows)
        if not gone:
            self._db.execute("DELETE FROM sessions WHERE key = ? AND closed_usec > 0", (key,))
            self._db.execute("UPDATE sessions SET bytes = 0 WHERE key = ?", (key,))
        return gone

    def _take_off(self, key: int, size: int) -> None:
        self._db.execute("UPDATE sessions SET bytes = bytes - ? WHERE key = ?", (size, key))

    def drop_old(self, now_usec: int) -> bool:
        """Remove some rows that are too old, and closed sessions that are; returns whether that is
        to be done again. Raises sqlite3.Error."""
        before = now_usec - self._bounds.max_age_usec
        gone = 0
        for table, column in (("calls", "ended_usec"), ("entries", "at_usec")):
            rows = self._db.execute(
                f"SELECT seq, session, bytes FROM {table} WHERE {column} < ? LIMIT ?",
                (before, ROWS_AT_A_TIME),
            ).fetchall()
            self._db.executemany(f"DELETE FROM {table} WHERE seq = ?", [(r[0],) for r in rows])
            for _, key, size in rows:
                self._take_off(key, size)
            gone += len(rows)
        if not gone:
            self._db.execute(
                "DELETE FROM sessions WHERE closed_usec BETWEEN 1 AND ? AND NOT EXISTS "
                "(SELECT 1 FROM calls WHERE session = key)",
                (before - 1,),
            )
        return gone > 0 or drop_oldest(self._db, self._bounds.max_bytes // USAGE_BYTES)

    def give_back(self) -> None:
        """Make the file smaller where the bound was lowered. Raises sqlite3.Error."""
        while self._number("PRAGMA page_count") > self._pages_most:
            if not self._number("PRAGMA freelist_count"):
                return
            self._db.execute(f"PRAGMA incremental_vacuum({PAGES_AT_A_TIME})").fetchall()
            self._db.execute(f"PRAGMA max_page_count = {self._pages_most}")
