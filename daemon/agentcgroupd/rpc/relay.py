"""Connections of gRPC clients, let in one request at a time.

gRPC shows a handler no peer credentials of a Unix socket, and reads whatever comes. So a relay
accepts the connections, asks the kernel who is there before a byte is read, and passes on what that
peer's budget allows. It connects to the gRPC server from a socket that it binds to an abstract name
of its own making; grpc shows that name as the peer, and the relay knows whose it is. The server's
own socket lies in a directory that only root can enter, and a peer whose name the relay did not
make is refused.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable

from agentcgroupd.errors import AgentcgroupdError, PermissionDenied
from agentcgroupd.host.listening import Listener
from agentcgroupd.rpc.budgets import Budgets, Crowd
from agentcgroupd.rpc.door import Door
from agentcgroupd.rpc.frames import FRAME_COST_BYTES, PREFACE, BadFrame, Reader, Streams
from agentcgroupd.rpc.lobby import Lobby
from agentcgroupd.rpc.peers import ENDED, Peer, SessionFinder
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.seldom import Seldom
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

READ_BYTES = 16_384
"""What is taken from a connection at a time; what has been read and may not be passed on yet is
kept, and nothing is read meanwhile."""
SILENT_S = 5.0
"""How long a connection may say nothing that a gRPC client says first."""
REQUEST_S = 10.0
"""How long a request may take to be sent to its end."""
STUCK_S = 10.0
"""How long a peer may leave what was sent to it unread, where more waits for it."""
CHECK_S = 1.0
BACKEND_AGAIN_S = 0.01
"""When the server is asked again whose queue of connections was full."""


class Connection:
    """A caller's connection and the one to the gRPC server that it is passed on to."""

    def __init__(self, relay: Relay, front: socket.socket, peer: Peer, crowd: Crowd) -> None:
        self._relay = relay
        self._budgets = relay.budgets
        self._loop = relay.loop
        self._front = front
        self._back: socket.socket | None = None
        self.peer, self.crowd = peer, crowd
        # Random, so that nobody can bind it first.
        self.name = f"agentcg-{peer.process.pid}-{secrets.token_hex(16)}"
        self.number = 0
        self._began = self._loop.time()
        self._streams = Streams()
        self._in, self._out = Reader(self._streams), Reader(self._streams)
        self._held = bytearray()
        """What has come from the caller and may not be passed on yet."""
        self._to_back, self._to_front = bytearray(), bytearray()
        """What is on its way to each end, where that did not take it at once."""
        self._cut = b""
        """The first bytes of a frame's head that the server has sent in part."""
        self._is_paused = self._is_closed = False
        self._stuck_since: float | None = None
        """When the caller began to take nothing of what is on its way to it."""
        self._answers = 0
        """Answers that were given and have not been taken."""
        self._taken_at = 0.0
        """When the last of them was taken, or the first of them given."""
        self._loop.add_reader(front.fileno(), self._front_readable)

    @property
    def unfinished(self) -> int:
        """Requests that have not been sent to their end."""
        return len(self._streams.unfinished)

    def close(self) -> None:
        """Close both ends; nothing if they are closed."""
        if self._is_closed:
            return
        self._is_closed = True
        for end in (self._front, self._back):
            if end is not None:
                self._loop.remove_reader(end.fileno())
                self._loop.remove_writer(end.fileno())
                end.close()
        self._relay.left(self)

    def refuse(self, what: str, why: object) -> None:
        """Close the connection for what its caller does with it."""
        self._budgets.refused(what)
        self._relay.complaint.say(f"a connection of {self.crowd.key} is closed: {why}")
        self.close()

    def check(self, now: float) -> None:
        """Close the connection if its caller keeps the daemon waiting."""
        oldest = next(iter(self._streams.unfinished.values()), now)
        if self._back is None and now - self._began > SILENT_S:
            self.refuse("silent", f"it has said nothing for {SILENT_S:g} s")
        elif now - oldest > REQUEST_S and not self._is_paused:
            self.refuse("unfinished", f"a request was not finished within {REQUEST_S:g} s")
        elif self._answers and now - self._taken_at > STUCK_S:
            self.refuse("unread", f"it has taken no answer for {STUCK_S:g} s")
        elif self._stuck_since is not None and now - self._stuck_since > STUCK_S:
            self.refuse("unread", f"it has read nothing for {STUCK_S:g} s")

    # Answers

    def answered(self, size_bytes: int) -> None:
        """Count an answer that was given, until it is `taken`."""
        self._budgets.answered(self.crowd, size_bytes)
        if not self._answers:
            self._taken_at = self._loop.time()
        self._answers += 1

    def taken(self, size_bytes: int) -> None:
        """Note that an answer was taken, or nobody wants it any more."""
        self._budgets.answered(self.crowd, -size_bytes)
        self._answers -= 1
        self._taken_at = self._loop.time()

    # From the caller to the server

    def _front_readable(self) -> None:
        try:
            data = self._front.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._held += data
        self._pass_on()

    def resume(self) -> None:
        """Go on after the crowd's budget was used up."""
        self._is_paused = False
        if not self._is_closed:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the server what the budget allows; read on once nothing is kept back."""
        try:
            if self._back is None:
                self._greet()
            if self._back is not None:
                self._admit()
        except BadFrame as error:
            self.refuse("frames", error)
        if self._is_closed:
            return
        if self._is_paused or self._to_back:
            self._loop.remove_reader(self._front.fileno())
        else:
            self._loop.add_reader(self._front.fileno(), self._front_readable)

    def _greet(self) -> None:
        """Connect to the server once the caller has said what a client says first. Raises
        BadFrame."""
        start = self._held[: len(PREFACE)]
        if not PREFACE.startswith(start):
            raise BadFrame("it does not speak HTTP/2")
        if len(start) < len(PREFACE):
            return
        try:
            self._back = self._connected()
        except BlockingIOError:
            # The server's queue of connections is full.
            self._is_paused = True
            self._loop.call_later(BACKEND_AGAIN_S, self.resume)
        except OSError as error:
            self.refuse("backend", f"the gRPC server cannot be reached: {error}")
        else:
            self._loop.add_reader(self._back.fileno(), self._back_readable)
            del self._held[: len(PREFACE)]
            self._to_back += PREFACE

    def _connected(self) -> socket.socket:
        """A socket connected to the server under this connection's name. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            sock.bind(f"\0{self.name}")
            sock.connect(self._relay.backend())
        except OSError:
            sock.close()
            raise
        return sock

    def _admit(self) -> None:
        """Pass on the frames that the budget allows. Raises BadFrame."""
        data, budgets, crowd = self._held, self._budgets, self.crowd
        at = self._in.passed(data, 0)
        while at < len(data):
            head = self._in.head(data, at)
            if head is None:
                break
            length, kind, flags, stream = head
            is_request = self._in.is_request(kind, stream)
            if not budgets.may_send(crowd) or (is_request and not budgets.may_ask(crowd)):
                self._is_paused = True
                budgets.pause(crowd, self)
                break
            if is_request:
                budgets.asked(crowd)
            budgets.sent(crowd, length + FRAME_COST_BYTES)
            self._in.from_client(length, kind, flags, stream, self._loop.time())
            self._in.enter(length)
            at = self._in.passed(data, at)
        self._to_back += data[:at]
        del data[:at]
        self._back_writable()

    def _back_writable(self) -> None:
        """Send the server what is on its way to it."""
        assert self._back is not None
        if not self._send(self._back, self._to_back):
            return
        if self._to_back:
            self._loop.add_writer(self._back.fileno(), self._back_writable_again)

    def _back_writable_again(self) -> None:
        assert self._back is not None
        self._loop.remove_writer(self._back.fileno())
        if not self._is_paused:
            self._pass_on()
        else:
            self._back_writable()

    def _send(self, end: socket.socket, data: bytearray) -> bool:
        """Send as much as an end takes at once; False: it is gone, and all is closed."""
        if not data:
            return True
        try:
            del data[: end.send(data, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            return True
        except OSError:
            self.close()
            return False
        return True

    # From the server to the caller

    def _back_readable(self) -> None:
        assert self._back is not None
        try:
            data = self._back.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._finish()
            return
        self._follow(data)
        self._to_front += data
        self._front_writable()

    def _finish(self) -> None:
        """The server has hung up: what is on its way to the caller is all that it gets."""
        self._send(self._front, self._to_front)
        self.close()

    def _follow(self, data: bytes) -> None:
        """Note which streams the server ends."""
        # The head of a frame may be cut in two by the end of `data`.
        data, at = self._cut + data, 0
        at = self._out.passed(data, 0)
        while (head := self._out.head(data, at)) is not None:
            length, kind, flags, stream = head
            self._out.from_server(kind, flags, stream)
            self._out.enter(length)
            at = self._out.passed(data, at)
        self._cut = data[at:]

    def _front_writable(self) -> None:
        """Send the caller what is on its way to it; the server waits meanwhile."""
        before = len(self._to_front)
        if not self._send(self._front, self._to_front):
            return
        assert self._back is not None
        if not self._to_front:
            self._stuck_since = None
            self._loop.remove_writer(self._front.fileno())
            self._loop.add_reader(self._back.fileno(), self._back_readable)
            return
        if self._stuck_since is None or len(self._to_front) < before:
            self._stuck_since = self._loop.time()
        self._loop.remove_reader(self._back.fileno())
        self._loop.add_writer(self._front.fileno(), self._front_writable)


class Relay:
    """Accepts at `listener`, passes on to a gRPC server, and knows every peer by name."""

    def __init__(
        self,
        listener: Listener,
        backend: Callable[[], str],
        metrics: Metrics,
        find: SessionFinder,
        budgets: Budgets,
        turns: Turns,
    ) -> None:
        """`backend`: the path of the server's socket. `find`: the session of a cgroup. `budgets`,
        `turns`: what each peer may ask for, and when."""
        self.backend, self.budgets = backend, budgets
        self.loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._not_told = metrics.peers_refused.labels("identity")
        lobby = Lobby(self, find, budgets, turns, "connects")
        self._door = Door(listener, lobby.accepted, metrics)
        self.complaint = Seldom(log, logging.WARNING, str(listener.path))
        self._connections: dict[str, Connection] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Accept whoever connects from now on."""
        self._door.open()
        self._timer = self.loop.call_later(CHECK_S, self._check)

    def close_door(self) -> None:
        """Let nobody new in. Who connects to a socket of systemd's waits for the next daemon."""
        self._door.close()

    async def stop(self) -> None:
        """Close every connection."""
        self.close_door()
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._connections.values()):
            connection.close()

    def connection(self, grpc_peer: str) -> Connection:
        """The connection of `context.peer()`. Raises PermissionDenied for a name this relay did not
        make."""
        connection = self._connections.get(grpc_peer.rpartition(":")[2])
        if connection is None:
            raise PermissionDenied("the connection did not come through the daemon's own socket")
        return connection

    def peer(self, grpc_peer: str) -> Peer:
        """The peer of `context.peer()`. Raises PermissionDenied as `connection` does."""
        return self.connection(grpc_peer).peer

    def left(self, connection: Connection) -> None:
        """Forget a connection that has been closed."""
        self._connections.pop(connection.name, None)
        self.budgets.disconnected(connection.crowd, connection.number)
        connection.peer.close()

    def let_in(self, front: socket.socket, peer: Peer, crowd: Crowd) -> None:
        """Take in the connection of a peer that is known."""
        connection = Connection(self, front, peer, crowd)
        self._connections[connection.name] = connection
        connection.number = self.budgets.connected(crowd, connection.close)

    def not_told(self, front: socket.socket, error: Exception) -> None:
        """Close a connection of which it cannot be told whose it is."""
        front.close()
        self._not_told.inc()
        if isinstance(error, AgentcgroupdError):
            self.complaint.say(f"connection refused: {error}")

    def ended(self, front: socket.socket) -> None:
        """Close the connection of a process that has ended."""
        front.close()
        self._not_told.inc()
        self.complaint.say(f"connection refused: {ENDED}")

    def too_many(self, crowd: Crowd) -> str:
        """What a crowd has too much of to be let in once more; empty: nothing."""
        return self.budgets.may_connect(crowd)

    def turn_away(self, front: socket.socket, crowd: Crowd, what: str) -> None:
        """Close a connection of a crowd that has too many."""
        front.close()
        self.budgets.refused(what)
        self._metrics.peers_refused.labels(what).inc()
        self.complaint.say(f"connection refused: {crowd.key} has too many {what}")

    def _check(self) -> None:
        self._timer = self.loop.call_later(CHECK_S, self._check)
        now = self.loop.time()
        unfinished: dict[Crowd, int] = {}
        for connection in list(self._connections.values()):
            connection.check(now)
            if connection.unfinished:
                crowd = connection.crowd
                unfinished[crowd] = unfinished.get(crowd, 0) + connection.unfinished
                if unfinished[crowd] > self.budgets.limits.streams:
                    connection.refuse("unfinished", "too many requests were begun and not finished")
