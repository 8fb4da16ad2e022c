"""Requests of the daemon to itself, through the sockets that everybody uses.

That the event loop turns does not say that anybody is served. So the daemon connects to its own
sockets now and then, as any client would, and asks what every client may ask. systemd's watchdog is
fed by the answers on the operator's sockets, which no agent can fill: a flood of agents must not be
able to have the daemon restarted. The agents' sockets decide whether the daemon is called ready.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2

from agentcgroupd.rpc.packets import MAGIC, packet
from agentcgroupd.rpc.verbs import PING

log = logging.getLogger(__name__)

EVERY_S = 5.0
LATE_S = 10.0
"""An answer that takes longer is none."""
_PONG = packet(["OK"])


class Unanswered(Exception):
    """A request of the daemon to itself had no good answer."""


class Canary:
    """Asks the daemon again and again, and tells who wants to know about each answer."""

    def __init__(
        self,
        run_dir: Path,
        answered: Callable[[str], None],
        unanswered: Callable[[str, str], None],
        every_s: float = EVERY_S,
    ) -> None:
        """`answered` gets the role whose sockets have both answered, `unanswered` the role and
        why. `every_s`: the pause between two rounds."""
        self._run_dir = run_dir
        self._answered, self._unanswered = answered, unanswered
        self._every_s = every_s
        self._silent: set[str] = set()

    async def forever(self) -> None:
        """Ask until cancelled."""
        while True:
            await asyncio.gather(self._ask("admin"), self._ask("agent"))
            await asyncio.sleep(self._every_s)

    async def _ask(self, role: str) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(LATE_S):
                await self._ask_grpc(self._run_dir / role / "grpc.sock")
                await self._ask_attach(self._run_dir / role / "attach.sock")
        except (OSError, grpc.RpcError, Unanswered) as error:
            why = "no answer in time" if isinstance(error, TimeoutError) else _words(error)
            if role not in self._silent:
                log.error("the daemon's own request through %s/ failed: %s", role, why)
            self._silent.add(role)
            self._unanswered(role, why)
            return
        if role in self._silent:
            self._silent.discard(role)
            log.warning("requests through %s/ are answered again", role)
        log.debug("canary through %s/: %.1f ms", role, (time.monotonic() - started) * 1e3)
        self._answered(role)

    @staticmethod
    async def _ask_grpc(path: Path) -> None:
        # A pool of its own, or a connection of an earlier round would be used again.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"unix:{path}", options) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = await check(health_pb2.HealthCheckRequest(), timeout=LATE_S)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise Unanswered(f"{path} says that it does not serve")

    @staticmethod
    async def _ask_attach(path: Path) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, str(path))
            await loop.sock_sendall(sock, packet([MAGIC, PING]))
            if await loop.sock_recv(sock, 4096) != _PONG:
                raise Unanswered(f"{path} gives another answer")


def _words(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {(error.details() or '')[:200]}"
    return str(error)
