"""Finding out who is calling, by the kernel's word.

gRPC shows a handler no peer credentials of a Unix socket. So a relay accepts the connections, asks
the kernel who is there, and passes the bytes on to the gRPC server from a socket that it binds to
an abstract name of its own making; grpc shows that name as the peer, and the relay knows whose it
is. The server's own socket lies in a directory that only root can enter, and a peer whose name the
relay did not make is refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

from agentcgroupd.errors import PermissionDenied
from agentcgroupd.host.listening import BACKLOG, Listener
from agentcgroupd.host.proc import CgroupUnknown, cgroup_of
from agentcgroupd.host.syscalls import peer_credentials, peer_pidfd, pidfd_alive
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

ENDED = "the process that opened the connection has ended"
NOT_IN_SESSION = (
    "this process is in no session: it is not in a cgroup that agentcgroup manages. "
    "Open one with `agentcg session run NAME -- COMMAND`, or adopt the container's cgroup with "
    "`agentcg session adopt`"
)


class Peer:
    """The process that opened a connection."""

    __slots__ = ("gid", "process", "uid")

    def __init__(self, sock: socket.socket) -> None:
        """The peer of a connected Unix socket. Raises PermissionDenied if the process is gone or
        cannot be seen from the daemon's pid namespace."""
        credentials = peer_credentials(sock)
        self.uid, self.gid = credentials.uid, credentials.gid
        if credentials.pid == 0:
            raise PermissionDenied(
                "the calling process cannot be seen from the daemon's pid namespace; "
                "agentcgroupd has to run in the host's"
            )
        try:
            pidfd = peer_pidfd(sock)
        except OSError:
            raise PermissionDenied(ENDED) from None
        try:
            self.process = Process.of_pidfd(credentials.pid, pidfd)
        except BaseException as error:
            os.close(pidfd)
            if isinstance(error, OSError):
                raise PermissionDenied(ENDED) from None
            raise

    def cgroup_path(self) -> str:
        """The cgroup the process is in now, below the cgroup2 mount. Raises PermissionDenied."""
        try:
            path = cgroup_of(self.process.pid)
        except (FileNotFoundError, ProcessLookupError):
            raise PermissionDenied(ENDED) from None
        except CgroupUnknown as error:
            raise PermissionDenied(f"the calling process is in no usable cgroup: {error}") from None
        # Alive after the read: it was this process that was read, not a later one of its pid.
        if not pidfd_alive(self.process.pidfd):
            raise PermissionDenied(ENDED)
        if not path.startswith("/") or path.endswith(" (deleted)"):
            raise PermissionDenied(f"the calling process is in no usable cgroup ({path!r})")
        return path

    def close(self) -> None:
        """Give up the pidfd."""
        self.process.close()


SessionFinder = Callable[[str], Session | None]


def session_of(peer: Peer, find: SessionFinder) -> Session:
    """The session a peer belongs to. Raises PermissionDenied if it is in none."""
    session = find(peer.cgroup_path())
    if session is None:
        raise PermissionDenied(NOT_IN_SESSION, "session", "", "a process of an open session")
    return session


def check_operator(peer: Peer, find: SessionFinder) -> None:
    """Only root outside every session is the operator: root inside a container is still an
    agent."""
    if peer.uid != 0:
        raise PermissionDenied(f"only root may do this (the caller has uid {peer.uid})")
    session = find(peer.cgroup_path())
    if session is not None:
        raise PermissionDenied(f"a process of session {session.id} may not act as the operator")


class _End(asyncio.Protocol):
    """An end of a relayed connection; its bytes go to `other`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self._early.append(data)
        else:
            self.other.transport.write(data)

    def join(self, other: _End) -> None:
        """Both ends are there: pass on what came early."""
        self.other, other.other = other, self
        assert other.transport is not None
        for data in self._early:
            other.transport.write(data)
        self._early.clear()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Front(_End):
    """The end towards the caller."""

    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self._relay = relay
        self._name = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._name = self._relay.accepted(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._relay.left(self._name)


class Relay:
    """Accepts at `listener`, passes on to the gRPC server at `backend`, and knows every peer by
    name."""

    def __init__(
        self,
        listener: Listener,
        backend: Path,
        metrics: Metrics,
        find: SessionFinder,
        most: int,
    ) -> None:
        """`most`: connections of one session's processes, or of one process outside, at a time."""
        self._find = find
        self._crowds: dict[str, str] = {}
        """By the name of each connection: whose it is."""
        self._listener = listener
        self._path = listener.path
        self._backend = backend
        self._metrics = metrics
        self._most = most
        self._peers: dict[str, Peer] = {}
        self._fronts: dict[str, _Front] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Accept whoever connects from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Front(self), sock=self._listener.socket, backlog=BACKLOG
        )

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for front in list(self._fronts.values()):
            if front.transport is not None:
                front.transport.abort()
        self._listener.close()

    def peer(self, grpc_peer: str) -> Peer:
        """The peer of `context.peer()`. Raises PermissionDenied for a name this relay did not
        make."""
        peer = self._peers.get(grpc_peer.rpartition(":")[2])
        if peer is None:
            raise PermissionDenied("the connection did not come through the daemon's own socket")
        return peer

    def accepted(self, front: _Front) -> str:
        """Take in a new connection: ask the kernel who is there, then join it to the gRPC server.
        Returns the name that stands for it, or nothing for one that was refused and closed."""
        assert front.transport is not None
        try:
            name = self._identify(front.transport.get_extra_info("socket"))
        except Exception as error:
            # Whatever went wrong, who cannot be told is not let in.
            front.transport.abort()
            self._metrics.peers_refused.labels("identity").inc()
            if isinstance(error, PermissionDenied):
                log.warning("%s: connection refused: %s", self._path, error)
            else:
                log.exception("%s: who opened a connection cannot be told", self._path)
            return ""
        self._fronts[name] = front
        task = asyncio.get_running_loop().create_task(self._join(front, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return name

    def _identify(self, sock: socket.socket) -> str:
        """Count a connection among those of its session or process and return the name that stands
        for it. Raises PermissionDenied; then nothing of it is kept."""
        peer = Peer(sock)
        try:
            session = self._find(peer.cgroup_path())
            whose = f"session {session.id}" if session else f"process {peer.process.pid}"
            crowd = sum(1 for other in self._crowds.values() if other == whose)
            if crowd >= self._most:
                raise PermissionDenied(f"{whose} has {crowd} connections open")
            # Random, so that nobody can bind it first.
            name = f"agentcg-{peer.process.pid}-{secrets.token_hex(16)}"
        except BaseException:
            peer.close()
            raise
        self._peers[name] = peer
        self._crowds[name] = whose
        return name

    async def _join(self, front: _Front, name: str) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            sock.bind(f"\0{name}")
            await loop.sock_connect(sock, str(self._backend))
            _, back = await loop.create_connection(_End, sock=sock)
        except BaseException as error:
            sock.close()
            if front.transport is not None:
                front.transport.abort()
            if not isinstance(error, OSError):
                raise
            log.error("%s: the gRPC server does not answer: %s", self._path, error)
            return
        front.join(back)
        if front.transport is None or front.transport.is_closing():
            assert back.transport is not None
            back.transport.close()

    def left(self, name: str) -> None:
        """The caller has hung up."""
        self._fronts.pop(name, None)
        self._crowds.pop(name, None)
        peer = self._peers.pop(name, None)
        if peer is not None:
            peer.close()
