"""`subprocess.run` for asyncio: the same arguments, text handling and errors."""

from __future__ import annotations

import asyncio
import io
import locale
import subprocess
from typing import Any, NamedTuple, cast


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


async def communicate(
    argv: list[str], args: Any, input: Any, timeout: float | None, kwargs: dict[str, Any]
) -> Finished:
    """Start `argv`, feed it `input`, collect its pipes, wait for its end.

    Args:
        argv: the command line.
        args: what TimeoutExpired shall name as the command.
        input: for its stdin, or None.
        timeout: seconds, or None.
        kwargs: arguments of subprocess.Popen.

    Raises:
        subprocess.TimeoutExpired: the process has been killed.
        asyncio.CancelledError: the task was cancelled; the process has been killed.
    """
    loop = asyncio.get_running_loop()
    options = {"stdin": None, "stdout": None, "stderr": None, **kwargs}
    options.pop("bufsize", None)
    text = _Text(options)
    piped = {fd for fd, name in ((1, "stdout"), (2, "stderr")) if options[name] == subprocess.PIPE}
    transport, collector = await loop.subprocess_exec(
        lambda: _Collector(loop, piped), *argv, **options
    )
    try:
        if input is not None:
            stdin = cast(asyncio.WriteTransport, transport.get_pipe_transport(0))
            stdin.write(text.encode(input))
            stdin.close()
        await asyncio.wait([collector.done], timeout=timeout)
        if not collector.done.done():
            _kill(transport)
            await collector.exited
            raise subprocess.TimeoutExpired(
                args, cast(float, timeout), collector.collected(1), collector.collected(2)
            )
        return Finished(
            cast(int, transport.get_returncode()),
            text.decode(collector.collected(1)),
            text.decode(collector.collected(2)),
        )
    finally:
        if not collector.exited.done():
            _kill(transport)
            await collector.exited
        # Another process may still hold the other ends of the pipes; nobody reads them any more.
        transport.close()


def _kill(transport: asyncio.SubprocessTransport) -> None:
    try:
        transport.kill()
    except ProcessLookupError:
        return
