"""The store's thread: it writes what the event loop hands over, and keeps the file within bounds.

Rows are written some at a time, in one transaction, so that neither many short calls nor a slow
disk hold anybody up. What cannot be written is kept for a while, then counted as lost. A file that
is damaged is set aside and a new one begun; one of a newer daemon is left alone.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import InvalidStateError
from pathlib import Path

from agentcgroupd.clock import boottime_usec, unix_usec
from agentcgroupd.history.file import File
from agentcgroupd.history.queue import Marker, RowQueue
from agentcgroupd.history.room import Bounds
from agentcgroupd.history.rows import Batch, Row, SessionKey
from agentcgroupd.history.schema import is_damaged, may_pass

log = logging.getLogger(__name__)

GATHER_S = 0.2
"""How long rows are gathered before they are written together."""
TRANSACTION_BYTES = 1 << 20
"""A transaction is not larger, so that the write-ahead log stays small and a file that is nearly
full has room for it."""
AGAIN_S = 1.0
"""Between attempts while the file cannot be written."""
KEEP_HOUSE_S = 60.0
"""How often it is looked for rows that are too old."""
CLOCK_SLACK_USEC = 3_600_000_000
"""The wall clock may be moved by this much while the daemon runs; rows are not called too old by
one that has jumped further."""
RECOVER_SLACK_USEC = 5_000_000
"""Reports are looked for from this long before the newest one that is there."""
KEYS_KNOWN_MAX = 10_000


class Store:
    """The file and the thread that writes it."""

    def __init__(self, path: Path, bounds: Bounds) -> None:
        self._file = File(path, bounds)
        self._queue = RowQueue()
        self._keys: dict[SessionKey, int] = {}
        self._pending: list[Row | Marker] = []
        self._touched: set[int] = set()
        """Sessions that rows were written for since their shares were looked at."""
        self._recovery: Callable[[int], Iterable[Row]] | None = None
        self._due: Callable[[int], Iterable[Row]] | None = None
        """The recovery that comes when all that was put before it has been written."""
        self._stop = threading.Event()
        self._is_suspect = False
        self._transaction_bytes = min(TRANSACTION_BYTES, bounds.max_bytes // 64)
        self._next_house = 0.0
        self._clock = (unix_usec(), boottime_usec())
        self.lost = 0
        """Rows that could not be kept so far."""
        self.used_bytes = 0
        self._lost_lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="history", daemon=True)

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._file.path

    @property
    def wrong(self) -> str:
        """Why nothing is kept now, as a sentence; empty: it is."""
        return self._file.wrong

    @property
    def generation(self) -> int:
        """Grows whenever the file is opened: it may be another one then. 0: it never was."""
        return self._file.generation

    @property
    def is_unclean(self) -> bool:
        """Whether the daemon before did not close the file. Known once a marker was reached."""
        return self._file.is_unclean

    # On the event loop

    def put(self, row: Row, *, soon: bool = False) -> None:
        """Have a row written, `soon` without waiting for others; it is counted as lost where there
        is no room in the queue. Never waits."""
        if not self._queue.put(row):
            self._lose(1)
        elif soon:
            self._queue.hurry.set()

    def mark(self) -> Marker:
        """Return a marker behind all rows that were put."""
        return self._queue.mark()

    def recover(self, rows: Callable[[int], Iterable[Row]]) -> None:
        """Have rows written that the daemon before may have lost, if it did not close the file:
        `rows` gives those of a time in microseconds or later, in the thread."""
        self._recovery = rows
        self._queue.mark()

    def suspect(self) -> None:
        """Have the file checked: who reads it has found it damaged."""
        self._is_suspect = True
        self._queue.mark()

    def close(self, timeout_s: float) -> bool:
        """Write what is there and close the file; False: the thread did not end in time."""
        self._stop.set()
        self._queue.mark()
        self.thread.join(timeout_s)
        return not self.thread.is_alive()

    def _lose(self, count: int) -> None:
        with self._lost_lock:
            self.lost += count

    # In the thread

    def _run(self) -> None:
        try:
            going_on = True
            while going_on:
                going_on = self._guarded_turn()
        finally:
            self._file.close(for_good=self._stop.is_set())
            if not self._stop.is_set():
                self._file.generation = 0
                self._file.say_wrong("history is not kept: its thread has failed")

    def _guarded_turn(self) -> bool:
        try:
            return self._turn()
        except (OSError, sqlite3.Error) as error:
            self._file.not_now(error)
            if isinstance(error, sqlite3.Error) and is_damaged(error):
                self._begin_anew(error)
            return not self._stop.wait(AGAIN_S)

    def _turn(self) -> bool:
        """Do what there is to do once; False: all is done and the file can be closed."""
        stopping = self._stop.is_set()
        self._open_if_closed()
        if self._is_suspect:
            self._is_suspect = False
            self._file.check()
        if not self._pending:
            if not stopping and not self._queue.wake.wait(KEEP_HOUSE_S):
                self._keep_house()
                return True
            if not stopping:
                self._queue.hurry.wait(GATHER_S)
            # What was put before it is taken with it, and so written before it.
            self._due, self._recovery = self._due or self._recovery, None
            self._pending = self._queue.take()
        self._file.look()
        self._open_if_closed()
        if self._write():
            self._recover()
            self._keep_house()
            return not stopping
        if stopping or self._file.is_foreign:
            self._drop_pending()
            return not stopping
        # The queue goes on to fill meanwhile; what does not fit is lost and counted there.
        self._reach(self._pending)
        self._stop.wait(AGAIN_S)
        return True

    def _open_if_closed(self) -> None:
        if self._file.db is None and not self._file.is_foreign:
            self._keys.clear()
            self._file.open(self.lost)

    # Writing

    def _write(self) -> bool:
        """Write what is pending; False: it has to be tried again."""
        while self._pending:
            db = self._file.db
            if db is None or self._file.is_held_up():
                return False
            rows = self._some()
            try:
                self._transaction(db, rows)
            except sqlite3.Error as error:
                if not self._survived(error, rows):
                    return False
            except (ValueError, OverflowError, TypeError) as error:
                self._one_by_one(error, rows)
            else:
                self._file.say_right(self.lost)
                self._keep_within()
            self._reach(rows)
            del self._pending[: len(rows)]
        return True

    def _some(self) -> list[Row | Marker]:
        """The first pending rows, as many as go into one transaction."""
        size = 0
        for number, row in enumerate(self._pending, 1):
            size += 0 if isinstance(row, Marker) else row.size_bytes
            if size >= self._transaction_bytes:
                return self._pending[:number]
        return self._pending[:]

    def _transaction(self, db: sqlite3.Connection, rows: Iterable[Row | Marker]) -> None:
        """Write rows, all or none of them. Raises sqlite3.Error."""
        if len(self._keys) > KEYS_KNOWN_MAX:
            self._keys.clear()
        known = dict(self._keys)

        def write() -> bool:
            batch = Batch(db, self._keys)
            for row in rows:
                if not isinstance(row, Marker):
                    self._file.has_rows = self._file.has_rows or row.size_bytes > 0
                    row.write(batch)
            batch.flush()
            self._touched |= batch.touched
            return False

        try:
            self._steps(db, write)
        except BaseException:
            self._keys = known
            raise

    def _steps(self, db: sqlite3.Connection, step: Callable[[], bool]) -> None:
        """Carry out a step, each in a transaction of its own, as long as it says that it is to be
        done again. Raises sqlite3.Error."""
        again = True
        while again:
            db.execute("BEGIN IMMEDIATE")
            try:
                again = step()
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _survived(self, error: sqlite3.Error, rows: list[Row | Marker]) -> bool:
        """Deal with rows that could not be written; False: they are to be tried again."""
        if is_damaged(error):
            self._begin_anew(error)
            return False
        if may_pass(error):
            self._file.not_now(error)
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                self._make_room()
            return False
        self._one_by_one(error, rows)
        return True

    def _one_by_one(self, error: Exception, rows: list[Row | Marker]) -> None:
        """Write rows one of which cannot be written, each by itself; that one is lost. What fails
        otherwise meanwhile is lost as well."""
        log.error("history: a row cannot be written and is lost: %s", error)
        for row in rows:
            db = self._file.db
            if db is None or isinstance(row, Marker):
                continue
            try:
                self._transaction(db, [row])
            except (sqlite3.Error, ValueError, OverflowError, TypeError) as failed:
                log.debug("history: %s: %s", row, failed)
                self._lose(1)

    def _begin_anew(self, error: object) -> None:
        self._keys.clear()
        self._file.begin_anew(error)

    def _drop_pending(self) -> None:
        """Give up what could not be written."""
        self._lose(sum(not isinstance(row, Marker) for row in self._pending))
        self._reach(self._pending)
        self._pending = []

    @staticmethod
    def _reach(rows: Iterable[Row | Marker]) -> None:
        for row in rows:
            if isinstance(row, Marker):
                # Whoever waited may have given up in this moment.
                with contextlib.suppress(InvalidStateError):
                    row.reached.set_result(None)

    def _recover(self) -> None:
        """Write what the daemon before may have lost, once."""
        recovery, self._due = self._due, None
        db = self._file.db
        if recovery is None or db is None or not self.is_unclean:
            return
        newest = db.execute("SELECT max(ended_usec) FROM calls").fetchone()[0]
        try:
            rows = list(recovery(max(0, (newest or 0) - RECOVER_SLACK_USEC)))
        except OSError as error:
            log.warning("history: the audit log cannot be read: %s", error)
            return
        self._pending = list(rows)
        self._write()

    # Room

    def _keep_within(self) -> None:
        """Keep the sessions that were written for to their shares, and the file to its size."""
        db, room = self._file.db, self._file.room
        if db is None or room is None:
            return
        touched, self._touched = self._touched, set()
        try:
            if touched:
                self._steps(db, lambda: room.keep_to_shares(touched))
        except sqlite3.Error as error:
            log.debug("history: shares cannot be kept now: %s", error)
        if room.is_full():
            self._make_room()

    def _keep_house(self) -> None:
        """Keep the file within its bounds, and now and then look for what is too old."""
        self._keep_within()
        db, room = self._file.db, self._file.room
        if db is None or room is None:
            return
        try:
            room.give_back()
            if time.monotonic() >= self._next_house:
                self._next_house = time.monotonic() + KEEP_HOUSE_S
                now_usec = self._trusted_usec()
                if now_usec:
                    self._steps(db, lambda: room.drop_old(now_usec))
            self.used_bytes = room.used_bytes()
        except sqlite3.Error as error:
            if is_damaged(error):
                self._begin_anew(error)
            else:
                self._file.not_now(error)

    def _make_room(self) -> None:
        db, room = self._file.db, self._file.room
        if db is None or room is None:
            return
        try:
            self._steps(db, room.make_some)
        except sqlite3.Error as error:
            log.debug("history: no room can be made: %s", error)
        # Sessions may have gone with their last rows.
        self._keys.clear()

    def _trusted_usec(self) -> int:
        """The wall clock; 0 where it has jumped, so that nothing is called too old by it."""
        wall, boot = self._clock
        now = unix_usec()
        jumped = abs((now - wall) - (boottime_usec() - boot))
        return now if jumped <= CLOCK_SLACK_USEC else 0
