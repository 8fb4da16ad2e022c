"""The file of the store as the writer's thread holds it: opened, checked, begun anew, closed."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path

from agentcgroupd.history.room import Bounds, Room
from agentcgroupd.history.schema import (
    SIDE_FILES,
    NewerSchema,
    is_damaged,
    open_store,
    set_aside,
)

log = logging.getLogger(__name__)

WAL_BYTES_MAX = 64 << 20
"""Beyond, rows wait until whoever reads the file lets it be written back."""


class File:
    """A path, and the database that is there as long as nothing is wrong with it."""

    def __init__(self, path: Path, bounds: Bounds) -> None:
        self.path, self._bounds = path, bounds
        self.db: sqlite3.Connection | None = None
        self.room: Room | None = None
        self._is_made_here = not os.path.lexists(path)
        self._inode: tuple[int, int] | None = None
        self.has_rows = False
        """Whether anything was written."""
        self.is_foreign = False
        """Whether it is a newer daemon's, or another program's."""
        self.is_unclean = False
        """Whether the daemon before did not close it."""
        self.generation = 0
        """Grows whenever the file is opened: it may be another one then. 0: it never was."""
        self.wrong = ""
        """Why nothing is kept now, as a sentence; empty: it is."""

    # What is wrong with it

    def say_wrong(self, sentence: str) -> None:
        """Note why nothing is kept, and say it unless that was said last."""
        if sentence != self.wrong:
            self.wrong = sentence
            log.error("%s", sentence)

    def not_now(self, error: object) -> None:
        """Note that it cannot be written for a while."""
        self.say_wrong(f"history is not kept for now: {self.path}: {error}")

    def say_right(self, lost: int) -> None:
        """Note that it can be written. `lost`: rows that were lost so far."""
        if self.wrong:
            log.warning("history: %s can be written again; %d rows were lost", self.path, lost)
            self.wrong = ""

    # Opening and closing

    def open(self, lost: int) -> None:
        """Open it, or note why that cannot be done. `lost`: as of say_right."""
        try:
            self.db = self._open_or_renew()
            self.room = Room(self.db, self._bounds)
            found = os.stat(self.path)
            self._inode = found.st_dev, found.st_ino
            mark = self.db.execute("SELECT value FROM meta WHERE name = 'open'").fetchone()
            self.is_unclean = mark is not None and bool(mark[0])
            self.db.execute("INSERT OR REPLACE INTO meta VALUES ('open', 1)")
        except (NewerSchema, OSError, sqlite3.Error) as error:
            self.close()
            self.is_foreign = isinstance(error, NewerSchema)
            what = "; it is left alone" if self.is_foreign else ""
            self.say_wrong(f"history is not kept: {error}{what}")
            return
        self.generation += 1
        self.say_right(lost)

    def _open_or_renew(self) -> sqlite3.Connection:
        try:
            return open_store(self.path, self._bounds.max_bytes)
        except sqlite3.Error as error:
            if not is_damaged(error):
                raise
            self._set_aside(error)
            return open_store(self.path, self._bounds.max_bytes)

    def _set_aside(self, error: object) -> None:
        """Raises OSError."""
        aside = set_aside(self.path)
        sentence = "history: %s is damaged (%s): it is now %s, and a new one is begun"
        log.error(sentence, self.path, error, aside)

    def begin_anew(self, error: object) -> None:
        """Set a damaged file aside; a new one is made when it is opened next."""
        self.close()
        try:
            self._set_aside(error)
        except OSError as failed:
            self.say_wrong(f"history is not kept: {self.path} is damaged ({error}): {failed}")

    def check(self) -> None:
        """Look whether a file that is said to be damaged is, and begin a new one then."""
        if self.db is None:
            return
        try:
            found = str(self.db.execute("PRAGMA quick_check(1)").fetchone()[0])
        except sqlite3.Error as error:
            found = str(error)
        if found != "ok":
            self.begin_anew(found)

    def look(self) -> None:
        """Notice that somebody else has moved or removed it: it is opened anew next."""
        if self.db is None:
            return
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._inode:
            log.warning("history: %s was moved or removed; a new file is begun", self.path)
            self.close()

    def close(self, *, for_good: bool = False) -> None:
        """Close it. `for_good`: all has been written; a file without a row is removed, so that a
        start that came to nothing leaves nothing."""
        db, self.db, self.room = self.db, None, None
        if db is None:
            return
        try:
            if for_good:
                db.execute("INSERT OR REPLACE INTO meta VALUES ('open', 0)")
        except sqlite3.Error as error:
            log.debug("history: %s: %s", self.path, error)
        db.close()
        if for_good and self._is_made_here and not self.has_rows:
            for end in SIDE_FILES:
                Path(f"{self.path}{end}").unlink(missing_ok=True)

    # Its write-ahead log

    def is_held_up(self) -> bool:
        """Tell whether the write-ahead log has grown large, because somebody else has been reading
        the file for long and so keeps it from being written back. Raises sqlite3.Error."""
        if self.db is None or self._wal_bytes() <= WAL_BYTES_MAX:
            return False
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if self._wal_bytes() <= WAL_BYTES_MAX:
            return False
        self.not_now("another program has been reading it for long")
        return True

    def _wal_bytes(self) -> int:
        try:
            return os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            return 0
