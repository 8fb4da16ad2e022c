"""Endless answers (feedback, events) that outlive a restart of the daemon."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from agentcgroup.closing import Closing
from agentcgroup.errors import AgentcgError, Unavailable, from_rpc_error

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

RECONNECT_PAUSE_S = 0.1


class _StreamBase(Generic[T]):
    """The state of a stream, and what to do when it breaks.

    Args:
        start: starts the RPC; a daemon that is away is waited for.
        convert: makes the item of a message.
        endless: when the daemon ends the stream it is only stopping, and the stream is begun again.
    """

    def __init__(
        self, start: Callable[[], Any], convert: Callable[[Any], T], endless: bool
    ) -> None:
        self._start = start
        self._convert = convert
        self._endless = endless
        self._closed = False
        self._rpc: Any = None

    def _broken(self, error: grpc.RpcError) -> AgentcgError | None:
        """Return what to raise; None where the stream is to be started again (or was closed)."""
        typed = from_rpc_error(error)
        return None if self._closed or isinstance(typed, Unavailable) else typed

    def _is_closed(self) -> bool:
        return self._closed

    def _cancel(self) -> None:
        self._closed = True
        if self._rpc is not None:
            self._rpc.cancel()


class Stream(_StreamBase[T], Closing):
    """An iterator that waits for the next item.

    After a restart of the daemon the stream goes on; what happened in between is not delivered.
    `close()`, from any thread, ends the iteration.
    """

    def __init__(
        self, start: Callable[[], Any], convert: Callable[[Any], T], endless: bool = True
    ) -> None:
        super().__init__(start, convert, endless)
        self._closing = threading.Event()
        self._rpc = start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while not self._closed:
            try:
                return self._convert(next(self._rpc))
            except grpc.RpcError as error:
                raised = self._broken(error)
                if raised is not None:
                    raise raised from None
            except StopIteration:
                if not self._endless:
                    break
            self._closing.wait(RECONNECT_PAUSE_S)
            if not self._is_closed():
                self._rpc = self._start()
        raise StopIteration

    def close(self) -> None:
        """End the iteration, also one that is waiting in another thread."""
        self._cancel()
        self._closing.set()


class AsyncStream(_StreamBase[T]):
    """The asyncio form of `Stream`, begun by the first item asked for, or by `async with`."""

    def __init__(
        self,
        start: Callable[[], Any],
        convert: Callable[[Any], T],
        check: Callable[[], Awaitable[Any]],
        endless: bool = True,
    ) -> None:
        super().__init__(start, convert, endless)
        self._check = check

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._rpc is None and not self._closed:
            await self.__aenter__()
        while not self._closed:
            try:
                message = await self._rpc.read()
                if message is not grpc.aio.EOF:
                    return self._convert(message)
                if not self._endless:
                    break
            except grpc.RpcError as error:
                raised = self._broken(error)
                if raised is not None:
                    raise raised from None
            except asyncio.CancelledError:
                # close() in another task cancels the RPC, which does not cancel this task.
                if self._is_closed():
                    break
                raise
            await asyncio.sleep(RECONNECT_PAUSE_S)
            if not self._is_closed():
                self._rpc = self._start()
        raise StopAsyncIteration

    def close(self) -> None:
        """End the iteration, also one that is waiting in another task."""
        self._cancel()

    async def __aenter__(self) -> Self:
        if self._rpc is None:
            await self._check()
            self._rpc = self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
