"""Events to whoever listens, in bounded queues. A listener that falls too far behind is told that
it has lost events, and gets no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import ResourceExhausted

QUEUE_EVENTS = 1024


@dataclass(slots=True, eq=False)
class Listener:
    """A subscription; iterate over it, then `Feed.leave`."""

    session_id: str
    """Empty: all sessions."""
    call_id: str | None = None
    """Feedback alone is wanted, about this call (empty: about any); None: all events."""
    _queue: asyncio.Queue[pb.Event | None] = field(
        default_factory=lambda: asyncio.Queue(maxsize=QUEUE_EVENTS)
    )
    _has_lost: bool = False

    def put(self, event: pb.Event) -> None:
        """Queue an event, if it is wanted and there is room for it, without waiting."""
        if self.call_id is not None and (
            not event.HasField("feedback") or self.call_id not in ("", event.feedback.call_id)
        ):
            return
        if self._queue.full():
            self._has_lost = True
        elif not self._has_lost:
            self._queue.put_nowait(event)

    def end(self) -> None:
        """End the subscription after what is queued."""
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[pb.Event]:
        """Events as they come. Raises ResourceExhausted once some have been lost."""
        while not (self._has_lost and self._queue.empty()):
            event = await self._queue.get()
            if event is None:
                return
            yield event
        raise ResourceExhausted(
            f"more than {QUEUE_EVENTS} events were waiting to be read; those after them are lost",
            "events",
        )


class Feed:
    """All listeners, by what they listen to."""

    def __init__(self) -> None:
        self._listeners: dict[str, set[Listener]] = {}

    def join(self, session_id: str = "", call_id: str | None = None) -> Listener:
        """A new listener; it must `leave`. `call_id`: as of a Listener."""
        listener = Listener(session_id, call_id)
        self._listeners.setdefault(session_id, set()).add(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        """End a subscription."""
        group = self._listeners.get(listener.session_id, set())
        group.discard(listener)
        if not group:
            self._listeners.pop(listener.session_id, None)

    @property
    def listening(self) -> bool:
        """Whether anyone would see an event; saves making it."""
        return bool(self._listeners)

    def publish(self, session_id: str, event: pb.Event) -> None:
        """Hand an event to everyone who asked for this session or for all."""
        for key in ("", session_id):
            for listener in self._listeners.get(key, ()):
                listener.put(event)

    def end(self, session_id: str = "") -> None:
        """End the streams of a session that was closed, or all of them when the daemon stops."""
        keys = [session_id] if session_id else list(self._listeners)
        for key in keys:
            for listener in self._listeners.get(key, ()):
                listener.end()
