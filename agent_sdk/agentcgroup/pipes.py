"""Talking with a process through its pipes until it has ended, and no longer: children that it
leaves behind may hold the other ends open for as long as they live."""

from __future__ import annotations

import fcntl
import io
import os
import select
import selectors
import struct
import subprocess
import termios
import threading
import time
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    PopenAny = subprocess.Popen[Any]
else:
    PopenAny = subprocess.Popen

LINGER_S = 0.2
"""Time after the end of a process in which its pipes are still read, if a child holds them open:
the last lines of `cmd > >(tee log)` come then. What the process itself has written is always
read."""
POLL_S = 0.05
"""Time between two looks at a process where the kernel gives no pidfd."""
SIGINT_WAIT_S = 0.25
"""Time that a process has to end by itself after ^C, as subprocess has it."""
_READ_BYTES = 1 << 15


def unread_bytes(fd: int) -> int:
    """Count what stands in a pipe now. Raises OSError."""
    (count,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(count)


def read_rest(fd: int) -> bytes:
    """Read what stands in a pipe now, without waiting for more. Raises OSError."""
    left, chunks = unread_bytes(fd), []
    while left > 0 and (chunk := os.read(fd, left)):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def buffered(pipe: IO[Any]) -> Any:
    """Take what a caller's own `readline` has read ahead of a pipe, without reading from it."""
    fd = pipe.fileno()
    ours, empty = os.dup(fd), os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.dup2(empty, fd, inheritable=False)
        return pipe.read()
    finally:
        os.dup2(ours, fd, inheritable=False)
        os.close(empty)
        os.close(ours)


def read_away(fds: list[int]) -> None:
    """Read and drop what still comes through these pipes, in a thread, and close them at their end:
    a child that lives on must neither block on a full pipe nor die of a closed one."""
    if fds:
        threading.Thread(target=_read_away, args=(fds,), daemon=True).start()


def _read_away(fds: list[int]) -> None:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    left = set(fds)
    while left:
        for fd, _ in poll.poll():
            try:
                ended = not os.read(fd, _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                ended = True
            if ended:
                poll.unregister(fd)
                os.close(fd)
                left.discard(fd)


class Conversation:
    """Does what `Popen.communicate` does, but ends with the process."""

    def __init__(self, process: PopenAny, input: Any) -> None:
        """Prepare to send `input` (bytes, or text in text mode; None: nothing)."""
        self._process = process
        self._input = memoryview(self._encoded(input))
        self._chunks: dict[IO[Any], list[bytes]] = {
            pipe: [] for pipe in (process.stdout, process.stderr) if pipe is not None
        }
        self._before = {pipe: buffered(pipe) for pipe in self._chunks if not pipe.closed}

    def _encoded(self, input: Any) -> bytes:
        stdin: Any = self._process.stdin
        if input and isinstance(stdin, io.TextIOBase):
            return bytes(input.encode(stdin.encoding, stdin.errors or "strict"))
        return bytes(input or b"")

    def hold(self, timeout: float | None) -> tuple[Any, Any]:
        """Talk until the process has ended; returns what it wrote to stdout and to stderr.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds. A later call goes on with it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with selectors.PollSelector() as selector:
                self._register(selector)
                self._until_end(selector, timeout, deadline)
                self._linger(selector)
        except KeyboardInterrupt:
            try:
                self._process.wait(SIGINT_WAIT_S)
            except subprocess.TimeoutExpired:
                pass  # it outlives the terminal's ^C, as it may
            raise
        self._close()
        return self._collected(self._process.stdout), self._collected(self._process.stderr)

    def _register(self, selector: selectors.PollSelector) -> None:
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            try:
                stdin.flush()
            except BrokenPipeError:
                self._input = self._input[:0]
            if self._input:
                selector.register(stdin, selectors.EVENT_WRITE)
            else:
                _close_quietly(stdin)
        for pipe in self._chunks:
            if not pipe.closed:
                selector.register(pipe, selectors.EVENT_READ)

    def _until_end(
        self, selector: selectors.PollSelector, timeout: float | None, deadline: float | None
    ) -> None:
        pidfd = self._pidfd()
        try:
            if pidfd is not None:
                selector.register(pidfd, selectors.EVENT_READ)
            while self._process.poll() is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    assert timeout is not None
                    raise self._expired(timeout)
                if pidfd is None:
                    left = POLL_S if left is None else min(left, POLL_S)
                self._step(selector, left)
        finally:
            if pidfd is not None:
                selector.unregister(pidfd)
                os.close(pidfd)

    def _pidfd(self) -> int | None:
        """Open a descriptor that is readable when the process has ended; None: there is none, in a
        sandbox that forbids the call, or where ended children are not waited for."""
        if self._process.poll() is not None:
            return None
        try:
            return os.pidfd_open(self._process.pid)
        except OSError:
            return None

    def _linger(self, selector: selectors.PollSelector) -> None:
        """Read on while children hold the pipes, for a short time."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            selector.unregister(stdin)
            _close_quietly(stdin)
        until = time.monotonic() + LINGER_S
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            self._step(selector, left)
        for key in list(selector.get_map().values()):
            self._chunks[key.fileobj].append(read_rest(key.fd))  # type: ignore[index]

    def _step(self, selector: selectors.PollSelector, timeout: float | None) -> None:
        for key, events in selector.select(timeout):
            pipe = key.fileobj
            if isinstance(pipe, int):
                continue  # the pidfd
            if events & selectors.EVENT_WRITE:
                self._write(selector, key)
                continue
            chunk = os.read(key.fd, _READ_BYTES)
            self._chunks[pipe].append(chunk)  # type: ignore[index]
            if not chunk:
                selector.unregister(pipe)
                pipe.close()  # type: ignore[attr-defined]

    def _write(self, selector: selectors.PollSelector, key: selectors.SelectorKey) -> None:
        try:
            # So much can be written without waiting when poll() says that something can.
            sent = os.write(key.fd, self._input[: select.PIPE_BUF])
        except BrokenPipeError:
            sent = len(self._input)
        self._input = self._input[sent:]
        if not self._input:
            selector.unregister(key.fileobj)
            _close_quietly(key.fileobj)  # type: ignore[arg-type]

    def _close(self) -> None:
        held = [pipe for pipe in self._chunks if not pipe.closed]
        read_away([os.dup(pipe.fileno()) for pipe in held])
        for pipe in held:
            pipe.close()

    def _expired(self, timeout: float) -> subprocess.TimeoutExpired:
        raw = [self._raw(self._process.stdout) or None, self._raw(self._process.stderr) or None]
        return subprocess.TimeoutExpired(self._process.args, timeout, *raw)

    def _raw(self, pipe: IO[Any] | None) -> bytes | None:
        return b"".join(self._chunks[pipe]) if pipe is not None else None

    def _collected(self, pipe: Any) -> Any:
        raw = self._raw(pipe)
        if raw is None:
            return None
        before = self._before.get(pipe)
        if not isinstance(pipe, io.TextIOBase):
            return (before or b"") + raw
        text = raw.decode(pipe.encoding, pipe.errors or "strict")
        return (before or "") + text.replace("\r\n", "\n").replace("\r", "\n")


def _close_quietly(stdin: IO[Any]) -> None:
    try:
        stdin.close()
    except BrokenPipeError:
        pass  # nobody reads what was still buffered
