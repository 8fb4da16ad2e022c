"""The attach socket: a process asks to be moved into a cgroup, and becomes the tool there.

See docs/protocol.md. Everything is answered in one go on the event loop; a caller that dawdles is
disconnected, and one that dies is noticed by its pidfd.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from google.protobuf import message

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.admission import Admission
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.enforce.limits import AGENT_OOM_SCORE_ADJ, set_oom_score_adj
from agentcgroupd.errors import (
    AgentcgroupdError,
    Internal,
    InvalidField,
    NotFound,
    PermissionDenied,
    as_request_error,
)
from agentcgroupd.intents.parse import WAIT_MOST_USEC
from agentcgroupd.intents.request import WORDS, request_of_words
from agentcgroupd.rpc.agent_calls import AgentCalls, refuse_unknown
from agentcgroupd.rpc.peers import Peer, check_operator, session_of
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.wire import error_to_proto
from agentcgroupd.units import suggestion

log = logging.getLogger(__name__)

PACKET_BYTES_MAX = 16_384
SILENT_TIMEOUT_S = 5.0
CONNECTIONS_MAX = 512
"""Open at a time. A request is answered in one go, so what stays open is silent, or waits for a
call to end."""
ACCEPT_PAUSE_S = 0.1
MAGIC = "ACG1"
RPC_PREFIX = b"ACG1\0rpc\0"
_RPC_METHODS: dict[str, type[pb.BeginCallRequest | pb.EndCallRequest]] = {
    "BeginCall": pb.BeginCallRequest,
    "EndCall": pb.EndCallRequest,
}
Answer = list[str] | Coroutine[Any, Any, list[str]]
"""The words of a reply, or the coroutine that has to be awaited for them."""


def _rpc_request(data: bytes) -> tuple[str, pb.BeginCallRequest | pb.EndCallRequest]:
    """Method and message of an `rpc` packet. Raises InvalidField."""
    if len(data) > PACKET_BYTES_MAX:
        raise InvalidField("request", f"{len(data)} bytes", f"at most {PACKET_BYTES_MAX} bytes")
    method, separator, raw = data[len(RPC_PREFIX) :].partition(b"\0")
    name = method[:64].decode("utf-8", "replace")
    kind = _RPC_METHODS.get(name)
    if kind is None or not separator:
        raise InvalidField("method", name, " or ".join(_RPC_METHODS))
    try:
        request = kind.FromString(raw)
    except message.DecodeError:
        raise InvalidField("request", f"{len(raw)} bytes", f"a {kind.__name__} message") from None
    refuse_unknown(request)
    return name, request


def _packet(words: list[str]) -> bytes:
    return b"".join(word.encode("utf-8", "replace") + b"\0" for word in words)


def _entered(call: Call) -> list[str]:
    """The words of a reply to a process that is in its call now, with what the launcher is to set
    in the tool's environment."""
    return ["OK", f"call={call.id}", *(f"env={word}" for word in call.grant.environment)]


class Request:
    """A parsed request packet."""

    def __init__(self, data: bytes) -> None:
        """Raises InvalidField if it is not of the protocol's form."""
        if len(data) > PACKET_BYTES_MAX:
            value, allowed = f"{len(data)} bytes or more", f"at most {PACKET_BYTES_MAX} bytes"
            raise InvalidField("request", value, allowed)
        if not data.endswith(b"\0"):
            raise InvalidField("request", repr(data[:80]), "strings each ended by a NUL byte")
        # Names and arguments of Linux programs are bytes; what is no UTF-8 is shown as U+FFFD.
        words = data[:-1].decode("utf-8", "replace").split("\0")
        if words[0] != MAGIC or len(words) < 2:
            raise InvalidField("request", words[0], f"{MAGIC}, then a verb", "another protocol")
        self.verb = words[1]
        self.values: dict[str, str] = {}
        self.args: list[str] = []
        for word in words[2:]:
            key, separator, value = word.partition("=")
            if not separator:
                raise InvalidField("request", word, "key=value")
            if key == "arg":
                self.args.append(value)
            elif key in self.values:
                raise InvalidField(key, value, "each key once", "it is given twice")
            else:
                self.values[key] = value

    def only(self, *keys: str) -> None:
        """Raises InvalidField for a key that the verb does not have."""
        for key, value in self.values.items():
            if key not in keys:
                why = suggestion(key, keys) or "there is no such field"
                raise InvalidField(key, value, f"one of the fields {', '.join(keys)}", why)

    def value(self, key: str) -> str:
        """A value that must be there. Raises InvalidField."""
        if not self.values.get(key):
            raise InvalidField(key, "", f"a value for {key}", "it is missing")
        return self.values[key]


