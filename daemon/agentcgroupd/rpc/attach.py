"""The attach socket: a process asks to be moved into a cgroup, and becomes the tool there.

Packets are read in rpc.packets, and what they ask for is done in rpc.verbs. A request is answered
in one go on the event loop, unless its call has to wait. A caller that is silent for long is
disconnected, and one that dies is noticed by its pidfd.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any

from google.protobuf import message

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import AgentcgroupdError, Internal, InvalidField, as_request_error
from agentcgroupd.host.listening import Listener
from agentcgroupd.intents.parse import WAIT_MOST_USEC
from agentcgroupd.rpc.agent_calls import AgentCalls
from agentcgroupd.rpc.packets import PACKET_BYTES_MAX, RPC_PREFIX, Request, packet, rpc_request
from agentcgroupd.rpc.peers import Peer
from agentcgroupd.rpc.verbs import Answer, Verb
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.wire import error_to_proto

log = logging.getLogger(__name__)

SILENT_TIMEOUT_S = 5.0
CONNECTIONS_MAX = 512
"""Open at a time. A request is answered in one go, so what stays open is silent, or waits for a
call to end."""
ACCEPT_PAUSE_S = 0.1


class AttachServer:
    """The attach socket of one role: moves those who ask into their cgroups."""

    def __init__(
        self,
        listener: Listener,
        verbs: Mapping[str, Verb],
        agent_calls: AgentCalls | None,
        metrics: Metrics,
    ) -> None:
        """Prepare to accept at `listener`. `verbs`: by name. `agent_calls` answers packets with a
        message; None: there are none on this socket."""
        self._listener, self._path = listener, listener.path
        self._verbs, self._agent_calls = verbs, agent_calls
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._open: dict[int, tuple[socket.socket, asyncio.TimerHandle]] = {}
        self._waiting: dict[int, asyncio.Task[None]] = {}
        """By file number: callers whose answer is not there yet, and who may hang up meanwhile."""

    def start(self) -> None:
        """Accept whoever connects from now on."""
        sock = self._listener.socket
        self._socket = sock
        self._loop.add_reader(sock.fileno(), self._accept)

    def stop(self) -> None:
        """Stop listening; half-open connections are closed."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._listener.close()
            self._socket = None
        for task in self._tasks:
            task.cancel()
        for client, _ in list(self._open.values()):
            self._close(client)

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            client, _ = self._socket.accept()
        except BlockingIOError:
            return  # the caller hung up
        except OSError as error:
            # EMFILE and friends: it stays in the backlog, and is not asked for again at once.
            log.error("%s: accept: %s", self._path, error)
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(ACCEPT_PAUSE_S, self._listen_again)
            return
        if len(self._open) >= CONNECTIONS_MAX:
            # The oldest has been silent longest: a request is answered when it comes.
            self._close(next(iter(self._open.values()))[0])
        client.setblocking(False)
        timer = self._loop.call_later(SILENT_TIMEOUT_S, self._close, client)
        self._open[client.fileno()] = (client, timer)
        self._loop.add_reader(client.fileno(), self._readable, client)
        # Mostly the request came with the connection: no need to go round the loop for it.
        self._readable(client)

    def _listen_again(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _close(self, client: socket.socket) -> None:
        entry = self._open.pop(client.fileno(), None)
        if entry is not None:
            entry[1].cancel()
            self._loop.remove_reader(client.fileno())
        client.close()

    def _readable(self, client: socket.socket) -> None:
        try:
            data = client.recv(PACKET_BYTES_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data.startswith(RPC_PREFIX) and self._agent_calls is not None:
            self._rpc(client, data, self._agent_calls)
            return
        if data:
            reply = self._answer(client, data)
            if not isinstance(reply, list):
                self._answer_in_time(client, self._send_words(client, reply))
                return
            self._reply(client, packet(reply))
        self._close(client)

    async def _send_words(
        self, client: socket.socket, answer: Coroutine[Any, Any, list[str]]
    ) -> None:
        try:
            words = await answer
        except AgentcgroupdError as error:
            words = self._error_words(error)
        except Exception:
            log.exception("%s: a request failed", self._path)
            words = self._error_words(_failed())
        self._reply(client, packet(words))

    def _answer_in_time(self, client: socket.socket, answer: Coroutine[Any, Any, None]) -> None:
        """Send a reply once it is there; the caller is not disconnected for being silent meanwhile.
        One that hangs up wants no reply any more, and the work for it is cancelled."""
        entry = self._open.pop(client.fileno(), None)
        assert entry is not None
        entry[1].cancel()
        number = client.fileno()
        task = self._loop.create_task(answer)
        self._waiting[number] = task
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._waiting.pop(number, None)
            self._loop.remove_reader(number)
            client.close()
            if not task.cancelled() and task.exception() is not None:
                log.error("%s: a request failed", self._path, exc_info=task.exception())

        task.add_done_callback(done)
        self._loop.remove_reader(number)
        self._loop.add_reader(number, self._hung_up, client, task)

    def _hung_up(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        """Give up a caller whose socket became readable while it waits: it is gone, or says what
        it has no right to say now."""
        try:
            client.recv(1)
        except BlockingIOError:
            return
        except OSError:
            log.debug("%s: the caller is gone", self._path)
        self._loop.remove_reader(client.fileno())
        task.cancel()

    def _reply(self, client: socket.socket, packet: bytes) -> None:
        try:
            client.send(packet, socket.MSG_NOSIGNAL)
        except OSError as error:
            log.debug("%s: the caller is gone before the answer: %s", self._path, error)

    def _rpc(self, client: socket.socket, data: bytes, calls: AgentCalls) -> None:
        """Answer a message of agentcgroup.proto by another (docs/protocol.md). Only a call that has
        to wait, or whose processes must die first, is answered later."""
        started = time.perf_counter()
        peer: Peer | None = None
        method = "packet"
        try:
            peer = Peer(client)
            method, request = rpc_request(data)
            answer: message.Message | Awaitable[message.Message]
            if isinstance(request, pb.BeginCallRequest):
                answer = calls.begin(peer, request)
            else:
                answer = calls.end(peer, request)
        except AgentcgroupdError as error:
            self._refuse(client, error)
        except Exception:
            log.exception("%s: %s failed", self._path, method)
            self._refuse(client, _failed())
        else:
            if not isinstance(answer, message.Message):
                if method == "BeginCall":
                    self._reply(client, packet(self._wait_words()))
                self._answer_in_time(client, self._answer_later(client, answer))
                return
            self._reply(client, b"OK\0" + answer.SerializeToString())
        finally:
            self._metrics.rpc.labels(method).observe(time.perf_counter() - started)
            if peer is not None:
                peer.close()
        self._close(client)

    async def _answer_later(
        self, client: socket.socket, answer: Awaitable[message.Message]
    ) -> None:
        try:
            self._reply(client, b"OK\0" + (await answer).SerializeToString())
        except AgentcgroupdError as error:
            self._refuse(client, error)
        except Exception:
            log.exception("%s: a request failed", self._path)
            self._refuse(client, _failed())

    @staticmethod
    def _wait_words() -> list[str]:
        """What a caller is told whose answer may take as long as a call can wait."""
        return ["WAIT", f"seconds={WAIT_MOST_USEC // 1_000_000}"]

    def _refuse(self, client: socket.socket, error: AgentcgroupdError) -> None:
        refused = as_request_error(error)
        self._metrics.rpc_errors.labels("packet", refused.code).inc()
        self._reply(client, b"ERR\0" + error_to_proto(refused).SerializeToString())

    def _answer(self, client: socket.socket, data: bytes) -> Answer:
        peer: Peer | None = None
        try:
            request = Request(data)
            verb = self._verbs.get(request.verb)
            if verb is None:
                raise InvalidField("verb", request.verb, " or ".join(self._verbs))
            peer = Peer(client)
            answer = verb(peer, request)
            if not isinstance(answer, list):
                self._reply(client, packet(self._wait_words()))
            return answer
        except AgentcgroupdError as error:
            return self._error_words(error)
        except Exception:
            log.exception("%s: a request failed", self._path)
            return self._error_words(_failed())
        finally:
            if peer is not None:
                peer.close()

    def _error_words(self, error: AgentcgroupdError) -> list[str]:
        refused = as_request_error(error)
        self._metrics.rpc_errors.labels("attach", refused.code).inc()
        return ["ERR", refused.code, " ".join(refused.sentence.replace("\0", " ").split())]


def _failed() -> Internal:
    """Make the error for a failure of the daemon's own; without an answer the launcher would run
    the tool without limits."""
    return Internal("the daemon failed; its log says how")
