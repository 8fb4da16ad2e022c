"""Requests in one packet each way, over an attach socket.

The messages are those of gRPC, at a fraction of the cost: every tool call waits for its beginning
and its end, and for a command that asks one question the import of gRPC alone takes longer than
everything else. docs/protocol.md describes the packets (verb `rpc`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.message import DecodeError, Message

from agentcgroup.errors import (
    AgentcgError,
    ConnectionLost,
    DaemonAway,
    Sealed,
    Unavailable,
    from_message,
)
from agentcgroup.flow import Rpc
from agentcgroup.v1 import agentcgroup_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self

REQUEST_BYTES_MAX = 16_384
REPLY_BYTES_MAX = 1 << 20
EXPECTED_S = 0.01
"""How long the report of a command that ended well is waited for before it is asked for. The daemon
is told of the end by the kernel, as the parent of the command is."""


class TooLong(Exception):
    """The daemon has an answer that no packet holds: it has to be asked over gRPC."""


@cache
def _reply_of(method: str) -> type[Message] | None:
    """Return the class of the message that answers a method; None for one that goes over gRPC only,
    because it is answered by a stream."""
    for service in pb.DESCRIPTOR.services_by_name.values():
        found = service.methods_by_name.get(method)
        if found is not None and not found.server_streaming:
            return cast("type[Message]", getattr(pb, found.output_type.name))
    return None


def packet_for(rpc: Rpc) -> bytes | None:
    """Return the packet for a request; None where it has to go over gRPC.

    Only gRPC has room for long requests, and can wait for a daemon that is away.
    """
    if rpc.wait or _reply_of(rpc.method) is None:
        return None
    data = b"ACG1\0rpc\0" + rpc.method.encode() + b"\0" + rpc.request.SerializeToString()
    return data if len(data) <= REQUEST_BYTES_MAX else None


def ask(path: str, method: str, data: bytes, timeout: float) -> Any:
    """Send a packet to the socket at `path` and return the message that answers it.

    Args:
        path: the attach socket.
        method: the request's name in the protocol.
        data: the packet.
        timeout: seconds for each answer; an answer that asks to wait adds its own.

    Raises:
        AgentcgError: the daemon's error, or Unavailable.
        TooLong: the answer is too long for a packet.
    """
    with Line(path) as line:
        line.send(data, timeout)
        return line.answer(method, timeout)


class Line:
    """A connection to the socket at `path`, for a request and what is answered to it."""

    def __init__(self, path: str) -> None:
        try:
            self.socket = new_socket()
        except OSError as error:
            raise away(error, path) from None
        self.path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def send(self, data: bytes, timeout: float) -> None:
        """Connect and send the first request. Raises Unavailable."""
        try:
            _connect(self.socket, self.path, timeout)
            self.socket.settimeout(timeout)
            self.socket.send(data)
        except OSError as error:
            raise away(error, self.path) from None

    def answer(self, method: str, timeout: float) -> Any:
        """Receive the answer to a request. Raises what `ask` does."""
        sock = self.socket
        try:
            sock.settimeout(timeout)
            reply = sock.recv(REPLY_BYTES_MAX)
            while (more := asks_to_wait(reply)) is not None:
                sock.settimeout(timeout + more)
                reply = sock.recv(REPLY_BYTES_MAX)
        except OSError as error:
            raise away(error, self.path) from None
        return parse(method, reply, self.path)

    def end(self, data: bytes, timeout: float, is_expected: bool = False) -> Any:
        """End the call that was begun on this connection by the packet `data`, unless its report is
        there already, or where it `is_expected` comes in a moment. Raises what `ask` does."""
        reply = self.report_or_ask(data, EXPECTED_S if is_expected else 0.0)
        if reply is not None:
            return parse("EndCall", reply, self.path)
        try:
            return self.answer("EndCall", timeout)
        except ConnectionLost:
            # The daemon closed it with the request unread, which comes before the report that it
            # has sent: unix(7), ECONNRESET.
            return self.answer("EndCall", timeout)

    def report_or_ask(self, data: bytes, wait_s: float = 0.0) -> bytes | None:
        """Take the report if it is there within `wait_s`; else send the packet `data`, and give
        None."""
        try:
            self.socket.settimeout(wait_s)
            return self.socket.recv(REPLY_BYTES_MAX)
        except (BlockingIOError, TimeoutError):
            pass
        except OSError as error:
            raise away(error, self.path) from None
        try:
            self.socket.send(data)
        except OSError:
            pass  # it was closed a moment ago, and the report lies there
        return None


def _connect(sock: socket.socket, path: str, timeout: float) -> None:
    """Connect within `timeout` seconds, waiting in the kernel where the listener's queue is full.

    Raises:
        OSError: among them TimeoutError.
    """
    # Python's own timeout makes the socket non-blocking, and connect(2) then fails at once.
    seconds = int(timeout)
    limit = struct.pack("@ll", seconds, int((timeout - seconds) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    try:
        sock.connect(path)
    except BlockingIOError:
        raise TimeoutError("the queue of connections stays full") from None


def asks_to_wait(reply: bytes) -> int | None:
    """Return how many seconds the real answer may take; None where this is the answer."""
    word, _, rest = reply.partition(b"\0")
    seconds = rest.rstrip(b"\0").removeprefix(b"seconds=")
    return int(seconds) if word == b"WAIT" and seconds.isdigit() else None


def new_socket() -> socket.socket:
    """Make a socket for one request."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def away(error: OSError, path: str) -> Unavailable:
    """Return the typed error for a socket at `path` that could not be used."""
    if isinstance(error, TimeoutError):
        return Unavailable("agentcgroupd did not answer in time", code="DEADLINE_EXCEEDED")
    if _is_sealed(error, path):
        return Sealed(f"a sandbox keeps this process from {path}: {os.strerror(error.errno or 0)}")
    # No socket, or nobody who listens on it (unix(7)).
    is_away = isinstance(error, (FileNotFoundError, ConnectionRefusedError))
    kind = DaemonAway if is_away else ConnectionLost
    why = os.strerror(error.errno) if error.errno else str(error)
    return kind(f"agentcgroupd cannot be reached at {path}: {why}")


def _is_sealed(error: OSError, path: str) -> bool:
    """Tell whether a sandbox refuses sockets, rather than the socket's own mode."""
    if error.errno == errno.EACCES:
        return os.access(path, os.W_OK)
    return error.errno in (errno.EPERM, errno.EAFNOSUPPORT)


def parse(method: str, reply: bytes, path: str) -> Any:
    """Return the message in a reply of the daemon at `path`. Raises what `ask` does."""
    word, _, raw = reply.partition(b"\0")
    kind = _reply_of(method)
    assert kind is not None, f"{method} is not asked for in a packet"
    try:
        if word == b"OK":
            return kind.FromString(raw)
        if word == b"ERR":
            raise from_message(pb.Error.FromString(raw))
    except DecodeError:
        raise AgentcgError(f"agentcgroupd answered {method} with something else") from None
    if word == b"LONG":
        raise TooLong(method)
    raise ConnectionLost(f"agentcgroupd cannot be reached at {path}: it ended the connection")
