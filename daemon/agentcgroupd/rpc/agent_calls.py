"""BeginCall and EndCall, which come over gRPC and, for speed, over the attach socket as well."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from google.protobuf import message, unknown_fields

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField, NotFound
from agentcgroupd.rpc.peers import Peer, session_of
from agentcgroupd.state.session import Call, Process, Session
from agentcgroupd.telemetry.wire import call_to_proto

if TYPE_CHECKING:
    from agentcgroupd.calls.begin import Entrance, Turn
    from agentcgroupd.sessions.registry import Sessions


def refuse_unknown(request: message.Message) -> None:
    """A field that this version does not know was meant to do something; better said than dropped.
    Raises InvalidField."""
    # Typed as a sequence only: it has no __iter__.
    found = unknown_fields.UnknownFieldSet(request)
    if len(found):
        name = f"{request.DESCRIPTOR.name} field {found[0].field_number}"
        allowed = "the fields of this version of agentcgroup.proto"
        raise InvalidField(name, "", allowed, "it is unknown here")
    for descriptor, value in request.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE and isinstance(value, message.Message):
            refuse_unknown(value)


def intent_fields(intent: pb.Intent) -> dict[str, str]:
    """The fields of an intent that are said."""
    return {descriptor.name: value for descriptor, value in intent.ListFields()}


class AgentCalls:
    """What an agent may do with calls of its own session, however it asks."""

    def __init__(self, sessions: Sessions, entrance: Entrance) -> None:
        self._sessions = sessions
        self._entrance = entrance
        self._calls = entrance.calls

    def session(self, peer: Peer) -> Session:
        """The peer's session. Raises PermissionDenied."""
        return session_of(peer, self._sessions.of_cgroup)

    def call(self, peer: Peer, call_id: str) -> Call:
        """An open call of the peer's session. Raises NotFound, the same for one of another's."""
        call = self.session(peer).calls.get(call_id)
        if call is None:
            raise NotFound(f"no call {call_id[:64]!r} is open in this session", "call_id", call_id)
        return call

    def begin(
        self, peer: Peer, request: pb.BeginCallRequest
    ) -> pb.Call | Coroutine[Any, Any, pb.Call]:
        """BeginCall; the peer's process holds the call open. Where the call has to wait for room,
        it is to be awaited. Raises RequestError."""
        session, intent, argv = (
            self.session(peer),
            intent_fields(request.intent),
            list(request.argv),
        )
        asked = self._entrance.ask(session, request.name, intent, argv)
        if asked is not None:
            return self._begin_later(asked, intent, argv, peer.process.copy())
        call = self._entrance.begin(session, request.name, intent, argv, peer.process)
        return call_to_proto(call, admin=False)

    async def _begin_later(
        self, asked: Turn, intent: dict[str, str], argv: list[str], process: Process
    ) -> pb.Call:
        try:
            return call_to_proto(
                await self._entrance.begin_later(asked, intent, argv, process), admin=False
            )
        finally:
            process.close()

    def end(
        self, peer: Peer, request: pb.EndCallRequest
    ) -> pb.Report | Coroutine[Any, Any, pb.Report]:
        """EndCall; for a call that has ended by itself, its report. Where processes have to die
        first, the report is to be awaited. Raises RequestError."""
        ended = self.session(peer).report(request.call_id) if request.call_id else None
        if ended is not None:
            return ended
        waited = self._entrance.leave_queue(
            request.call_id, "it was ended by its agent", self.session(peer)
        )
        if waited is not None:
            return waited
        call = self.call(peer, request.call_id)
        status = request.wait_status if request.HasField("wait_status") else None
        if status is not None and not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            raise InvalidField("wait_status", str(status), "a wait status of an ended process")
        return self._calls.end(call, request.detach, status, "its agent ended the call")
