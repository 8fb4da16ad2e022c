"""The streams of an execution in a pod: a WebSocket (RFC 6455) with the channels of Kubernetes."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from urllib.parse import urlsplit

from tests.harness import PATIENCE

PROTOCOL = "v4.channel.k8s.io"
STDOUT, STDERR, ERROR = 1, 2, 3
"""Channels: the first byte of each message. What goes wrong comes in the last, as JSON."""
TEXT, BINARY, CLOSE = 1, 2, 8


def follow(url: str) -> tuple[int | None, str]:
    """Read what an execution says until it ends. Returns its exit status, None where it was not
    told, and the text."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    said, status = bytearray(), bytearray()
    with socket.create_connection((host, port), timeout=60 * PATIENCE) as sock:
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {path} HTTP/1.1",
            f"Host: {host}:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Protocol: {PROTOCOL}",
        )
        sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        with sock.makefile("rb") as stream:
            first = stream.readline()
            assert b" 101 " in first, first
            while stream.readline().strip():
                pass
            while True:
                head = stream.read(2)
                if len(head) < 2:
                    break
                kind, length = head[0] & 15, head[1] & 127
                if length == 126:
                    (length,) = struct.unpack(">H", stream.read(2))
                elif length == 127:
                    (length,) = struct.unpack(">Q", stream.read(8))
                data = stream.read(length)
                if kind == CLOSE:
                    break
                if kind in (TEXT, BINARY) and data:
                    (status if data[0] == ERROR else said).extend(data[1:])
    return _exit_status(bytes(status)), said.decode(errors="replace")


def _exit_status(text: bytes) -> int | None:
    if not text:
        return None
    about = json.loads(text)
    if about.get("status") == "Success":
        return 0
    for cause in (about.get("details") or {}).get("causes") or ():
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    return None
