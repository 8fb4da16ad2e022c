"""Hears of ended calls: from the daemon's events as they happen, and from its store what those left
out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.sdk.resources import Resource

from agentcgroup.admin import Admin
from agentcgroup.errors import AgentcgError
from agentcgroup.listener import EventListener
from agentcgroup.types import Event, Report

from .sending import Sender
from .spans import span

CATCH_UP_S = 30.0
REPORTS_MOST = 1000
KNOWN_MOST = 20_000
DEPTH_MOST = 16
RETRY_S = 2.0


class Follower:
    """Makes spans of calls that end, until `close`.

    since: seconds since 1970; calls that ended before are left out.
    """

    def __init__(
        self,
        make_admin: Callable[[], Admin],
        sender: Sender,
        *,
        since: float,
        command_lines: bool = False,
    ) -> None:
        self._make_admin, self._sender = make_admin, sender
        self._since, self._command_lines = since, command_lines
        self._resource = Resource.create({"service.name": "agentcgroup"})
        self._parents: dict[str, str] = {}
        self._done: dict[str, None] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._listener = EventListener(make_admin, self.heard, retry_s=RETRY_S)

    def run(self, told: Callable[[], None]) -> None:
        """Follow until `close`; `told` is called each time that the store was asked."""
        self._listener.start()
        while not self._stopping.is_set():
            wait_s = CATCH_UP_S
            try:
                self.catch_up()
            except AgentcgError:
                wait_s = RETRY_S  # The daemon is away: it may come back.
            told()
            self._stopping.wait(wait_s)

    def close(self) -> None:
        """End it, from any thread."""
        self._stopping.set()
        self._listener.close()

    def catch_up(self) -> None:
        """Ask the store for what ended. Raises AgentcgError."""
        began_at = time.time()
        with self._make_admin() as admin:
            for call in admin.calls():
                self._know(call.id, call.parent_call_id)
            reports = admin.history(since=self._since, limit=REPORTS_MOST)
        for report in reports:
            self._know(report.call_id, report.parent_call_id)
        for report in reversed(reports):
            self.ended(report)
        # What the store got late is asked for once more the next time.
        self._since = max(self._since, began_at - 2 * CATCH_UP_S)

    def heard(self, event: Event) -> None:
        """Take what happened in the pool."""
        if event.begun is not None:
            self._know(event.begun.id, event.begun.parent_call_id)
        elif event.ended is not None:
            self._know(event.ended.call_id, event.ended.parent_call_id)
            self.ended(event.ended)

    def ended(self, report: Report) -> None:
        """Send a call, unless it was sent already."""
        with self._lock:
            if report.call_id in self._done:
                return
            self._done[report.call_id] = None
            _forget(self._done)
        root = self._root(report.call_id)
        self._sender.offer(span(report, root, self._resource, self._command_lines))

    def _know(self, call_id: str, parent_call_id: str) -> None:
        with self._lock:
            self._parents[call_id] = parent_call_id
            _forget(self._parents)

    def _root(self, call_id: str) -> str:
        with self._lock:
            for _ in range(DEPTH_MOST):
                parent = self._parents.get(call_id, "")
                if not parent:
                    break
                call_id = parent
        return call_id


def _forget(kept: dict[str, Any]) -> None:
    while len(kept) > KNOWN_MOST:
        del kept[next(iter(kept))]
