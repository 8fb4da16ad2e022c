"""The runtime's side of the Node Resource Interface, for tests: a real socket, real frames, and the
two seconds after which containerd drops a plugin."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from types import TracebackType

from agentcgroup.v1 import nri_pb2 as nri

PLUGIN, RUNTIME = 1, 2
REQUEST, RESPONSE = 1, 2
REQUEST_S = 2.0


class NriRuntime:
    """Listens for one plugin at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(20)
        self._plugin: socket.socket | None = None
        self._stream = 1
        self.mask = 0
        self.took_s: list[float] = []
        """How long each answer has taken."""

    def __enter__(self) -> NriRuntime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.hang_up()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def hang_up(self) -> None:
        """End the plugin's connection."""
        if self._plugin is not None:
            self._plugin.close()
            self._plugin = None

    def accept(
        self, pods: list[nri.Pod] | None = None, containers: list[nri.NriContainer] | None = None
    ) -> nri.RegisterPlugin:
        """Let a plugin register, configure it before it has its answer, and tell it what runs."""
        self._plugin, _ = self._listener.accept()
        self._plugin.settimeout(REQUEST_S)
        connection, stream, kind, data = self._read()
        assert (connection, kind) == (RUNTIME, REQUEST)
        request = nri.TtrpcRequest.FromString(data)
        assert request.service == "nri.pkg.api.v1alpha1.Runtime"
        assert request.method == "RegisterPlugin"
        configure = nri.Configure(runtime_name="containerd", runtime_version="v2.1.9")
        answer = self.ask("Configure", configure)
        self.mask = nri.Configured.FromString(answer).events
        self._send(RUNTIME, stream, RESPONSE, nri.TtrpcResponse().SerializeToString())
        half = len(containers or []) // 2
        first = nri.Synchronize(pods=pods, containers=(containers or [])[:half], more=True)
        assert nri.Synchronized.FromString(self.ask("Synchronize", first)).more
        rest = nri.Synchronize(containers=(containers or [])[half:])
        self.ask("Synchronize", rest)
        return nri.RegisterPlugin.FromString(request.payload)

    def ask(
        self,
        method: str,
        message: nri.Configure | nri.Synchronize | nri.OfContainer | nri.StateChange | bytes,
    ) -> bytes:
        """Ask the plugin; returns the payload of its answer. Raises TimeoutError after REQUEST_S,
        RefusedByPlugin for an answer that is an error."""
        payload = message if isinstance(message, bytes) else message.SerializeToString()
        request = nri.TtrpcRequest(
            service="nri.pkg.api.v1alpha1.Plugin", method=method, payload=payload
        )
        self._stream += 2
        began = time.monotonic()
        self._send(PLUGIN, self._stream, REQUEST, request.SerializeToString())
        connection, stream, kind, data = self._read()
        self.took_s.append(time.monotonic() - began)
        assert (connection, stream, kind) == (PLUGIN, self._stream, RESPONSE)
        answer = nri.TtrpcResponse.FromString(data)
        if answer.status.code:
            raise RefusedByPlugin(answer.status.code, answer.status.message)
        return answer.payload

    def start(self, pod: nri.Pod, container: nri.NriContainer) -> nri.Created:
        """Make and start a container as containerd 2.1 does: the last is a StateChange."""
        about = nri.OfContainer(pod=pod, container=container)
        created = nri.Created.FromString(self.ask("CreateContainer", about))
        self.ask("StateChange", nri.StateChange(event=6, pod=pod, container=container))
        return created

    def _send(self, connection: int, stream: int, kind: int, data: bytes) -> None:
        assert self._plugin is not None
        message = struct.pack(">IIBB", len(data), stream, kind, 0) + data
        # In two pieces, as a multiplexer may cut it.
        for piece in (message[:7], message[7:]):
            self._plugin.sendall(struct.pack(">II", connection, len(piece)) + piece)

    def _read(self) -> tuple[int, int, int, bytes]:
        connection, length = struct.unpack(">II", self._exactly(8))
        data = self._exactly(length)
        size, stream, kind, _ = struct.unpack(">IIBB", data[:10])
        assert size == len(data) - 10
        return connection, stream, kind, data[10:]

    def _exactly(self, length: int) -> bytes:
        assert self._plugin is not None
        data = b""
        while len(data) < length:
            more = self._plugin.recv(length - len(data))
            if not more:
                raise EOFError("the plugin has hung up")
            data += more
        return data


class RefusedByPlugin(Exception):
    """The plugin answers with an error: code and message."""
