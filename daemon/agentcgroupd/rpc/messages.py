"""Requests that come in a packet as a message of agentcgroup.proto, and their answers.

The messages, their checks and their effects are those of gRPC. BeginCall and EndCall of agents are
answered in one go, because every tool call waits for them; all others by the methods of the gRPC
services.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Literal, Protocol

from google.protobuf import message

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import (
    AgentcgroupdError,
    Internal,
    RequestError,
    Unavailable,
    as_request_error,
)
from agentcgroupd.rpc.agent_calls import AgentCalls
from agentcgroupd.rpc.budgets import Crowd
from agentcgroupd.rpc.packets import ANSWER_BYTES_MAX, TOO_LONG, rpc_request
from agentcgroupd.rpc.peers import Peer
from agentcgroupd.state.session import Call
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.wire import error_to_proto
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

QUERY_COST = 3.0
"""What a request costs besides its packet where it is not the beginning or the end of a call: lists
take the daemon longer."""


class Asking(Protocol):
    """A connection, and the process and the crowd that it belongs to."""

    @property
    def peer(self) -> Peer:
        """The process that opened it."""

    @property
    def crowd(self) -> Crowd:
        """Whose budget it uses."""


class Service(Protocol):
    """The methods of a gRPC service."""

    async def answer(self, name: str, request: message.Message, by: Asking) -> message.Message:
        """Answer a unary method. Raises AgentcgroupdError."""


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that is not there yet. `may_wait`: it may take as long as a call can wait."""

    packet: Awaitable[bytes]
    may_wait: bool


@dataclass(frozen=True, slots=True)
class Stays:
    """An answer to a caller who stays connected until `call` has ended, for its report."""

    packet: bytes
    call: Call


class Messages:
    """Answers the messages that come to one attach socket."""

    def __init__(
        self,
        role: Literal["Agent", "Admin"],
        service: Service,
        calls: AgentCalls | None,
        metrics: Metrics,
        turns: Turns,
    ) -> None:
        """`role`: the service's name in the protocol. `calls`: begins and ends calls at once; None:
        `service` does."""
        self._role, self._service, self._calls = role, service, calls
        self._metrics, self._turns = metrics, turns

    def answer(self, by: Asking, data: bytes, sender: int | None) -> bytes | Later | Stays:
        """Answer the packet `data`, which the process `sender` sent; None: the kernel did not tell
        who. Raises nothing."""
        started = time.perf_counter()
        method = "packet"
        try:
            by.peer.check_sender(sender)
            request = rpc_request(data, self._role)
            method = request.method
            answer = self._begin_or_end(by.peer, request.message)
            if answer is None:
                by.crowd.packets.take(QUERY_COST)
                return Later(self._ask(method, request.message, by), may_wait=False)
            if not isinstance(answer, message.Message):
                may_wait = isinstance(request.message, pb.BeginCallRequest)
                return Later(self._packet(method, answer), may_wait)
            if isinstance(request.message, pb.BeginCallRequest) and request.message.one_command:
                return self._staying(packet_of(answer), answer)
            return packet_of(answer)
        except Exception as error:
            if not isinstance(error, AgentcgroupdError):
                log.exception("%s in a packet failed", method)
            return self._refused(error)
        finally:
            self._metrics.rpc.labels(method).observe(time.perf_counter() - started)

    def _begin_or_end(
        self, peer: Peer, request: message.Message
    ) -> message.Message | Awaitable[message.Message] | None:
        """Begin or end an agent's call; None: that is not what is asked for."""
        if self._calls is not None and isinstance(request, pb.BeginCallRequest):
            return self._calls.begin(peer, request)
        if self._calls is not None and isinstance(request, pb.EndCallRequest):
            return self._calls.end(peer, request)
        return None

    def _staying(self, packet: bytes, answer: message.Message) -> bytes | Stays:
        assert self._calls is not None and isinstance(answer, pb.Call)
        call = self._calls.open_call(answer.id)
        return packet if call is None else Stays(packet, call)

    def hung_up(self, call: Call) -> None:
        """Let go of a call whose caller no longer waits for its report."""
        if self._calls is not None:
            self._calls.hung_up(call)

    async def _ask(self, method: str, request: message.Message, by: Asking) -> bytes:
        started = time.perf_counter()
        try:
            return await self._packet(method, self._service.answer(method, request, by))
        finally:
            self._turns.spent(by.crowd.turns_key, time.perf_counter() - started)

    async def _packet(self, method: str, answer: Awaitable[message.Message]) -> bytes:
        try:
            return packet_of(await answer)
        except Exception as error:
            if not isinstance(error, AgentcgroupdError):
                log.exception("%s in a packet failed", method)
            return self._refused(error)

    def _refused(self, error: Exception) -> bytes:
        refused = as_request_error(known(error))
        self._metrics.rpc_errors.labels("packet", refused.code).inc()
        return refusal(refused)


def packet_of(answer: message.Message) -> bytes:
    """The packet that answers with a message."""
    raw = answer.SerializeToString()
    return b"OK\0" + raw if len(raw) <= ANSWER_BYTES_MAX else TOO_LONG


def refusal(error: RequestError) -> bytes:
    """The packet that refuses a request with a message."""
    return b"ERR\0" + error_to_proto(error).SerializeToString()


def known(error: Exception) -> AgentcgroupdError:
    """An error as a caller may be told it. Without an answer the launcher would run the tool
    without limits, so a failure of the daemon's own is one, too."""
    if isinstance(error, AgentcgroupdError):
        return error
    if isinstance(error, OSError):
        return Unavailable(f"the daemon lacks what it needs: {os.strerror(error.errno or 0)}")
    return Internal("the daemon failed; its log says how")
