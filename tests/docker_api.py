"""A Docker API server on a Unix socket, with as much of the API as a follower of containers asks
for: real HTTP, chunked events, and the replay of past events by `since`."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

NS = 1_000_000_000


class DockerApi:
    """The server, and what is told about the containers that it has."""

    def __init__(self, path: Path) -> None:
        """Listen on `path`; a socket of an earlier server is replaced."""
        self.path = path
        self.containers: dict[str, dict[str, Any]] = {}
        self.images: dict[str, dict[str, str]] = {}
        """Labels of images, by their name."""
        self.events: list[dict[str, Any]] = []
        self.asked: list[str] = []
        """Paths of the requests so far, with their queries."""
        self.hold = threading.Event()
        """Answers wait until it is set."""
        self.hold.set()
        self.changed = threading.Condition()
        self.open: set[socket.socket] = set()
        self.stopping = False
        path.unlink(missing_ok=True)
        self._server = _Server(str(path), _Handler)
        self._server.api = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End, as a daemon that is killed does: connections break, the socket goes."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.path.unlink(missing_ok=True)
        for sock in list(self.open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(
        self, container_id: str, name: str, pid: int, labels: Mapping[str, str], image: str = "box"
    ) -> None:
        """Have a container that runs, without an event."""
        self.containers[container_id] = {
            "Id": container_id,
            "Name": f"/{name}",
            "Image": image,
            "State": {"Running": True, "Pid": pid},
            "Config": {"Image": image, "Labels": dict(labels)},
        }

    def tell(self, action: str, container_id: str) -> None:
        """Tell of an event."""
        found = self.containers[container_id]
        about = {
            **found["Config"]["Labels"],
            "name": found["Name"].lstrip("/"),
            "image": found["Config"]["Image"],
        }
        event = {
            "Type": "container",
            "Action": action,
            "Actor": {"ID": container_id, "Attributes": about},
            "time": int(time.time()),
            "timeNano": time.time_ns(),
        }
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def start(self, container_id: str, name: str, pid: int, labels: Mapping[str, str]) -> None:
        """Start a container, and tell so."""
        self.add(container_id, name, pid, labels)
        self.tell("start", container_id)

    def end(self, container_id: str) -> None:
        """Have a container run no more."""
        self.containers[container_id]["State"] = {"Running": False, "Pid": 0}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    api: DockerApi

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may leave at any moment."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def api(self) -> DockerApi:
        server = self.server
        assert isinstance(server, _Server)
        return server.api

    def setup(self) -> None:
        super().setup()
        self.api.open.add(self.connection)

    def finish(self) -> None:
        self.api.open.discard(self.connection)
        super().finish()

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.api.asked.append(self.path)
        self.close_connection = self.api.stopping
        path = re.sub(r"^/v[\d.]+", "", url.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.api.hold.wait()
        if path == "/version":
            self._answer(200, {"Version": "99.1", "ApiVersion": "1.45"})
        elif path == "/containers/json":
            self._answer(200, [_listed(c) for c in self._running()])
        elif found := re.fullmatch(r"/containers/(\w+)/json", path):
            container = self.api.containers.get(found[1])
            missing = {"message": f"No such container: {found[1]}"}
            self._answer(200 if container else 404, container or missing)
        elif found := re.fullmatch(r"/images/([\w/]+)/json", path):
            self._answer(200, {"Config": {"Labels": self.api.images.get(found[1])}})
        elif path == "/events":
            self._events(int(float(query["since"]) * NS), json.loads(query["filters"]))
        else:
            self._answer(404, {"message": "page not found"})

    def _running(self) -> list[dict[str, Any]]:
        return [c for c in list(self.api.containers.values()) if c["State"]["Running"]]

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _events(self, since: int, filters: Mapping[str, list[str]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        told = 0
        while True:
            with self.api.changed:
                while told == len(self.api.events) and not self.api.stopping:
                    self.api.changed.wait()
                if self.api.stopping:
                    self.close_connection = True
                    return
                event = self.api.events[told]
                told += 1
            if event["timeNano"] < since or event["Action"] not in filters["event"]:
                continue
            data = json.dumps(event).encode() + b"\n"
            try:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            except OSError:
                return


def _listed(container: Mapping[str, Any]) -> dict[str, Any]:
    """A container in the form of the list, which has no pid."""
    return {
        "Id": container["Id"],
        "Names": [container["Name"]],
        "Image": container["Config"]["Image"],
        "Labels": container["Config"]["Labels"],
        "State": "running",
    }
