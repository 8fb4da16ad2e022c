"""What waits to be written: bounded, so that a disk that hangs costs rows, and never the daemon."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future

from agentcgroupd.history.rows import Row

QUEUE_BYTES = 8 << 20
SESSION_SHARE = 4
"""A session may have one part in so many of the queue."""


class Marker:
    """A place in the queue: `reached` is done when all before it has been written, or lost."""

    def __init__(self) -> None:
        self.reached: Future[None] = Future()


class RowQueue:
    """Rows on their way from the event loop to the writer's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[Row | Marker] = []
        self._bytes_of: Counter[str] = Counter()
        self._bytes = 0
        self.wake = threading.Event()
        """Set while there is something to do."""
        self.hurry = threading.Event()
        """Set while somebody waits for what is in the queue."""

    def put(self, row: Row) -> bool:
        """Add a row; False: there is no room for it. Never waits."""
        size, owner = row.size_bytes, row.owner
        with self._lock:
            if owner and (
                self._bytes + size > QUEUE_BYTES
                or self._bytes_of[owner] + size > QUEUE_BYTES // SESSION_SHARE
            ):
                return False
            self._bytes += size
            self._bytes_of[owner] += size
            self._rows.append(row)
        if not self.wake.is_set():
            self.wake.set()
        return True

    def mark(self) -> Marker:
        """Add a marker, and have the writer come to it soon."""
        marker = Marker()
        with self._lock:
            self._rows.append(marker)
        self.hurry.set()
        self.wake.set()
        return marker

    def take(self) -> list[Row | Marker]:
        """Take all that is there."""
        self.wake.clear()
        self.hurry.clear()
        with self._lock:
            rows, self._rows = self._rows, []
            self._bytes_of.clear()
            self._bytes = 0
        return rows
