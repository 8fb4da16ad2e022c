"""BeginCall and EndCall, which come over gRPC and, for speed, over the attach socket as well."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from google.protobuf import message, unknown_fields

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.convert import call_to_proto
from agentcgroupd.errors import InvalidField, NotFound
from agentcgroupd.rpc.identity import Peer, session_of
from agentcgroupd.session import Call, Session

if TYPE_CHECKING:
    from agentcgroupd.calls import Calls
    from agentcgroupd.sessions import Sessions


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

    def __init__(self, sessions: Sessions, calls: Calls) -> None:
        self._sessions = sessions
        self._calls = calls

    def session(self, peer: Peer) -> Session:
        """The peer's session. Raises PermissionDenied."""
        return session_of(peer, self._sessions.of_cgroup)

    def call(self, peer: Peer, call_id: str) -> Call:
        """An open call of the peer's session. Raises NotFound, the same for one of another's."""
        call = self.session(peer).calls.get(call_id)
        if call is None:
            raise NotFound(f"no call {call_id[:64]!r} is open in this session", "call_id", call_id)
        return call

    def begin(self, peer: Peer, request: pb.BeginCallRequest) -> pb.Call:
        """BeginCall; the peer's process holds the call open. Raises RequestError."""
        call = self._calls.begin(
            self.session(peer), request.name, intent_fields(request.intent), list(request.argv),
            peer.process,
        )  # fmt: skip
        return call_to_proto(call, admin=False)

    def end(
        self, peer: Peer, request: pb.EndCallRequest
    ) -> pb.Report | Coroutine[Any, Any, pb.Report]:
        """EndCall; for a call that has ended by itself, its report. Where processes have to die
        first, the report is to be awaited. Raises RequestError."""
        ended = self.session(peer).report(request.call_id) if request.call_id else None
        if ended is not None:
            return ended
        call = self.call(peer, request.call_id)
        status = request.wait_status if request.HasField("wait_status") else None
        if status is not None and not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            raise InvalidField("wait_status", str(status), "a wait status of an ended process")
        return self._calls.end(call, request.detach, status, "its agent ended the call")
