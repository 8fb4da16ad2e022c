"""Calls that are declared without a socket, by a launcher in a sandbox that refuses those.

The launcher executes itself with its request as arguments, and the program in the kernel tells of
that exec (bpf/lifecycle.bpf.c). So the kernel says who asks, as it does at the attach socket, and
the same verbs do what is asked. The answer is a value that comes with a signal which is ignored by
default: it needs no descriptor, passes every namespace, and harms no program that did not wait for
it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import Any

import grpc

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import (
    AgentcgroupdError,
    InvalidField,
    RequestError,
    ResourceExhausted,
    as_request_error,
)
from agentcgroupd.host.proc import read_proc
from agentcgroupd.host.syscalls import queue_signal
from agentcgroupd.intents.parse import WAIT_MOST_USEC
from agentcgroupd.rpc.attach import PENALTY
from agentcgroupd.rpc.budgets import Budgets, Crowd
from agentcgroupd.rpc.messages import known
from agentcgroupd.rpc.packets import MAGIC, PACKET_BYTES_MAX, Request
from agentcgroupd.rpc.peers import Peer
from agentcgroupd.rpc.verbs import Verb
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

ANSWER_SIGNAL = signal.SIGURG
ANSWER_MAGIC = 0x41434731
OK, REFUSED, WAIT = 1, 2, 3
"""Answers, as agent_sdk/exec/sealed.h has them."""
UNTOLD = 1 << 8
"""Said with OK: the grant has variables for the tool's environment, which do not come along."""
END = b"\0--\0"
"""Ends the words of the request; what follows are the launcher's own arguments."""
LATE = "it did not wait for its call, so what it had declared cannot be read any more"


def name_mark(field: str) -> int:
    """Make 16 bits of the name of a field, by which the launcher finds it among its options
    (FNV-1a); 0 for an empty name."""
    mark = 2166136261
    for byte in field.encode():
        mark = (mark ^ byte) * 16777619 & 0xFFFFFFFF
    return (mark ^ mark >> 16) & 0xFFFF if field else 0


def request_in(arguments: bytes) -> Request:
    """Read the request in the arguments of a launcher: its name, its mark, then the words. Raises
    InvalidField."""
    words, end, _ = arguments.partition(END)
    if not end or len(words) > PACKET_BYTES_MAX:
        raise _no_request(len(words))
    declared = words.split(b"\0", 2)[2:]
    return Request(b"\0".join([MAGIC.encode(), *declared, b""]))


def _no_request(size_bytes: int) -> InvalidField:
    allowed = f"a request of at most {PACKET_BYTES_MAX} bytes before '--'"
    return InvalidField("request", f"{size_bytes} bytes", allowed)


