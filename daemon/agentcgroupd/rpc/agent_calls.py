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
from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.request import intent_of_proto, request_of_proto
from agentcgroupd.rpc.callers import Caller, Callers
from agentcgroupd.rpc.peers import Peer
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.session import Call
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
        self, callers: Callers, calls: Calls, queue: AdmissionQueue, admission: Admission
    ) -> None:
        self._callers, self._calls = callers, calls
        self._queue, self._admission = queue, admission

    def caller(self, peer: Peer) -> Caller:
        """Find where the peer stands now. Raises PermissionDenied."""
        return self._callers.of(peer)

    def begin(
        self, peer: Peer, message: pb.BeginCallRequest
    ) -> pb.Call | Coroutine[Any, Any, pb.Call]:
        """Answer BeginCall; the peer's process holds the call open. Where the call has to wait,
        the answer is to be awaited. Raises RequestError."""
        caller = self.caller(peer)
        with self._calls.refusing(caller.session, message.name):
            request = request_of_proto(message)
        call = self._admission.begin(caller.session, request, peer.process, caller.outer)
        return call_to_proto(call, admin=False) if isinstance(call, Call) else _later(call)

    def open_call(self, call_id: str) -> Call | None:
        """Find an open call, for the daemon itself; None: it is not open."""
        return self._calls.open.get(call_id)

    def hung_up(self, call: Call) -> None:
        """Let go of a call that is for one command: who began it waits for it no longer."""
        self._calls.let_go_of(call)

    def end(
        self, peer: Peer, message: pb.EndCallRequest
    ) -> pb.Report | Coroutine[Any, Any, pb.Report]:
        """Answer EndCall; for a call that has ended by itself, with its report. Where processes
        have to die first, the answer is to be awaited. Raises RequestError."""
        caller = self.caller(peer)
        session = caller.session
        ended = session.report(message.call_id) if message.call_id else None
        if ended is not None and caller.sees_report(ended):
            return ended
        caller.check_queue(message.call_id)
        left = self._queue.leave(message.call_id, "it was ended by its agent", session)
        if left is not None:
            return left
        call = caller.find_to_end(message.call_id)
        status = message.wait_status if message.HasField("wait_status") else None
        if status is not None and not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            raise InvalidField("wait_status", str(status), "a wait status of an ended process")
        asker, why = _asker(caller)
        if message.command_only:
            return end_command(self._calls, call, message, asker, why)
        return self._calls.end(call, message.detach, status, asker, message.reason, why)

    def update(self, peer: Peer, message: pb.UpdateIntentRequest) -> pb.Call:
        """Answer UpdateIntent. Raises RequestError, with nothing changed."""
        call, only_lower = self.caller(peer).find_to_change(message.call_id)
        updated = self._calls.update(call, intent_of_proto(message.intent), only_lower)
        return call_to_proto(updated, admin=False)


def end_command(
    calls: Calls, call: Call, message: pb.EndCallRequest, asker: Asker, why: str = ""
) -> pb.Report:
    """Answer EndCall for the command of a call alone. Raises InvalidField."""
    if message.detach:
        raise InvalidField("command_only", "true", "false together with detach")
    return calls.end_command(call, asker, message.reason, why)


def _asker(caller: Caller) -> tuple[Asker, str]:
    """Say who ends a call: its agent, or the tool of a call."""
    if caller.call is None or caller.call.observed:
        return Asker.AGENT, ""
    return Asker.TOOL, f"a tool in call {caller.call.id} ended it"


async def _later(call: Coroutine[Any, Any, Call]) -> pb.Call:
    return call_to_proto(await call, admin=False)
