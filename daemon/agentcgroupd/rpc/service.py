"""What a gRPC service is made with: the parts that answer, and the way of an answer."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio
from google.protobuf import message

from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.queue import AdmissionQueue
from agentcgroupd.errors import AgentcgroupdError, as_request_error
from agentcgroupd.guard.policy_files import PolicyFiles
from agentcgroupd.rpc.agent_calls import AgentCalls, refuse_unknown
from agentcgroupd.rpc.gate import abort
from agentcgroupd.rpc.messages import Asking
from agentcgroupd.rpc.past import Past
from agentcgroupd.rpc.relay import Relay
from agentcgroupd.rpc.views import Views
from agentcgroupd.sessions.lifecycle import SessionLifecycle
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.turns import Slices, Turns

Context = grpc.aio.ServicerContext[Any, Any]
S = TypeVar("S", bound="Service")
Request = TypeVar("Request", bound=message.Message)
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the daemon that answer requests."""

    sessions: Sessions
    lifecycle: SessionLifecycle
    calls: Calls
    queue: AdmissionQueue
    agent_calls: AgentCalls
    views: Views
    past: Past
    policy_files: PolicyFiles
    notices: Notices
    turns: Turns


def answers(
    method: Callable[[S, Request, Asking], Awaitable[Response]],
) -> Callable[[S, Request, Context], Awaitable[Response]]:
    """Wrap a unary method for gRPC: it is timed, and the daemon's errors become statuses with a
    trailer. `Service.answer` calls the method itself."""
    name = method.__name__

    @functools.wraps(method)
    async def wrapper(self: S, request: Request, context: Context) -> Response:
        started = time.perf_counter()
        try:
            refuse_unknown(request)
            return await method(self, request, self.relay.connection(context.peer()))
        except AgentcgroupdError as error:
            await self.refuse(name, error, context)
            raise AssertionError("abort always raises") from None
        finally:
            self.parts.notices.metrics.rpc.labels(name).observe(time.perf_counter() - started)

    return wrapper


class Service:
    """What the two services have in common."""

    def __init__(self, parts: Parts, relay: Relay) -> None:
        self.parts = parts
        self.relay = relay

    async def answer(self, name: str, request: message.Message, by: Asking) -> message.Message:
        """Answer a unary method of the service that came in a packet. Raises AgentcgroupdError."""
        method: Callable[..., Awaitable[message.Message]]
        method = vars(type(self))[name].__wrapped__
        return await method(self, request, by)

    def slices(self, by: Asking) -> Slices:
        """Slices of a long piece of work, each in a turn of the caller's session."""
        return Slices(self.parts.turns, by.crowd.turns_key)

    async def refuse(self, name: str, error: AgentcgroupdError, context: Context) -> None:
        """Abort with the error's code and sentence."""
        refused = as_request_error(error)
        self.parts.notices.metrics.rpc_errors.labels(name, refused.code).inc()
        await abort(context, refused)
