"""Events to whoever listens: bounded queues, a slow listener loses its oldest and is told so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb

QUEUE_EVENTS = 1024


@dataclass(slots=True, eq=False)
class Listener:
    """A subscription; iterate over it, then `Feed.leave`."""

    session_id: str
    """Empty: all sessions."""
    queue: asyncio.Queue[pb.Event | None] = field(
        default_factory=lambda: asyncio.Queue(maxsize=QUEUE_EVENTS)
    )
    lost: int = 0

    def put(self, event: pb.Event | None) -> None:
        """Queue an event without waiting: where the queue is full, the oldest one makes way."""
        if self.queue.full():
            self.queue.get_nowait()
            self.lost += 1
        self.queue.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[pb.Event]:
        while (event := await self.queue.get()) is not None:
            yield event


class Feed:
    """All listeners."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()

    def join(self, session_id: str = "") -> Listener:
        """A new listener; it must `leave`."""
        listener = Listener(session_id)
        self._listeners.add(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        """End a subscription."""
        self._listeners.discard(listener)

    @property
    def listening(self) -> bool:
        """Whether anyone would see an event; saves making it."""
        return bool(self._listeners)

    def publish(self, session_id: str, event: pb.Event) -> None:
        """Hand an event to everyone who asked for this session or for all."""
        for listener in self._listeners:
            if listener.session_id in ("", session_id):
                listener.put(event)

    def end(self, session_id: str = "") -> None:
        """End the streams of a session that was closed, or all of them when the daemon stops."""
        for listener in self._listeners:
            if session_id in ("", listener.session_id):
                listener.put(None)
