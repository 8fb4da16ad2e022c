"""`subprocess.run` for asyncio: the same arguments, text handling and errors."""

from __future__ import annotations

import asyncio
import io
import locale
import os
import subprocess
from collections.abc import Awaitable, Callable
from signal import SIGKILL, SIGTERM
from typing import Any, NamedTuple, cast

from agentcgroup.launch import Launch
from agentcgroup.pipes import LINGER_S, read_away, read_rest

_LIMIT_BYTES = 1 << 16
"""Size of the buffers of a stream, as asyncio has it."""


class Finished(NamedTuple):
    """A process that has ended: the return code as subprocess gives it, and what was collected."""

    returncode: int
    stdout: Any
    stderr: Any


class _Collector(asyncio.SubprocessProtocol):
    """A collector of what a process writes.

    exited: set at the end of the process. done: set when the pipes are closed too.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, piped: set[int]) -> None:
        self.chunks: dict[int, list[bytes]] = {fd: [] for fd in piped}
        self.exited: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self._open = set(piped)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.chunks[fd].append(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        self._check()

    def process_exited(self) -> None:
        if not self.exited.done():
            self.exited.set_result(None)
        self._check()

    def _check(self) -> None:
        if self.exited.done() and not self._open and not self.done.done():
            self.done.set_result(None)

    def collected(self, fd: int) -> bytes | None:
        return b"".join(self.chunks[fd]) if fd in self.chunks else None


class _Text:
    """The text handling that text, encoding, errors and universal_newlines ask of Popen.

    These are taken out of `kwargs`.
    """

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.encoding = kwargs.pop("encoding", None)
        self.errors = kwargs.pop("errors", None)
        wanted = [kwargs.pop("text", None), kwargs.pop("universal_newlines", None)]
        self.on = bool(self.encoding or self.errors or any(wanted))

    def encode(self, text: Any) -> bytes:
        if not self.on:
            return cast(bytes, text)
        encoding = self.encoding or locale.getpreferredencoding(False)
        return cast(str, text).encode(encoding, self.errors or "strict")

    def decode(self, raw: bytes | None) -> Any:
        if not self.on or raw is None:
            return raw
        reader = io.TextIOWrapper(io.BytesIO(raw), encoding=self.encoding, errors=self.errors)
        return reader.read()


class CallProcess(asyncio.subprocess.Process):
    """An asyncio process in a call: the end of the process is what is waited for, not that of the
    children that hold its pipes."""

    def __init__(
        self,
        transport: asyncio.SubprocessTransport,
        protocol: _Streams,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(transport, protocol, loop)
        self._pipes, self._exited = transport, protocol.exited
        # Whether it was sent a signal through this object.
        self.signalled = False

    def send_signal(self, signal: int) -> None:
        """Do what asyncio's does, and remember it if the process had not ended."""
        self.signalled = self.signalled or self.returncode is None
        super().send_signal(signal)

    def terminate(self) -> None:
        """Do what asyncio's does."""
        self.send_signal(SIGTERM)

    def kill(self) -> None:
        """Do what asyncio's does."""
        self.send_signal(SIGKILL)

    async def wait(self) -> int:
        """Wait for the process alone and return its return code."""
        await asyncio.wait([self._exited])
        return cast(int, self.returncode)

    async def communicate(
        self, input: bytes | bytearray | memoryview | None = None
    ) -> tuple[Any, Any]:
        """Do what asyncio's does, and return at most LINGER_S after the process has ended."""
        sending = asyncio.ensure_future(self._send(input))
        chunks: list[list[bytes]] = [[], []]
        readers = [
            asyncio.ensure_future(_read(stream, into))
            for stream, into in zip((self.stdout, self.stderr), chunks, strict=True)
            if stream is not None
        ]
        try:
            await asyncio.wait([self._exited])
            if readers:
                await asyncio.wait(readers, timeout=LINGER_S)
        finally:
            for task in (sending, *readers):
                task.cancel()
        out, err = (b"".join(into) for into in chunks)
        out += _drain(self._pipes, 1)
        err += _drain(self._pipes, 2)
        self._pipes.close()
        return (out if self.stdout is not None else None, err if self.stderr is not None else None)

    async def _send(self, input: bytes | bytearray | memoryview | None) -> None:
        if self.stdin is None:
            return
        try:
            if input:
                self.stdin.write(input)
                await self.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # as asyncio's: a process need not read what it is sent
        finally:
            self.stdin.close()


