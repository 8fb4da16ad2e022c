"""Sends spans from a thread of its own, out of a queue with an upper bound: whoever hands one in
never waits, and what does not fit or is not taken is lost and counted."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

QUEUE_MOST = 2048
BATCH_MOST = 256
GATHER_S = 0.5
"""How long is waited for more before a batch is sent."""
LAST_S = 5.0
"""How long is waited at the end for what is still in the queue."""


@dataclass(frozen=True)
class Counts:
    """What became of spans."""

    sent: int
    lost_full: int
    """The queue was full."""
    lost_refused: int
    """The receiver was away, or did not take them."""
    waiting: int

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return {
            "sent": self.sent,
            "lost_full": self.lost_full,
            "lost_refused": self.lost_refused,
            "waiting": self.waiting,
        }


class Sender:
    """Hands spans to an exporter until `close`."""

    def __init__(self, exporter: SpanExporter, queue_most: int = QUEUE_MOST) -> None:
        # What it logs of each failure is counted and said here.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = exporter
        self._queue: queue.Queue[ReadableSpan] = queue.Queue(queue_most)
        self._lock = threading.Lock()
        self._sent = self._full = self._refused = self._in_hand = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send_on, name="spans", daemon=True)
        self._thread.start()

    def offer(self, span: ReadableSpan) -> bool:
        """Take a span, unless the queue is full. Returns whether it was taken."""
        try:
            self._queue.put_nowait(span)
        except queue.Full:
            with self._lock:
                self._full += 1
            return False
        return True

    def counts(self) -> Counts:
        """Return what became of spans so far."""
        with self._lock:
            waiting = self._queue.qsize() + self._in_hand
            return Counts(self._sent, self._full, self._refused, waiting)

    def close(self, last_s: float = LAST_S) -> Counts:
        """Send what can be sent in `last_s`, and end. Returns the counts; what is left is lost."""
        until = time.monotonic() + last_s
        self._stopping.set()
        self._thread.join(max(0.0, until - time.monotonic()))
        # Wakes one that waits between two attempts.
        self._exporter.shutdown()
        self._thread.join(1)
        counts = self.counts()
        return Counts(counts.sent, counts.lost_full, counts.lost_refused + counts.waiting, 0)

    def _send_on(self) -> None:
        while batch := self._batch():
            with self._lock:
                self._in_hand = len(batch)
            is_sent = self._export(batch)
            with self._lock:
                self._in_hand = 0
                if is_sent:
                    self._sent += len(batch)
                else:
                    self._refused += len(batch)

    def _batch(self) -> list[ReadableSpan]:
        """Wait for spans; none: it is time to end, and none is left."""
        batch: list[ReadableSpan] = []
        while not batch:
            try:
                batch.append(self._queue.get(timeout=0.2))
            except queue.Empty:
                if self._stopping.is_set():
                    return []
        self._stopping.wait(GATHER_S)
        while len(batch) < BATCH_MOST:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _export(self, batch: Sequence[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:  # noqa: BLE001  # one bad batch must not end the sending of all others
            return False