class SealedDoor:
    """Where launchers come in that can open no socket."""

    def __init__(
        self,
        verbs: Mapping[str, Verb],
        budgets: Budgets,
        turns: Turns,
        notices: Notices,
    ) -> None:
        """`verbs`: by name. `budgets`, `turns`: those of the agents' attach socket, so that this
        way gives nobody more."""
        self._verbs = verbs
        self._budgets, self._turns, self._notices = budgets, turns, notices
        self._debt = budgets.limits.packets_per_s / 5
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def declared(self, session: Session, key: tuple[int, int], head: bytes, is_whole: bool) -> None:
        """Take in a launcher that the kernel has seen declare a call. `session`: where it was
        executed, which pays for it. `key`: its pid and start time in clock ticks. `head`: the
        beginning of its arguments; `is_whole`: there are no others.

        What is to be refused is refused here, before anything is opened or read for it.
        """
        crowd = self._budgets.crowd(session.turns_key)
        if what := self._budgets.may_attach(crowd):
            self._turn_away(key, crowd, what)
            return
        crowd.packets.take(1)
        if is_whole and END not in head:
            self._answer_once(key, self._refusal(_no_request(len(head))))
            return
        process = Process.find(*key)
        if process is None:
            return
        peer = Peer.of_process(process)
        self._budgets.attached(crowd, 1)
        serve = partial(self._serve, peer, crowd, session, head)
        self._turns.submit_or_do(crowd.turns_key, serve)

    def _turn_away(self, key: tuple[int, int], crowd: Crowd, what: str) -> None:
        """Refuse a launcher of a crowd that asks too much. Where it goes on asking it is not
        answered either, and waits as if no daemon were there."""
        self._budgets.refused(what)
        if crowd.packets.left(self._loop.time()) > -self._debt:
            crowd.packets.take(PENALTY)
            sentence = f"{crowd.key} asks too much at a time"
            self._answer_once(key, self._refusal(ResourceExhausted(sentence, what)))

    def _answer_once(self, key: tuple[int, int], answer: int) -> None:
        """Answer a launcher that is not to be served."""
        process = Process.find(*key)
        if process is not None:
            peer = Peer.of_process(process)
            self._answer(peer, answer)
            peer.close()

    def stop(self) -> None:
        """Give up calls that wait to begin."""
        for task in self._tasks:
            task.cancel()

    def _serve(self, peer: Peer, crowd: Crowd, session: Session, head: bytes) -> None:
        started = time.perf_counter()
        later = None
        try:
            later = self._do(peer, head)
        except Exception as error:
            if not isinstance(error, AgentcgroupdError):
                log.exception("a declared call failed")
            self._refuse(peer, session, as_request_error(known(error)))
        finally:
            self._budgets.took(crowd, time.perf_counter() - started)
            if later is None:
                self._over(peer, crowd)
        if later is not None:
            self._do_later(peer, crowd, session, later)

    def _do(self, peer: Peer, head: bytes) -> Coroutine[Any, Any, list[str]] | None:
        """Do what a launcher asks; returns what is to be awaited where its call has to wait.
        Raises AgentcgroupdError or OSError."""
        request = request_in(self._arguments(peer, head))
        verb = self._verbs.get(request.verb)
        if verb is None:
            raise InvalidField("verb", request.verb, " or ".join(self._verbs))
        answer = verb(peer, request)
        if isinstance(answer, list):
            self._entered(peer, answer)
            return None
        self._answer(peer, WAIT | (WAIT_MOST_USEC // 1_000_000) << 8)
        return answer

    @staticmethod
    def _arguments(peer: Peer, head: bytes) -> bytes:
        """Return the launcher's arguments, as far as its request goes: what the event holds of
        them, or what the process has still. Raises InvalidField, PermissionDenied or OSError."""
        if END in head:
            return head
        found = read_proc(peer.process.pid, "cmdline", PACKET_BYTES_MAX + len(head))
        peer.check_alive()
        if not found.startswith(head):
            raise InvalidField("request", "", "a request that is waited for", LATE)
        return found

    def _do_later(
        self,
        peer: Peer,
        crowd: Crowd,
        session: Session,
        answer: Coroutine[Any, Any, list[str]],
    ) -> None:
        """Answer once the call has begun; a launcher that ends meanwhile wants it no more."""
        pidfd = peer.process.pidfd
        task = self._loop.create_task(self._wait(peer, session, answer))
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._loop.remove_reader(pidfd)
            self._over(peer, crowd)
            if not task.cancelled() and task.exception() is not None:
                log.error("a declared call failed", exc_info=task.exception())

        def ended() -> None:
            self._loop.remove_reader(pidfd)
            task.cancel()

        task.add_done_callback(done)
        self._loop.add_reader(pidfd, ended)

    async def _wait(
        self, peer: Peer, session: Session, answer: Coroutine[Any, Any, list[str]]
    ) -> None:
        try:
            words = await answer
        except (AgentcgroupdError, OSError) as error:
            self._refuse(peer, session, as_request_error(known(error)))
        else:
            self._entered(peer, words)

    def _over(self, peer: Peer, crowd: Crowd) -> None:
        self._budgets.attached(crowd, -1)
        peer.close()

    # Answers

    def _entered(self, peer: Peer, words: list[str]) -> None:
        untold = any(word.startswith("env=") for word in words)
        self._answer(peer, OK | UNTOLD * untold)

    def _refuse(self, peer: Peer, session: Session, error: RequestError) -> None:
        """Refuse a launcher. There is no room for the sentence in the answer, so the session is
        told it."""
        self._answer(peer, self._refusal(error))
        feedback = pb.Feedback(code=pb.FEEDBACK_CODE_NOT_IN_CALL, sentence=error.sentence)
        self._notices.tell(session, "", feedback)

    def _refusal(self, error: RequestError) -> int:
        self._notices.metrics.rpc_errors.labels("sealed", error.code).inc()
        status: int = grpc.StatusCode[error.code].value[0]
        return REFUSED | status << 8 | name_mark(error.field) << 16

    @staticmethod
    def _answer(peer: Peer, answer: int) -> None:
        try:
            queue_signal(peer.process.pidfd, ANSWER_SIGNAL, ANSWER_MAGIC << 32 | answer)
        except OSError as error:
            log.debug("process %d is gone before the answer: %s", peer.process.pid, error)