class _Streams(asyncio.subprocess.SubprocessStreamProtocol):
    """asyncio's own, which also says when the process has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        super().__init__(limit=limit, loop=loop)
        self.exited: asyncio.Future[None] = loop.create_future()

    def process_exited(self) -> None:
        if not self.exited.done():
            self.exited.set_result(None)
        super().process_exited()


async def start(launch: Launch) -> CallProcess:
    """Start a process as asyncio.create_subprocess_exec does, with the same options."""
    loop = asyncio.get_running_loop()
    options = {"stdin": None, "stdout": None, "stderr": None, **launch.options}
    limit = options.pop("limit", _LIMIT_BYTES)
    with launch.starting():
        transport, protocol = await loop.subprocess_exec(
            lambda: _Streams(loop, limit), *launch.argv, **options
        )
    return CallProcess(transport, protocol, loop)


async def _read(stream: asyncio.StreamReader, into: list[bytes]) -> None:
    while chunk := await stream.read(_LIMIT_BYTES):
        into.append(chunk)


def _drain(transport: asyncio.SubprocessTransport, fd: int) -> bytes:
    """Read what stands in a pipe that a child holds open, and leave what comes later to a thread;
    empty where the pipe has ended."""
    pipe = transport.get_pipe_transport(fd)
    if pipe is None or pipe.is_closing():
        return b""
    reader = cast(asyncio.ReadTransport, pipe)
    reader.pause_reading()
    file = reader.get_extra_info("pipe")
    if file is None:
        return b""  # a loop of another kind, which has read all that a pipe holds by now
    rest = read_rest(file.fileno())
    read_away([os.dup(file.fileno())])
    return rest


async def communicate(
    launch: Launch,
    args: Any,
    input: Any,
    timeout: float | None,
    give_up: Callable[[BaseException, Callable[[], None]], Awaitable[None]],
    started: Callable[[], Awaitable[None]] | None = None,
) -> Finished:
    """Start a process, feed it `input`, collect its pipes, wait for its end.

    Args:
        launch: the command line, with arguments of subprocess.Popen.
        args: what TimeoutExpired shall name as the command.
        input: for its stdin, or None.
        timeout: seconds, or None.
        give_up: called with the error, and with what kills the process, where it still runs.
        started: awaited once the process is there; what it raises is an error like others.

    Raises:
        subprocess.TimeoutExpired: the process has been killed.
        asyncio.CancelledError: the task was cancelled; the process has been killed.
    """
    loop = asyncio.get_running_loop()
    options = {"stdin": None, "stdout": None, "stderr": None, **launch.options}
    options.pop("bufsize", None)
    text = _Text(options)
    piped = {fd for fd, name in ((1, "stdout"), (2, "stderr")) if options[name] == subprocess.PIPE}
    with launch.starting():
        transport, collector = await loop.subprocess_exec(
            lambda: _Collector(loop, piped), *launch.argv, **options
        )
    try:
        try:
            if started is not None:
                await started()
            if input is not None:
                stdin = cast(asyncio.WriteTransport, transport.get_pipe_transport(0))
                stdin.write(text.encode(input))
                stdin.close()
            await asyncio.wait([collector.exited], timeout=timeout)
            if not collector.exited.done():
                raise subprocess.TimeoutExpired(
                    args, cast(float, timeout), collector.collected(1), collector.collected(2)
                )
            await asyncio.wait([collector.done], timeout=LINGER_S)
        except BaseException as error:
            if not collector.exited.done():
                await give_up(error, lambda: _kill(transport))
            raise
        for fd in piped:
            collector.chunks[fd].append(_drain(transport, fd))
        return Finished(
            cast(int, transport.get_returncode()),
            text.decode(collector.collected(1)),
            text.decode(collector.collected(2)),
        )
    finally:
        if not collector.exited.done():
            _kill(transport)
            await asyncio.wait([collector.exited])
        transport.close()


def _kill(transport: asyncio.SubprocessTransport) -> None:
    try:
        transport.kill()
    except ProcessLookupError:
        return
