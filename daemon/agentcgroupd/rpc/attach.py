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
from dataclasses import dataclass
from functools import partial
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import (
    AgentcgroupdError,
    InvalidField,
    PermissionDenied,
    ResourceExhausted,
    as_request_error,
)
from agentcgroupd.host.listening import Listener
from agentcgroupd.host.syscalls import receive_from
from agentcgroupd.intents.parse import WAIT_MOST_USEC
from agentcgroupd.rpc.budgets import STRANGERS, Budgets, Crowd
from agentcgroupd.rpc.door import Door
from agentcgroupd.rpc.lobby import Lobby
from agentcgroupd.rpc.messages import Messages, Stays, known, packet_of, refusal
from agentcgroupd.rpc.packets import PACKET_BYTES_MAX, RPC_PREFIX, Request, packet
from agentcgroupd.rpc.peers import ENDED, Peer, SessionFinder
from agentcgroupd.rpc.verbs import Answer, Verb
from agentcgroupd.state.session import Call
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.seldom import Seldom
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

SILENT_TIMEOUT_S = 5.0
PENALTY = 0.25
"""What a refused request counts of one that is let in."""
SILENT_MAX = 256
"""Connections of one crowd, or of all strangers, that have not sent their request; of more, the
oldest is closed."""

LIMIT_KEYS = {"attaching": "attaching", "packets": "packets_per_s"}
"""Keys of the configuration by what there is too much of."""


@dataclass(slots=True, eq=False)
class Client:
    """An open connection."""

    socket: socket.socket
    peer: Peer
    crowd: Crowd
    timer: asyncio.TimerHandle | None = None
    """Closes the connection, as long as it is silent."""
    call: Call | None = None
    """The call whose end it waits for; None: it has not begun one like that."""


