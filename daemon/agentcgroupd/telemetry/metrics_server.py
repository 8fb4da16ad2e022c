"""/metrics, /healthz (it lives) and /readyz (agents are served) on a loopback port, in one thread
of their own, so that a stuck daemon can still be seen to be stuck.

Anybody on the host may connect: connections, their time and their size are bounded, and what is
answered is made at most once in REFRESH_S, whoever asks how often.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from agentcgroupd.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 32
"""At a time; of more, the oldest is closed."""
DEADLINE_S = 5.0
"""From the connection to the end of the answer."""
REQUEST_BYTES_MAX = 8192
REFRESH_S = 0.5
ACCEPTS_PER_S = 200
_TEXT = "text/plain; charset=utf-8"


@dataclass(slots=True, eq=False)
class _Client:
    socket: socket.socket
    deadline: float
    request: bytes = b""
    answer: bytes = b""


class MetricsServer:
    """Serves until `close`."""

    def __init__(
        self,
        address: str,
        metrics: Metrics,
        health: Callable[[], str],
        readiness: Callable[[], str],
    ) -> None:
        """`health` and `readiness` return nothing when all is well, else what is wrong. OSError if
        the port is taken."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        self._metrics = metrics
        self._checks = {b"/healthz": health, b"/readyz": readiness}
        self._listener = socket.create_server(
            (host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._clients: dict[socket.socket, _Client] = {}
        self._made: tuple[float, bytes] = (float("-inf"), b"")
        self._next_accept = 0.0
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._waker.send(b"x")
        self._thread.join()
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.close()
        for sock in (self._listener, self._waker, self._woken):
            sock.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(1.0):
                if key.fileobj is self._woken:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif (client := self._clients.get(key.data)) is not None:
                    self._go_on(client)
            now = time.monotonic()
            for client in list(self._clients.values()):
                if now > client.deadline:
                    self._drop(client)

    def _accept(self) -> None:
        # A thread that never pauses would keep the event loop from its turns.
        time.sleep(max(0.0, self._next_accept - time.monotonic()))
        self._next_accept = time.monotonic() + 1 / ACCEPTS_PER_S
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.debug("metrics: accept: %s", error)
            return
        if len(self._clients) >= CONNECTIONS_MAX:
            self._drop(next(iter(self._clients.values())))
        sock.setblocking(False)
        self._clients[sock] = _Client(sock, time.monotonic() + DEADLINE_S)
        self._selector.register(sock, selectors.EVENT_READ, sock)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.socket]
        self._selector.unregister(client.socket)
        client.socket.close()

    def _go_on(self, client: _Client) -> None:
        """Read what there is, or write what fits."""
        try:
            if client.answer:
                client.answer = client.answer[client.socket.send(client.answer) :]
                if not client.answer:
                    self._hang_up(client)
                return
            data = client.socket.recv(REQUEST_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.request += data
        if not data or len(client.request) > REQUEST_BYTES_MAX:
            self._drop(client)
        elif b"\r\n\r\n" in client.request or b"\n\n" in client.request:
            client.answer = self._answer(client.request.split(b"\n", 1)[0])
            self._selector.modify(client.socket, selectors.EVENT_WRITE, client.socket)

    def _hang_up(self, client: _Client) -> None:
        with contextlib.suppress(OSError):
            client.socket.shutdown(socket.SHUT_WR)
        self._drop(client)

    def _answer(self, line: bytes) -> bytes:
        """The answer to a request by its first line."""
        words = line.split()
        method = words[0] if words else b""
        path = words[1].split(b"?", 1)[0] if len(words) > 1 else b""
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"GET alone\n", _TEXT)
        if (check := self._checks.get(path)) is not None:
            wrong = check()
            status = "503 Service Unavailable" if wrong else "200 OK"
            response = _response(status, f"{wrong or 'ok'}\n".encode(), _TEXT)
        elif path == b"/metrics":
            response = _response("200 OK", self._scrape(), CONTENT_TYPE_LATEST)
        else:
            response = _response("404 Not Found", b"see /metrics, /healthz and /readyz\n", _TEXT)
        return response if method == b"GET" else response.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n"

    def _scrape(self) -> bytes:
        made_at, body = self._made
        if time.monotonic() - made_at > REFRESH_S:
            body = generate_latest(self._metrics.registry)
            self._made = (time.monotonic(), body)
        return body


def _response(status: str, body: bytes, kind: str) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body
