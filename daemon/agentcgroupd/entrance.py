"""How calls come in: at once, or by way of the queue for room."""

from __future__ import annotations

from collections.abc import Mapping

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.admission import grant_for
from agentcgroupd.calls import Calls
from agentcgroupd.intent import check_name, parse_intent
from agentcgroupd.session import Call, Process, Session
from agentcgroupd.waiting import Asked, Queue


class Entrance:
    """What BeginCall does, however it is asked for. Without a queue nobody waits."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.queue: Queue | None = None

    def open_queue(self, queue: Queue) -> None:
        """From now on calls may have to wait."""
        self.queue = queue
        self.calls.waiting = queue.count

    def ask(
        self, session: Session, name: str, intent: Mapping[str, str], argv: list[str]
    ) -> Asked | None:
        """A place in the queue where the call has to wait for room; None: `begin` it now. Raises
        RequestError."""
        if self.queue is None or not intent.get("memory"):
            return None
        with self.calls.refusing(session, name):
            check_name(name)
            self.calls.check_room(session)
            reports = self.calls.reports
            grant = grant_for(parse_intent(intent), reports.ceiling(session))
            expected = reports.likely_bytes(session, name, argv, grant)
            return self.queue.ask(session, name, argv, grant, expected)

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
        self, asked: Asked, intent: Mapping[str, str], argv: list[str], owner: Process | None
    ) -> Call:
        """Wait for its turn, then as `begin`. Whoever stops waiting leaves nothing behind."""
        assert self.queue is not None
        with self.calls.refusing(asked.session, asked.name):
            await self.queue.wait(asked)
        call = self.calls.begin(asked.session, asked.name, intent, argv, owner, call_id=asked.id)
        self.queue.began(call, asked)
        return call

    def leave_queue(
        self, call_id: str, why: str, session: Session | None = None
    ) -> pb.Report | None:
        """See Queue.leave."""
        return None if self.queue is None else self.queue.leave(call_id, why, session)

    def waiting(self, session: Session) -> list[pb.Call]:
        """Calls of a session that wait, as ListCalls shows them."""
        if self.queue is None or not len(self.queue):
            return []
        return [self.queue.to_proto(asked) for asked in self.queue.of(session)]