class AttachServer:
    """The attach socket of one role: moves those who ask into their cgroups."""

    def __init__(
        self,
        listener: Listener,
        verbs: Mapping[str, Verb],
        messages: Messages,
        metrics: Metrics,
        find: SessionFinder,
        budgets: Budgets,
        turns: Turns,
    ) -> None:
        """Prepare to accept at `listener`. `verbs`: by name. `messages` answers packets
        with a message. `find`: the session of a cgroup. `budgets`,
        `turns`: what each peer may ask for, and when."""
        self._path = listener.path
        # What it accepts inherits that: each packet names its sender.
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._verbs, self._messages = verbs, messages
        self._metrics, self._budgets = metrics, budgets
        self._turns = turns
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        lobby = Lobby(self, find, budgets, turns, "packets")
        self._door = Door(listener, lobby.accepted, metrics)
        self._debt = budgets.limits.packets_per_s / 5
        self._nobody = budgets.crowd("processes that have ended")
        self._ended_refusal = _refusal(PermissionDenied(ENDED))
        self._complaint = Seldom(log, logging.WARNING, str(listener.path))
        self._refused = {what: metrics.refused.labels(what) for what in LIMIT_KEYS}
        self._silent: dict[str, dict[Client, None]] = {}
        """Callers whose request has not come, oldest first, by crowd; of strangers all together."""
        self._callers: set[Client] = set()

    def start(self) -> None:
        """Accept whoever connects from now on."""
        self._door.open()

    def stop(self) -> None:
        """Stop listening; half-open connections are closed."""
        self._door.close()
        for task in self._tasks:
            task.cancel()
        for caller in list(self._callers):
            self._close(caller)

    # Connections

    def let_in(self, client: socket.socket, peer: Peer, crowd: Crowd) -> None:
        """Wait for the request of a caller that is known."""
        crowd.packets.take(1)
        self._budgets.attached(crowd, 1)
        caller = Client(client, peer, crowd)
        self._callers.add(caller)
        self._listen_to(caller)

    def not_told(self, client: socket.socket, error: Exception) -> None:
        """Refuse a caller of which it cannot be told who it is."""
        self._send_refusal(client, _refusal(known(error)))
        client.close()

    def ended(self, client: socket.socket) -> None:
        """Refuse a caller that has ended; another process may have inherited its connection."""
        if self._nobody.packets.left(self._loop.time()) >= 1:
            self._nobody.packets.take(1)
            self._send_refusal(client, self._ended_refusal)
        else:
            self._refused["packets"].inc()
        client.close()

    def too_many(self, crowd: Crowd) -> str:
        """What a crowd has too much of to be let in once more; empty: nothing."""
        return self._budgets.may_attach(crowd)

    def turn_away(self, client: socket.socket, crowd: Crowd, what: str) -> None:
        """Refuse a request of a crowd that asks too much, at the least cost: the answer is made
        once for each crowd and reason."""
        answers = crowd.refusals.get(what)
        if answers is None:
            sentence = f"{crowd.key} asks too much at a time (limits.{LIMIT_KEYS[what]})"
            answers = crowd.refusals[what] = _refusal(ResourceExhausted(sentence, what))
            self._complaint.say(f"refused: {crowd.key} has too many {what}")
        self._refused[what].inc()
        # Who goes on asking is not let in until it asks less, and in the end not answered either:
        # a connection that is closed at once costs the others least.
        if crowd.packets.left(self._loop.time()) > -self._debt:
            crowd.packets.take(PENALTY)
            self._send_refusal(client, answers)
        client.close()

    def _send_refusal(self, client: socket.socket, answers: tuple[bytes, bytes]) -> None:
        """Answer a request that is not read, in the form in which it was asked."""
        try:
            start = client.recv(len(RPC_PREFIX))
            if start:
                client.send(answers[start == RPC_PREFIX], socket.MSG_NOSIGNAL)
        except OSError:
            return  # it has not been sent yet, or its sender is gone

    def _listen_to(self, caller: Client) -> None:
        """Wait for a caller's request, unless it is there already."""
        # Mostly it came with the connection: no need to go round the loop for it.
        if self._receive(caller):
            return
        silent = self._silent.setdefault(_silent_key(caller.crowd), {})
        silent[caller] = None
        caller.timer = self._loop.call_later(SILENT_TIMEOUT_S, self._close, caller)
        self._loop.add_reader(caller.socket.fileno(), self._receive, caller)
        if len(silent) > SILENT_MAX:
            self._budgets.refused("silent")
            self._close(next(iter(silent)))

    def _heard(self, caller: Client) -> None:
        """Stop waiting for a caller's request."""
        if caller.timer is not None:
            caller.timer.cancel()
            caller.timer = None
            self._loop.remove_reader(caller.socket.fileno())
            key = _silent_key(caller.crowd)
            self._silent[key].pop(caller, None)
            if not self._silent[key]:
                del self._silent[key]

    def _close(self, caller: Client) -> None:
        if caller not in self._callers:
            return
        self._heard(caller)
        self._callers.discard(caller)
        if caller.call is None:
            self._budgets.attached(caller.crowd, -1)
        elif caller.call.line is not None:
            self._leave_line(caller, caller.call)
        caller.socket.close()
        caller.peer.close()

    # Requests

    def _receive(self, caller: Client) -> bool:
        """Take a caller's request; False: it is not there yet."""
        try:
            data, sender = receive_from(caller.socket, PACKET_BYTES_MAX + 1)
        except BlockingIOError:
            return False
        except OSError:
            data, sender = b"", None
        self._heard(caller)
        if not data:
            self._close(caller)
        else:
            # Its crowd's turn, not that of a process that has had none yet: who starts many
            # processes would have a turn for each.
            self._turns.submit_or_do(
                caller.crowd.turns_key, partial(self._serve, caller, data, sender)
            )
        return True

    def _serve(self, caller: Client, data: bytes, sender: int | None) -> None:
        if caller not in self._callers:
            return  # the daemon is stopping
        started = time.perf_counter()
        try:
            self._serve_now(caller, data, sender)
        finally:
            self._budgets.took(caller.crowd, time.perf_counter() - started)

    def _serve_now(self, caller: Client, data: bytes, sender: int | None) -> None:
        if data.startswith(RPC_PREFIX):
            self._rpc(caller, data, sender)
            return
        if _has_hung_up(caller.socket):
            # Each verb moves the caller. One that does not wait for it would be moved at a time
            # when it does something else.
            self._close(caller)
            return
        reply = self._answer(caller, data, sender)
        if not isinstance(reply, list):
            self._answer_in_time(caller, self._send_words(caller.socket, reply))
            return
        self._reply(caller.socket, packet(reply))
        self._close(caller)

    async def _send_words(
        self, client: socket.socket, answer: Coroutine[Any, Any, list[str]]
    ) -> None:
        try:
            words = await answer
        except Exception as error:
            if not isinstance(error, AgentcgroupdError):
                log.exception("%s: a request failed", self._path)
            words = self._error_words(known(error))
        self._reply(client, packet(words))

    def _answer_in_time(self, caller: Client, answer: Coroutine[Any, Any, None]) -> None:
        """Send a reply once it is there; the caller is not disconnected for being silent meanwhile.
        One that hangs up or ends wants no reply any more, and the work for it is cancelled. (Its
        socket may live on in a child of it, and its pid become another process's.)"""
        number, pidfd = caller.socket.fileno(), caller.peer.process.pidfd
        task = self._loop.create_task(answer)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._loop.remove_reader(number)
            self._loop.remove_reader(pidfd)
            self._close(caller)
            if not task.cancelled() and task.exception() is not None:
                log.error("%s: a request failed", self._path, exc_info=task.exception())

        task.add_done_callback(done)
        self._loop.add_reader(number, self._hung_up, caller.socket, task)
        self._loop.add_reader(pidfd, self._caller_ended, pidfd, task)

    def _caller_ended(self, pidfd: int, task: asyncio.Task[None]) -> None:
        """Give up a caller that has ended while it waits."""
        log.debug("%s: the caller has ended", self._path)
        self._loop.remove_reader(pidfd)
        task.cancel()

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

    def _rpc(self, caller: Client, data: bytes, sender: int | None) -> None:
        """Answer a message of agentcgroup.proto by another (docs/protocol.md). Only what has to
        wait for something is answered later."""
        answer = self._messages.answer(caller, data, sender)
        if isinstance(answer, bytes):
            self._reply(caller.socket, answer)
            self._close(caller)
            return
        if isinstance(answer, Stays):
            self._reply(caller.socket, answer.packet)
            self._stay(caller, answer.call)
            return
        if answer.may_wait:
            self._reply(caller.socket, packet(self._wait_words()))
        self._answer_in_time(caller, self._answer_later(caller.socket, answer.packet))

    # Those who stay until the end of a call

    def _stay(self, caller: Client, call: Call) -> None:
        """Keep a connection open for the end of a call. There are as many as there are open calls
        at most, which are limited."""
        if caller.call is not None:
            # Its second call on one connection: the answer is all that it gets.
            self._close(caller)
            return
        self._budgets.attached(caller.crowd, -1)
        caller.call = call
        call.line = partial(self._tell_end, caller)
        self._loop.add_reader(caller.socket.fileno(), self._readable_again, caller, call)

    def _leave_line(self, caller: Client, call: Call) -> None:
        call.line = None
        self._loop.remove_reader(caller.socket.fileno())

    def _tell_end(self, caller: Client, report: pb.Report) -> None:
        self._reply(caller.socket, packet_of(report))
        self._close(caller)

    def _readable_again(self, caller: Client, call: Call) -> None:
        """Take a second request, for the end of the call, which is answered like any other. Whoever
        hangs up wants no report, and holds the call open no longer."""
        try:
            data, sender = receive_from(caller.socket, PACKET_BYTES_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            data, sender = b"", None
        self._leave_line(caller, call)
        if not data:
            self._close(caller)
            hung_up = partial(self._messages.hung_up, call)
            self._turns.submit(caller.crowd.turns_key, hung_up)
            return
        caller.crowd.packets.take(1)
        self._turns.submit_or_do(caller.crowd.turns_key, partial(self._serve, caller, data, sender))

    async def _answer_later(self, client: socket.socket, answer: Awaitable[bytes]) -> None:
        self._reply(client, await answer)

    @staticmethod
    def _wait_words() -> list[str]:
        """What a caller is told whose answer may take as long as a call can wait."""
        return ["WAIT", f"seconds={WAIT_MOST_USEC // 1_000_000}"]

    def _answer(self, caller: Client, data: bytes, sender: int | None) -> Answer:
        try:
            request = Request(data)
            verb = self._verbs.get(request.verb)
            if verb is None:
                raise InvalidField("verb", request.verb, " or ".join(self._verbs))
            caller.peer.check_sender(sender)
            answer = verb(caller.peer, request)
            if not isinstance(answer, list):
                self._reply(caller.socket, packet(self._wait_words()))
            return answer
        except Exception as error:
            if not isinstance(error, AgentcgroupdError):
                log.exception("%s: a request failed", self._path)
            return self._error_words(known(error))

    def _error_words(self, error: AgentcgroupdError) -> list[str]:
        refused = as_request_error(error)
        self._metrics.rpc_errors.labels("attach", refused.code).inc()
        return ["ERR", refused.code, " ".join(refused.sentence.replace("\0", " ").split())]


def _has_hung_up(client: socket.socket) -> bool:
    try:
        return not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _silent_key(crowd: Crowd) -> str:
    return STRANGERS if crowd.is_stranger else crowd.key


def _refusal(error: AgentcgroupdError) -> tuple[bytes, bytes]:
    """The answer to a request that was refused unread: to one of words, and to one with a
    message."""
    refused = as_request_error(error)
    words = packet(["ERR", refused.code, " ".join(refused.sentence.replace("\0", " ").split())])
    return words, refusal(refused)