class AttachServer:
    """The attach socket of one role: moves those who ask into their cgroups."""

    def __init__(
        self,
        path: Path,
        mode: int,
        admin: bool,
        sessions: Sessions,
        calls: Calls,
        admission: Admission,
        agent_calls: AgentCalls,
        metrics: Metrics,
    ) -> None:
        """Prepare to listen on `path`. `mode`: of the socket's file; `admin`: whether the verbs
        are the operator's or an agent's."""
        self._path = path
        self._mode = mode
        self._sessions = sessions
        self._calls, self._admission = calls, admission
        self._metrics = metrics
        self._verbs: dict[str, Callable[[Peer, Request], Answer]] = (
            {"enter": self._enter} if admin else {"attach": self._attach, "begin": self._begin}
        )
        self._agent_calls = None if admin else agent_calls
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._open: dict[int, tuple[socket.socket, asyncio.TimerHandle]] = {}
        self._waiting: dict[int, asyncio.Task[None]] = {}
        """By file number: callers whose answer is not there yet, and who may hang up meanwhile."""

    def start(self) -> None:
        """Listen. OSError if the path cannot be bound."""
        self._path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        sock.bind(str(self._path))
        self._path.chmod(self._mode)
        sock.listen(512)
        self._socket = sock
        self._loop.add_reader(sock.fileno(), self._accept)

    def stop(self) -> None:
        """Stop listening; half-open connections are closed."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for task in self._tasks:
            task.cancel()
        for client, _ in list(self._open.values()):
            self._close(client)
        self._path.unlink(missing_ok=True)

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
            self._reply(client, _packet(reply))
        self._close(client)

    async def _send_words(
        self, client: socket.socket, answer: Coroutine[Any, Any, list[str]]
    ) -> None:
        self._reply(client, _packet(await answer))

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
            method, request = _rpc_request(data)
            answer: message.Message | Awaitable[message.Message]
            if isinstance(request, pb.BeginCallRequest):
                answer = calls.begin(peer, request)
            else:
                answer = calls.end(peer, request)
        except AgentcgroupdError as error:
            self._refuse(client, error)
        except Exception:
            log.exception("%s: %s failed", self._path, method)
            self._refuse(client, Internal("the daemon failed; its log says how"))
        else:
            if not isinstance(answer, message.Message):
                if method == "BeginCall":
                    self._reply(client, _packet(self._wait_words()))
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
                self._reply(client, _packet(self._wait_words()))
            return answer
        except AgentcgroupdError as error:
            return self._error_words(error)
        except Exception:
            # Silence would make the launcher run the tool without limits.
            log.exception("%s: a request failed", self._path)
            return self._error_words(Internal("the daemon failed; its log says how"))
        finally:
            if peer is not None:
                peer.close()

    def _error_words(self, error: AgentcgroupdError) -> list[str]:
        refused = as_request_error(error)
        self._metrics.rpc_errors.labels("attach", refused.code).inc()
        return ["ERR", refused.code, " ".join(refused.sentence.replace("\0", " ").split())]

    def _attach(self, peer: Peer, request: Request) -> list[str]:
        request.only("call")
        session = session_of(peer, self._sessions.of_cgroup)
        call = session.calls.get(request.value("call"))
        if call is None:
            raise NotFound(f"no call {request.value('call')[:64]!r} is open in this session")
        self._calls.attach(call, peer.process)
        return _entered(call)

    def _begin(self, peer: Peer, request: Request) -> Answer:
        request.only(*WORDS)
        session = session_of(peer, self._sessions.of_cgroup)
        name = request.value("name")
        with self._calls.refusing(session, name):
            asked = request_of_words(request.values, request.args)
        call = self._admission.begin(session, asked, None)
        if isinstance(call, Call):
            return self._enter_call(call, peer.process)
        return self._begin_later(call, peer.process.copy())

    async def _begin_later(self, later: Coroutine[Any, Any, Call], process: Process) -> list[str]:
        try:
            return self._enter_call(await later, process)
        except AgentcgroupdError as error:
            return self._error_words(error)
        finally:
            process.close()

    def _enter_call(self, call: Call, process: Process) -> list[str]:
        try:
            self._calls.attach(call, process)
        except AgentcgroupdError:
            self._calls.withdraw(call)
            raise
        return _entered(call)

    def _enter(self, peer: Peer, request: Request) -> list[str]:
        request.only("session")
        check_operator(peer, self._sessions.of_cgroup)
        session = self._sessions.get(request.value("session"))
        if session.closing:
            raise PermissionDenied(f"session {session.id} is being closed")
        self._calls.agent_entered(session, peer.process)
        set_oom_score_adj(peer.process.pid, AGENT_OOM_SCORE_ADJ)
        words = (f"env={word}" for word in session.environment)
        return ["OK", f"session={session.id}", *words]
