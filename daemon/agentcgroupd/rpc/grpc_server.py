"""The gRPC server, on a socket that only the relay reaches."""

from __future__ import annotations

import os
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agentcgroupd.host.listening import remove_stale
from agentcgroupd.rpc.frames import FRAME_BYTES_MAX
from agentcgroupd.rpc.gate import Gate

MESSAGE_BYTES_MAX = 65_536
"""The largest request."""
METADATA_BYTES_MAX = 8192
STREAMS_OF_CONNECTION = 256
GRACE_S = 0.5


class GrpcServer:
    """A gRPC server with health and reflection, on a socket that only this process can reach.

    The relay tells it whom a connection is of by the name that it gives to its own end. Others
    could give theirs the same name, in another network namespace, so nobody else may connect: the
    socket has no path any more once it is there.
    """

    def __init__(self, path: Path, service_name: str, gate: Gate) -> None:
        self._path = path
        self._name = service_name
        self._fd: int | None = None
        self.server = grpc.aio.server(
            interceptors=[gate],
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_metadata_size", METADATA_BYTES_MAX),
                ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
                ("grpc.max_concurrent_streams", STREAMS_OF_CONNECTION),
                ("grpc.http2.max_frame_size", FRAME_BYTES_MAX),
                # Windows stay as small as they begin: what is sent faster than it is read waits
                # with the sender.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", MESSAGE_BYTES_MAX),
                ("grpc.http2.max_ping_strikes", 2),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (service_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    async def start(self) -> None:
        """Serve. Raises ConfigError where something else than a socket is in the way, RuntimeError
        if the socket cannot be bound."""
        remove_stale(self._path)
        self.server.add_insecure_port(f"unix:{self._path}")
        self._fd = os.open(self._path, os.O_PATH | os.O_CLOEXEC)
        self._path.unlink()
        await self.server.start()
        for name in ("", self._name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def address(self) -> str:
        """Where this process can connect to it, once it serves."""
        assert self._fd is not None
        return f"/proc/self/fd/{self._fd}"

    async def stop(self) -> None:
        """Stop serving; requests under way get GRACE_S to end."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(GRACE_S)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
