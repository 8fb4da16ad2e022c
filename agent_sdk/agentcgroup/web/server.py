"""HTTP for one page, by the standard library: GET only, of a few fixed paths, on loopback.

The page itself holds nothing secret; what it asks for needs the token of this run, as a header that
no form and no other site can send. Whoever gets a name of theirs resolved to loopback (DNS
rebinding) is refused by the Host header. Connections are few and short, whatever their clients do.
"""

from __future__ import annotations

import hmac
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl

from agentcgroup.cli.output import complain
from agentcgroup.errors import AgentcgError, CallNotFound

from .watch import Watch, encode

CONNECTIONS_MOST = 32
CONNECTION_S = 10.0
"""How long a connection may take altogether."""
TARGET_MOST = 512
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_JSON = "application/json"
_CALL_ID = re.compile(r"[0-9A-Za-z_-]{1,64}", re.ASCII)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(:[0-9]{1,5})?", re.ASCII)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Refused(Exception):
    """A request that is not answered with what it asked for. Carries the status and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    body: bytes
    kind: str = _JSON
    status: HTTPStatus = HTTPStatus.OK


@dataclass(frozen=True)
class Site:
    """What is served, and to whom: `hosts` are the names that a request may be addressed to."""

    watch: Watch
    token: str
    hosts: frozenset[str]

    def answer(self, target: str, hosts: list[str], authorizations: list[str]) -> Answer:
        """Answer a GET. `hosts`, `authorizations`: all headers of these names. Raises Refused."""
        self._check_host(hosts)
        if len(target) > TARGET_MOST:
            raise Refused(HTTPStatus.REQUEST_URI_TOO_LONG, "The address is too long.")
        path, _, query = target.partition("?")
        if path in _ASSETS:
            name, kind = _ASSETS[path]
            return Answer(resources.files(__package__).joinpath("assets", name).read_bytes(), kind)
        asked: dict[str, Callable[[dict[str, str]], bytes]] = {
            "/api/now": lambda _: self.watch.now_json(),
            "/api/timeline": self._timeline,
            "/api/story": self._story,
        }
        self._check_token(authorizations)
        if path not in asked:
            raise Refused(HTTPStatus.NOT_FOUND, "There is nothing of that name.")
        return Answer(asked[path](_fields(query)))

    def _check_host(self, hosts: list[str]) -> None:
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None or found[1].lower() not in self.hosts:
            allowed = ", ".join(sorted(self.hosts))
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"The request is for another host; allowed: {allowed} (--allow-host adds one).",
            )

    def _check_token(self, authorizations: list[str]) -> None:
        given = authorizations[0] if len(authorizations) == 1 else ""
        if not hmac.compare_digest(
            given.encode("utf-8", "replace"), f"Bearer {self.token}".encode()
        ):
            raise Refused(
                HTTPStatus.UNAUTHORIZED,
                "The token is missing or not of this run: open the address that agentcg web "
                "printed.",
            )

    def _timeline(self, fields: dict[str, str]) -> bytes:
        text = fields.get("minutes", str(self.watch.minutes))
        if not re.fullmatch(r"[1-9][0-9]{0,3}", text, re.ASCII):
            raise Refused(HTTPStatus.BAD_REQUEST, f"minutes: allowed is 1 to {self.watch.minutes}.")
        return self.watch.timeline_json(min(int(text), self.watch.minutes))

    def _story(self, fields: dict[str, str]) -> bytes:
        call_id = fields.get("call", "")
        if not _CALL_ID.fullmatch(call_id):
            raise Refused(HTTPStatus.BAD_REQUEST, "call: allowed is the id of a call.")
        try:
            return self.watch.story_json(call_id)
        except CallNotFound:
            raise Refused(HTTPStatus.NOT_FOUND, "Nothing is known of this call.") from None
        except AgentcgError as error:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, error.sentence) from None


def _fields(query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, max_num_fields=8))
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "The address has too many fields.") from None


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "agentcg", ""
    timeout = CONNECTION_S

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        headers = self.headers
        try:
            answer = self.server.site.answer(
                self.path, headers.get_all("Host", []), headers.get_all("Authorization", [])
            )
        except Refused as refused:
            answer = _refusal(refused.status, refused.sentence)
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        self.close_connection = True
        self.send_response(answer.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        if answer.status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the standard library refuses in the same form, repeating nothing."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self._send(_refusal(status, f"{status.phrase}."))

    def log_message(self, format: str, *args: Any) -> None:
        """Leave requests unlogged: anybody on this machine can make them."""


def _refusal(status: HTTPStatus, sentence: str) -> Answer:
    return Answer(encode({"error": sentence}), status=status)


class Server(socketserver.ThreadingMixIn, HTTPServer):
    """Listens, with a thread for each of few connections.

    Raises:
        OSError: the address cannot be used.
    """

    daemon_threads, block_on_close = True, False
    request_queue_size = CONNECTIONS_MOST

    def __init__(self, address: tuple[str, int], site: Site) -> None:
        self.site = site
        self._until: dict[int, tuple[float, socket.socket]] = {}
        self._lock = threading.Lock()
        if ip_address(address[0]).version == 6:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without asking for this machine's name, as the standard library would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread, where there are not too many."""
        with self._lock:
            is_full = len(self._until) >= CONNECTIONS_MOST
            if not is_full:
                self._until[id(request)] = (time.monotonic() + CONNECTION_S, request)
        if is_full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, and make room for another."""
        with self._lock:
            self._until.pop(id(request), None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Break off connections that take too long, at whatever pace they send."""
        at = time.monotonic()
        with self._lock:
            late = [request for until, request in self._until.values() if until < at]
        for request in late:
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # It has been closed meanwhile.

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless the reader just went away."""
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, TimeoutError)):
            complain(f"agentcg web: a request failed: {error!r}")
