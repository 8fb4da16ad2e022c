"""BeginCall and EndCall in one packet each way, over the attach socket.

The messages are those of gRPC, at a fraction of the cost, and every tool call waits for these two.
docs/protocol.md describes the packets (verb `rpc`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from agentcgroup.errors import (
    AgentcgError,
    ConnectionLost,
    DaemonAway,
    Unavailable,
    from_message,
)
from agentcgroup.flow import Rpc
from agentcgroup.v1 import agentcgroup_pb2 as pb

REQUEST_BYTES_MAX = 16_384
_REPLY_BYTES_MAX = 1 << 20
_REPLIES: dict[str, type[Message]] = {"BeginCall": pb.Call, "EndCall": pb.Report}


def packet_for(rpc: Rpc) -> bytes | None:
    """Return the packet for a request; None where it has to go over gRPC.

    Only gRPC knows the other methods, has room for long requests, and can wait for a daemon that
    is away.
    """
    if rpc.method not in _REPLIES or rpc.wait:
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
    """
    try:
        with _socket() as sock:
            _connect(sock, path, timeout)
            sock.settimeout(timeout)
            sock.send(data)
            reply = sock.recv(_REPLY_BYTES_MAX)
            while (more := _asks_to_wait(reply)) is not None:
                sock.settimeout(timeout + more)
                reply = sock.recv(_REPLY_BYTES_MAX)
    except OSError as error:
        raise _away(error) from None
    return _parse(method, reply)


async def ask_async(path: str, method: str, data: bytes, timeout: float) -> Any:
    """Do what `ask` does, on the running event loop."""
    loop = asyncio.get_running_loop()
    try:
        with _socket() as sock:
            sock.setblocking(False)
            for pause in _attempts(timeout):
                try:
                    # asyncio's own would take a full queue for a connection on its way.
                    sock.connect(path)
                    break
                except BlockingIOError:
                    await asyncio.sleep(pause)
            await loop.sock_sendall(sock, data)
            reply = await asyncio.wait_for(loop.sock_recv(sock, _REPLY_BYTES_MAX), timeout)
            while (more := _asks_to_wait(reply)) is not None:
                receive = loop.sock_recv(sock, _REPLY_BYTES_MAX)
                reply = await asyncio.wait_for(receive, timeout + more)
    except (OSError, asyncio.TimeoutError) as error:
        raise _away(error) from None
    return _parse(method, reply)


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


def _attempts(timeout: float) -> Iterator[float]:
    """Yield pauses between attempts to connect, in seconds. Without blocking, connect(2) fails at
    once where the listener's queue is full, as when others flood it.

    Raises:
        TimeoutError: `timeout` seconds have passed.
    """
    end, pause = time.monotonic() + timeout, 0.0005
    while time.monotonic() < end:
        yield pause
        pause = min(2 * pause, 0.002)
    raise TimeoutError("the queue of connections stays full")


def _asks_to_wait(reply: bytes) -> int | None:
    """Return how many seconds the real answer may take; None where this is the answer."""
    word, _, rest = reply.partition(b"\0")
    seconds = rest.rstrip(b"\0").removeprefix(b"seconds=")
    return int(seconds) if word == b"WAIT" and seconds.isdigit() else None


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def _away(error: Exception) -> Unavailable:
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return Unavailable("agentcgroupd did not answer in time", code="DEADLINE_EXCEEDED")
    # No socket, or nobody who listens on it (unix(7)).
    is_away = isinstance(error, (FileNotFoundError, ConnectionRefusedError))
    kind = DaemonAway if is_away else ConnectionLost
    return kind(f"agentcgroupd cannot be reached: {error}")


def _parse(method: str, reply: bytes) -> Any:
    word, _, raw = reply.partition(b"\0")
    try:
        if word == b"OK":
            return _REPLIES[method].FromString(raw)
        if word == b"ERR":
            raise from_message(pb.Error.FromString(raw))
    except DecodeError:
        raise AgentcgError(f"agentcgroupd answered {method} with something else") from None
    raise ConnectionLost("agentcgroupd cannot be reached: it ended the connection")
