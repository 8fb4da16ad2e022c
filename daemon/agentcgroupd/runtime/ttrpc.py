"""ttrpc over NRI's multiplexed connection: frames in and out.

One stream socket carries several connections: each piece has a header of the connection's number
and a length, both of 32 bits, the higher bytes first. In a connection a message has a header of its
own: length, number of the stream, type, flags.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_MUX = struct.Struct(">II")
_MESSAGE = struct.Struct(">IIBB")
REQUEST, RESPONSE = 1, 2
MESSAGE_BYTES_MAX = 4 << 20
"""The longest message that ttrpc lets through."""
PIECE_BYTES_MAX = MESSAGE_BYTES_MAX + _MESSAGE.size
CONNECTIONS_MAX = 16


class BrokenFrame(Exception):
    """The other side does not keep to the form of frames."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A message."""

    connection: int
    stream: int
    kind: int
    """REQUEST or RESPONSE; others are possible and skipped."""
    payload: bytes


class Mux:
    """Frames on a connected stream socket. One thread reads; any may write."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._parts: dict[int, bytearray] = {}
        self._writing = threading.Lock()

    def send(self, frame: Frame) -> None:
        """Send a message whole. Raises OSError."""
        header = _MESSAGE.pack(len(frame.payload), frame.stream, frame.kind, 0)
        length = len(header) + len(frame.payload)
        with self._writing:
            self._sock.sendall(_MUX.pack(frame.connection, length) + header + frame.payload)

    def frames(self) -> Iterator[Frame]:
        """Messages as they come, until the other side hangs up. Raises OSError or BrokenFrame."""
        while header := self._exactly(_MUX.size):
            connection, length = _MUX.unpack(header)
            if length > PIECE_BYTES_MAX:
                raise BrokenFrame(f"a piece of {length} bytes")
            part = self._parts.setdefault(connection, bytearray())
            if len(self._parts) > CONNECTIONS_MAX:
                raise BrokenFrame(f"more than {CONNECTIONS_MAX} connections in one")
            part += self._exactly(length)
            yield from _whole(connection, part)

    def _exactly(self, length: int) -> bytes:
        """Read so many bytes; none: the other side has hung up before the first. Raises OSError or
        BrokenFrame."""
        data = bytearray()
        while len(data) < length:
            more = self._sock.recv(min(length - len(data), 65_536))
            if not more:
                if data or length != _MUX.size:
                    raise BrokenFrame("it ends in the middle")
                return b""
            data += more
        return bytes(data)


def _whole(connection: int, part: bytearray) -> Iterator[Frame]:
    """Take the messages off that have come whole. Raises BrokenFrame."""
    while len(part) >= _MESSAGE.size:
        length, stream, kind, _ = _MESSAGE.unpack_from(part)
        if length > MESSAGE_BYTES_MAX:
            raise BrokenFrame(f"a message of {length} bytes")
        end = _MESSAGE.size + length
        if len(part) < end:
            return
        payload = bytes(part[_MESSAGE.size : end])
        del part[:end]
        yield Frame(connection, stream, kind, payload)
