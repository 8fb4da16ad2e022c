"""BeginCall and EndCall, which come over gRPC and, for speed, over the attach socket as well."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from typing import Any

from google.protobuf import message, unknown_fields

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.admission import Admission
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.queue import AdmissionQueue
from agentcgroupd.errors import InvalidField, NotFound
from agentcgroupd.intents.request import request_of_proto
from agentcgroupd.rpc.peers import Peer, session_of
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.session import Call, Session
from agentcgroupd.telemetry.wire import call_to_proto

UNKNOWN_NAMED_BYTES = 4096
"""Only in messages up to this size is an unknown field looked for to be named."""


def refuse_unknown(request: message.Message) -> None:
    """Refuse a message with a field that this version does not know: it was meant to do something,
    and dropping it in silence would hide that it is not done. Raises InvalidField.

    Unknown fields are dropped and what is left is measured, which costs next to nothing however
    many there are; to look at each of them would not.
    """
    before = request.ByteSize()
    named = _unknown_of(request) if before <= UNKNOWN_NAMED_BYTES else ""
    request.DiscardUnknownFields()
    if named or request.ByteSize() != before:
        name = named or request.DESCRIPTOR.name
        allowed = "the fields of this version of agentcgroup.proto"
        raise InvalidField(name, "", allowed, "it is unknown here")


def _unknown_of(request: message.Message) -> str:
    """Name an unknown field of a message or of one in it; empty: there is none."""
    # Typed as a sequence only: it has no __iter__.
    found = unknown_fields.UnknownFieldSet(request)
    if len(found):
        return f"{request.DESCRIPTOR.name} field {found[0].field_number}"
    for descriptor, value in request.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE and isinstance(value, message.Message):
            if name := _unknown_of(value):
                return name
    return ""


class AgentCalls:
    """Calls of an agent's own session, begun and ended, however it asks."""

    def __init__(
        self, sessions: Sessions, calls: Calls, queue: AdmissionQueue, admission: Admission
    ) -> None:
        self._sessions, self._calls = sessions, calls
        self._queue, self._admission = queue, admission

    def session(self, peer: Peer) -> Session:
        """Find the peer's session. Raises PermissionDenied."""
        return session_of(peer, self._sessions.of_cgroup)

    def call(self, peer: Peer, call_id: str) -> Call:
        """Find an open call of the peer's session. Raises NotFound, the same for one of another
        session."""
        call = self.session(peer).calls.get(call_id)
        if call is None:
            raise NotFound(f"no call {call_id[:64]!r} is open in this session", "call_id", call_id)
        return call

    def begin(
        self, peer: Peer, message: pb.BeginCallRequest
    ) -> pb.Call | Coroutine[Any, Any, pb.Call]:
        """Answer BeginCall; the peer's process holds the call open. Where the call has to wait,
        the answer is to be awaited. Raises RequestError."""
        session = self.session(peer)
        with self._calls.refusing(session, message.name):
            request = request_of_proto(message)
        call = self._admission.begin(session, request, peer.process)
        return call_to_proto(call, admin=False) if isinstance(call, Call) else _later(call)

    def end(
        self, peer: Peer, message: pb.EndCallRequest
    ) -> pb.Report | Coroutine[Any, Any, pb.Report]:
        """Answer EndCall; for a call that has ended by itself, with its report. Where processes
        have to die first, the answer is to be awaited. Raises RequestError."""
        session = self.session(peer)
        ended = session.report(message.call_id) if message.call_id else None
        if ended is not None:
            return ended
        left = self._queue.leave(message.call_id, "it was ended by its agent", session)
        if left is not None:
            return left
        call = self.call(peer, message.call_id)
        status = message.wait_status if message.HasField("wait_status") else None
        if status is not None and not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            raise InvalidField("wait_status", str(status), "a wait status of an ended process")
        return self._calls.end(call, message.detach, status, Asker.AGENT, message.reason)


async def _later(call: Coroutine[Any, Any, Call]) -> pb.Call:
    return call_to_proto(await call, admin=False)
