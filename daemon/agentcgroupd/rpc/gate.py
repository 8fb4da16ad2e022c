"""What stands before every gRPC method, health checks and reflection included: the peer is known,
its budget allows the request, and its session has its turn on the loop."""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from agentcgroupd.errors import AgentcgroupdError, RequestError, as_request_error
from agentcgroupd.rpc.relay import Connection, Relay
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.wire import error_to_proto
from agentcgroupd.turns import Turns

ERROR_TRAILER = "agentcg-error-bin"

Context = grpc.aio.ServicerContext[Any, Any]


def _when_over(context: Context, then: Callable[..., None], *arguments: Any) -> None:
    """Have `then` called with `arguments` when a request is over, however that comes about."""
    # grpc hands the request to the callback, whose type in grpc-stubs is a protocol of its own.
    callback: Any = lambda _: then(*arguments)  # noqa: E731
    context.add_done_callback(callback)


async def abort(context: Context, error: RequestError) -> None:
    """End a request with the error's code, sentence and parts. Always raises."""
    trailer = ((ERROR_TRAILER, error_to_proto(error).SerializeToString()),)
    await context.abort(grpc.StatusCode[error.code], error.sentence, trailer)


class Gate(grpc.aio.ServerInterceptor):
    """Wraps the handlers of a server."""

    def __init__(self, metrics: Metrics, turns: Turns) -> None:
        self._metrics = metrics
        self._turns = turns
        self.relay: Relay | None = None
        """The relay, which knows the peers; set before the server starts."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with the gate before it."""
        handler = await continuation(details)
        if handler is None or (handler.request_streaming and not handler.response_streaming):
            return None  # there is no such method
        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            wrapped = self._unary(handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(wrapped, *serializers)
        if handler.unary_stream is not None:
            wrapped = self._stream(handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(wrapped, *serializers)
        wrapped = self._both_streams(handler.stream_stream)
        return grpc.stream_stream_rpc_method_handler(wrapped, *serializers)

    async def _enter(self, context: Context, watches: bool) -> Connection:
        """Find out who asks, and count the request until it is over."""
        assert self.relay is not None
        try:
            connection = self.relay.connection(context.peer())
            budgets, crowd = self.relay.budgets, connection.crowd
            budgets.open_stream(crowd, watches)
        except AgentcgroupdError as error:
            refused = as_request_error(error)
            self._metrics.rpc_errors.labels("gate", refused.code).inc()
            await abort(context, refused)
            raise AssertionError("abort always raises") from None
        _when_over(context, budgets.close_stream, crowd, watches)
        await self._turns.turn(crowd.turns_key)
        return connection

    def _unary(self, method: Any) -> Any:
        async def gated(request: Any, context: Context) -> Any:
            connection = await self._enter(context, watches=False)
            started = time.perf_counter()
            try:
                answer = await method(request, context)
            finally:
                took_s = time.perf_counter() - started
                self._turns.spent(connection.crowd.turns_key, took_s)
                assert self.relay is not None
                self.relay.budgets.took(connection.crowd, took_s)
            size = answer.ByteSize()
            connection.answered(size)
            _when_over(context, connection.taken, size)
            return answer

        return gated

    def _stream(self, method: Any) -> Any:
        if not inspect.isasyncgenfunction(method):
            # One that writes to its context instead, as Watch of the health service.
            async def writing(request: Any, context: Context) -> None:
                await self._enter(context, watches=True)
                await method(request, context)

            return writing

        async def gated(request: Any, context: Context) -> AsyncIterator[Any]:
            connection = await self._enter(context, watches=True)
            async for answer in self._counted(connection, method(request, context)):
                yield answer

        return gated

    def _both_streams(self, method: Any) -> Any:
        async def gated(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            connection = await self._enter(context, watches=True)
            turned = self._turned(connection, requests)
            async for answer in self._counted(connection, method(turned, context)):
                yield answer

        return gated

    async def _turned(
        self, connection: Connection, requests: AsyncIterator[Any]
    ) -> AsyncIterator[Any]:
        """Requests of a stream, each in a turn of its session."""
        async for request in requests:
            await self._turns.turn(connection.crowd.turns_key)
            yield request

    @staticmethod
    async def _counted(connection: Connection, answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Answers of a stream, each counted until the next is asked for: then it was taken."""
        async for answer in answers:
            size = answer.ByteSize()
            connection.answered(size)
            try:
                yield answer
            finally:
                connection.taken(size)
