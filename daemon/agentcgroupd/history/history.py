"""History: what the daemon tells it, and what it is asked, whether there is a store or none.

What comes in here is what goes to the audit log as well, and to agents as feedback. The log is the
record that others can check; the store is what questions are answered from.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, starmap
from pathlib import Path
from typing import Any, TypeVar

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.clock import unix_usec
from agentcgroupd.errors import FailedPrecondition
from agentcgroupd.history.reader import Query, Reader
from agentcgroupd.history.room import Bounds
from agentcgroupd.history.rows import (
    Closed,
    Ended,
    Entry,
    Found,
    FoundClosed,
    Opened,
    SessionKey,
    Settled,
)
from agentcgroupd.history.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_S = 1.0
"""How long the end of the daemon waits for what is still to be written."""
FIELD_CHARS_MAX = 1000
NOT_KEPT = frozenset({"session_opened", "session_closed", "call_goes_on"})
"""Entries of the audit log that are told in another way, or say nothing of a call."""
ELSEWHERE = frozenset({"session", "call", "argv", "grant"})
"""Fields that the row or the report has."""
TOLD_ONLY = frozenset(
    {
        pb.FEEDBACK_CODE_NOT_IN_CALL,
        pb.FEEDBACK_CODE_LEFTOVERS_KEPT,
        pb.FEEDBACK_CODE_GPU_CLOSED,
        pb.FEEDBACK_CODE_GPU_MEMORY_DENIED,
        pb.FEEDBACK_CODE_GPU_MEMORY_OVER,
        pb.FEEDBACK_CODE_GPU_FAULT,
        pb.FEEDBACK_CODE_GPU_LOST,
        pb.FEEDBACK_CODE_GPU_UNSHARED,
    }
)
"""Feedback for which the audit log has no entry."""


class History:
    """The daemon's memory of what was. Runs on the event loop and never waits for the disk."""

    def __init__(self, path: Path | None = None, bounds: Bounds | None = None) -> None:
        """`path` None: nothing is kept."""
        self._open: dict[str, SessionKey] = {}
        self._store: Store | None = None
        self._reader: Reader | None = None
        if path is not None and bounds is not None:
            self._store = Store(path, bounds)
            self._store.thread.start()
            self._reader = Reader(self._store)

    # What is told

    def session_opened(self, session: pb.Session) -> None:
        """Take note of a session that was opened or taken up, or whose limits have changed."""
        key = self._open[session.id] = SessionKey(session.id, session.opened_unix_usec)
        if self._store is not None:
            self._store.put(Opened(key, session.SerializeToString()), soon=True)

    def session_closed(self, name: str, last: pb.Session | None, why: str) -> None:
        """Take note of the end of a session. `last`: as it was described before; None: it could
        not be. `why`: a clause."""
        key = self._open.pop(name, None)
        if self._store is not None and key is not None:
            message = b"" if last is None else last.SerializeToString()
            self._store.put(Closed(key, unix_usec(), why, message), soon=True)

    def settle(
        self,
        ended_reports: Callable[[int], Iterable[pb.Report]],
        closed_sessions: Callable[[int], Iterable[tuple[str, int, str]]],
    ) -> None:
        """Take note that all sessions that there still are have been told of.

        Both give what the audit log has since a time in microseconds, where the daemon before may
        have lost rows; `closed_sessions`: each with when and why.
        """
        if self._store is None:
            return
        self._store.put(Settled(frozenset(self._open.values()), unix_usec()))
        self._store.recover(
            lambda since_usec: chain(
                map(Found, ended_reports(since_usec)),
                starmap(FoundClosed, closed_sessions(since_usec)),
            )
        )

    def note(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take note of an entry of the audit log."""
        key = self._open.get(fields.get("session") or "")
        if self._store is None or key is None or event in NOT_KEPT:
            return
        report = fields.get("report")
        if isinstance(report, pb.Report):
            self._store.put(Ended.of(key, report))
            return
        kept = {name: _cut(value) for name, value in fields.items() if name not in ELSEWHERE}
        self._put(key, str(fields.get("call") or ""), event, kept)

    def told(self, feedback: pb.Feedback) -> None:
        """Take note of feedback that the audit log does not have."""
        key = self._open.get(feedback.session_id)
        if self._store is None or key is None or feedback.code not in TOLD_ONLY:
            return
        word = pb.FeedbackCode.Name(feedback.code).removeprefix("FEEDBACK_CODE_").lower()
        fields = {**feedback.numbers, "why": _cut(feedback.sentence)}
        self._put(key, feedback.call_id, word, fields)

    def _put(self, key: SessionKey, call: str, event: str, fields: dict[str, Any]) -> None:
        assert self._store is not None
        text = json.dumps(fields, separators=(",", ":"), default=str)
        self._store.put(Entry(key, call, unix_usec(), event, text))

    # What is asked

    async def ask(self, asker: str, query: Query[T]) -> T:
        """Answer a question (history.read) from the store. `asker`: as of Reader.ask. Raises
        FailedPrecondition or Unavailable."""
        if self._reader is None:
            raise FailedPrecondition("history is not kept: history.path is empty", "history")
        return await self._reader.ask(asker, query)

    async def is_kept(self) -> bool:
        """Tell whether questions can be answered; soon after the start that has to be waited
        for."""
        return self._reader is not None and await self._reader.is_ready()

    async def is_current(self) -> bool:
        """Tell whether what was told so far is kept, so that answers have all of it."""
        return await self.is_kept() and self._store is not None and not self._store.wrong

    @property
    def lost(self) -> int:
        """Rows that could not be kept so far."""
        return 0 if self._store is None else self._store.lost

    @property
    def used_bytes(self) -> int:
        """Size of what is kept."""
        return 0 if self._store is None else self._store.used_bytes

    async def close(self) -> None:
        """Write what was told, as far as that can be done soon."""
        if self._store is not None and self._reader is not None:
            await asyncio.to_thread(self._close, self._store, self._reader)

    @staticmethod
    def _close(store: Store, reader: Reader) -> None:
        reader.close()
        if not store.close(CLOSE_S):
            log.error("history: %s could not be closed in time", store.path)


def _cut(value: Any) -> Any:
    """Shorten a text of somebody else's."""
    return value[:FIELD_CHARS_MAX] if isinstance(value, str) else value
