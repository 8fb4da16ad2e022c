"""How calls come in: at once, or by way of the queues for a GPU and for room."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.queue import Asked, Queue
from agentcgroupd.intents.grant import Grant, grant_for
from agentcgroupd.intents.parse import check_name, parse_intent
from agentcgroupd.state.session import Call, Process, Session

if TYPE_CHECKING:
    from agentcgroupd.gpu.queue import GpuAsked
    from agentcgroupd.gpu.service import Gpus


@dataclass(frozen=True, slots=True)
class Turn:
    """A call that has to wait: for its part of a GPU first (`gpu`), then for room (`memory`)."""

    id: str
    session: Session
    name: str
    argv: list[str]
    grant: Grant
    memory: Asked | None = None
    gpu: GpuAsked | None = None


class Entrance:
    """What BeginCall does, however it is asked for. Without a queue nobody waits."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.queue: Queue | None = None
        self.gpus: Gpus | None = None
        calls.waiting = self._count

    def open_queue(self, queue: Queue) -> None:
        """From now on calls may have to wait for room."""
        self.queue = queue

    def _count(self, session: Session) -> int:
        waiting = 0 if self.queue is None else self.queue.count(session)
        return waiting + (len(self.gpus.queue.of(session)) if self.gpus is not None else 0)

    def ask(
        self, session: Session, name: str, intent: Mapping[str, str], argv: list[str]
    ) -> Turn | None:
        """A place in a queue where the call has to wait; None: `begin` it now. Raises
        RequestError."""
        wants_gpu = self.gpus is not None and (intent.get("gpu") or intent.get("gpu_memory"))
        if not wants_gpu and (self.queue is None or not intent.get("memory")):
            return None
        with self.calls.refusing(session, name):
            check_name(name)
            self.calls.check_room(session)
            grant = grant_for(parse_intent(intent), self.calls.reports.ceiling(session))
            call_id = secrets.token_hex(6)
            turn = Turn(call_id, session, name, argv, grant)
            if wants_gpu and self.gpus is not None:
                asked = self.gpus.queue.ask(call_id, session, name, argv, grant)
                if asked is not None:
                    return Turn(call_id, session, name, argv, grant, gpu=asked)
            try:
                memory = self._ask_memory(turn)
            except BaseException:
                self._leave_gpu(call_id)
                raise
            if memory is not None:
                return Turn(call_id, session, name, argv, grant, memory)
            # It begins at once: its part is found again then, and nobody comes between.
            self._leave_gpu(call_id, look=False)
            return None

    def _ask_memory(self, turn: Turn) -> Asked | None:
        if self.queue is None or not turn.grant.memory_expected_bytes:
            return None
        reports = self.calls.reports
        expected = reports.likely_bytes(turn.session, turn.name, turn.argv, turn.grant)
        return self.queue.ask(
            turn.session, turn.name, turn.argv, turn.grant, expected, call_id=turn.id
        )

    def _leave_gpu(self, call_id: str, look: bool = True) -> None:
        if self.gpus is not None:
            self.gpus.queue.leave(call_id, look)

    def begin(
        self,
        session: Session,
        name: str,
        intent: Mapping[str, str],
        argv: list[str],
        owner: Process | None,
    ) -> Call:
        """See Calls.begin."""
        return self.calls.begin(session, name, intent, argv, owner)

    async def begin_later(
        self, turn: Turn, intent: Mapping[str, str], argv: list[str], owner: Process | None
    ) -> Call:
        """Wait for its turn, then as `begin`. Whoever stops waiting leaves nothing behind."""
        try:
            memory = turn.memory
            with self.calls.refusing(turn.session, turn.name):
                if turn.gpu is not None and self.gpus is not None:
                    await self.gpus.queue.wait(turn.gpu)
                    memory = self._ask_memory(turn)
                if memory is not None and self.queue is not None:
                    await self.queue.wait(memory)
            call = self.calls.begin(turn.session, turn.name, intent, argv, owner, call_id=turn.id)
        finally:
            self._leave_gpu(turn.id)
        if memory is not None and self.queue is not None:
            self.queue.began(call, memory)
        elif turn.gpu is not None and self.gpus is not None:
            self.gpus.queue.began(call, turn.gpu)
        return call

    def leave_queue(
        self, call_id: str, why: str, session: Session | None = None
    ) -> pb.Report | None:
        """See Queue.leave."""
        left = None if self.queue is None else self.queue.leave(call_id, why, session)
        if left is None and self.gpus is not None:
            left = self.gpus.queue.cancel_id(call_id, why, session)
        return left

    def close_session(self, session: Session) -> None:
        """Nothing of a session waits any more."""
        if self.queue is not None:
            self.queue.close_session(session)
        if self.gpus is not None:
            for asked in self.gpus.queue.of(session):
                self.gpus.queue.cancel(asked, f"session {session.id} is being closed")

    def waiting(self, session: Session) -> list[pb.Call]:
        """Calls of a session that wait, as ListCalls shows them."""
        found = []
        if self.queue is not None and len(self.queue):
            found = [self.queue.to_proto(asked) for asked in self.queue.of(session)]
        if self.gpus is not None:
            found += [self.gpus.queue.to_proto(asked) for asked in self.gpus.queue.of(session)]
        return found
