"""BeginCall, however it is asked for: at once, or after the call has waited in the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.queue import AdmissionQueue, Ticket
from agentcgroupd.intents.request import CallRequest
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call, Session
from agentcgroupd.turns import Slices


class Admission:
    """Lets calls begin when the queue does."""

    def __init__(self, calls: Calls, queue: AdmissionQueue) -> None:
        self._calls, self._queue = calls, queue

    def begin(
        self,
        session: Session,
        request: CallRequest,
        owner: Process | None,
        outer: Call | None = None,
    ) -> Call | Coroutine[Any, Any, Call]:
        """Begin a call, which has its cgroup then and no process yet; where it has to wait, the
        result is to be awaited.

        `owner` holds the call open; None: the call ends when it is empty. `outer`: the call that
        it is to begin in, whose room it shares, so that it never waits. Raises RequestError, and
        then nothing is left behind.
        """
        with self._calls.refusing(session, request.name):
            candidate = self._calls.grant(session, request, outer=outer)
            if outer is not None:
                return self._calls.open_call(candidate, candidate.grant, owner)
            ticket = self._queue.enter(candidate)
            if ticket.wait is not None:
                return self._begin_later(ticket, None if owner is None else owner.copy())
            try:
                return self._calls.open_call(candidate, ticket.apply(candidate.grant), owner)
            finally:
                ticket.release()

    async def _begin_later(self, ticket: Ticket, owner: Process | None) -> Call:
        """Begin a call when the queue lets it in. If its caller stops waiting, nothing is left."""
        session, request = ticket.candidate.session, ticket.candidate.request
        try:
            with self._calls.refusing(session, request.name):
                await self._queue.wait(ticket)
                # Granted anew: while it waited, the agent may have come to hold more memory, its
                # session may have been closed, and a device may have been lost.
                candidate = self._calls.grant(session, request, ticket.candidate.id)
                call = self._calls.open_call(candidate, ticket.apply(candidate.grant), owner)
        finally:
            ticket.release()
            if owner is not None:
                owner.close()
        self._queue.began(call, ticket)
        return call

    async def end_calls(self, session: Session) -> int:
        """End all calls of a session that is closing, open or waiting; returns how many were open.
        Raises RequestError."""
        self._queue.close_session(session)
        calls = list(session.calls.values())
        endings, slices = [], Slices()
        for call in calls:
            if call.parent is not None:
                continue  # it ends with the one that it is in
            endings.append(self._calls.end(call, False, None, Asker.SESSION))
            await slices.breathe()
        await asyncio.gather(*(end for end in endings if not isinstance(end, pb.Report)))
        return len(calls)
