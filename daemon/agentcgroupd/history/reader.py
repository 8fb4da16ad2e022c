"""Questions to the store, answered in a thread of their own, one of each asker's at a time."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from agentcgroupd.errors import FailedPrecondition, Unavailable
from agentcgroupd.history.schema import is_damaged, open_for_reading
from agentcgroupd.history.store import Store

T = TypeVar("T")
Query = Callable[[sqlite3.Connection], T]

CATCH_UP_S = 1.0
"""How long a question waits for what was told before it to be written."""
QUERY_S = 2.0
"""How long a query may take."""
STEPS = 10_000
"""Instructions of SQLite's machine between looks at the clock."""


class Reader:
    """Answers questions. Runs on the event loop, but for the queries themselves."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="history-reader")
        # Started now: where threads are used up later, it could not be.
        self._thread.submit(time.monotonic).result()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._db: sqlite3.Connection | None = None
        self._generation = 0

    async def ask(self, asker: str, query: Query[T]) -> T:
        """Answer a question with what `query` makes of the store. `asker`: whose other questions
        wait meanwhile, so that nobody waits for more than one of each. Raises FailedPrecondition
        where nothing is kept, Unavailable where it cannot be answered now."""
        lock = self._locks.get(asker)
        if lock is None:
            lock = self._locks[asker] = asyncio.Lock()
        async with lock:
            if not await self.is_ready():
                raise FailedPrecondition(self._store.wrong or "history is not read yet", "history")
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, partial(self._answer, query))

    async def is_ready(self) -> bool:
        """Wait until what was told so far can be read, not for long where the disk does not
        answer; False: there is no file to be read."""
        reached = asyncio.wrap_future(self._store.mark().reached)
        await asyncio.wait({reached}, timeout=CATCH_UP_S)
        return self._store.generation > 0

    # In the thread

    def _answer(self, query: Query[T]) -> T:
        deadline = time.monotonic() + QUERY_S
        try:
            db = self._connection()
            db.set_progress_handler(lambda: time.monotonic() > deadline, STEPS)
            return query(db)
        except sqlite3.Error as error:
            if is_damaged(error):
                self._store.suspect()
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
                raise Unavailable(
                    f"history: this took longer than {QUERY_S:g} s; ask for a shorter time"
                ) from None
            raise Unavailable(f"history cannot be read: {error}", "history") from None

    def _connection(self) -> sqlite3.Connection:
        """The connection to the file as it is now: another one may have taken its place. Raises
        sqlite3.Error."""
        generation = self._store.generation
        if self._db is None or self._generation != generation:
            self._disconnect()
            self._db, self._generation = open_for_reading(self._store.path), generation
        return self._db

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def close(self) -> None:
        """Answer no more."""
        self._thread.submit(self._disconnect)
        self._thread.shutdown(wait=True, cancel_futures=False)
