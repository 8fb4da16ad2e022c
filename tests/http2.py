"""Frames of HTTP/2 made by hand, for what no client of gRPC would send (RFC 9113, RFC 7541)."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, END_HEADERS = 0x1, 0x4
INITIAL_WINDOW_SIZE = 4


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Make a frame."""
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream)
    return head + payload


def settings(**values: int) -> bytes:
    """Make a SETTINGS frame; `window`: how much of each stream the peer may send."""
    numbers = {"window": INITIAL_WINDOW_SIZE}
    return frame(
        SETTINGS, 0, 0, b"".join(struct.pack(">HI", numbers[k], v) for k, v in values.items())
    )


def _literal(name: str, value: str) -> bytes:
    """Make a header field that is not indexed; both texts shorter than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def request_headers(method: str, *more: tuple[str, str]) -> bytes:
    """Make the header block of a gRPC request, e.g. for "Agent/ListReports"."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method if method.startswith("/") else f"/agentcgroup.v1.{method}"),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    )
    return b"".join(_literal(name, value) for name, value in fields)


def request(stream: int, method: str, message: bytes = b"") -> bytes:
    """Make a whole request."""
    body = b"\0" + struct.pack(">I", len(message)) + message
    return frame(HEADERS, END_HEADERS, stream, request_headers(method)) + b"".join(
        frame(DATA, END_STREAM if at + 16_384 >= len(body) else 0, stream, body[at : at + 16_384])
        for at in range(0, len(body), 16_384)
    )


def connect(path: Path | str, first: bytes = b"") -> socket.socket:
    """Connect and send the preface with the client's settings, or with `first` instead."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.sendall(PREFACE + (first or settings()))
    return sock


def pour(sock: socket.socket, data: bytes, seconds: float) -> int:
    """Send `data` again and again, as fast as it is taken, for a time or until the peer hangs up.
    Returns how often it was sent in full."""
    sock.settimeout(0.2)
    end, times = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            left = data
            while left and time.monotonic() < end:
                try:
                    left = left[sock.send(left) :]
                except TimeoutError:
                    continue
            times += not left
        except OSError:
            break
    return times
