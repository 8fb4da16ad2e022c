"""Verbs of the attach socket: each moves the process that asks into a cgroup."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.admission import Admission
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.rightsize import Kind, caps
from agentcgroupd.calls.try_next import ENDED_BY_ITSELF, in_words
from agentcgroupd.cgroup import knobs
from agentcgroupd.enforce.limits import AGENT_OOM_SCORE_ADJ, SETTINGS, set_oom_score_adj
from agentcgroupd.errors import AgentcgroupdError, NotFound, PermissionDenied
from agentcgroupd.intents.parse import name_of_program
from agentcgroupd.intents.request import WORDS, request_of_words
from agentcgroupd.rpc.callers import Callers
from agentcgroupd.rpc.packets import Request
from agentcgroupd.rpc.peers import Peer, check_operator
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call

Answer = list[str] | Coroutine[Any, Any, list[str]]
"""The words of a reply, or the coroutine that has to be awaited for them."""
PING = "ping"
"""The verb that only asks for an answer."""
Verb = Callable[[Peer, Request], Answer]
"""Does what is asked. Raises AgentcgroupdError, as does what is awaited."""


def pong(peer: Peer, request: Request) -> list[str]:
    """Answer whoever could connect."""
    request.only()
    return ["OK"]


class AgentVerbs:
    """Verbs for agents: a process enters a call of its own session."""

    def __init__(
        self, callers: Callers, calls: Calls, admission: Admission, rightsize: Sequence[Kind]
    ) -> None:
        """`rightsize`: what tells programs how much they get (calls.rightsize)."""
        self._callers, self._calls, self._admission = callers, calls, admission
        self._rightsize = rightsize

    def attach(self, peer: Peer, request: Request) -> list[str]:
        """Move the peer into an open call."""
        request.only("call")
        caller = self._callers.of(peer)
        call = caller.find_to_enter(request.value("call"))
        self._calls.attach(call, peer.process, caller.call)
        return _entered(call, self._rightsize)

    def begin(self, peer: Peer, request: Request) -> Answer:
        """Begin a call, which may have to wait, and move the peer into it."""
        request.only(*WORDS)
        caller = self._callers.of(peer)
        name = request.values.get("name") or name_of_program(request.args)
        with self._calls.refusing(caller.session, name):
            asked = request_of_words(request.values, request.args)
        call = self._admission.begin(caller.session, asked, None, caller.outer)
        if isinstance(call, Call):
            return self._enter(call, peer.process, request.values, caller.call)
        return self._enter_later(call, peer.process.copy(), request.values, caller.call)

    async def _enter_later(
        self,
        later: Coroutine[Any, Any, Call],
        process: Process,
        asked: Mapping[str, str],
        came_from: Call | None,
    ) -> list[str]:
        try:
            return self._enter(await later, process, asked, came_from)
        finally:
            process.close()

    def _enter(
        self, call: Call, process: Process, asked: Mapping[str, str], came_from: Call | None
    ) -> list[str]:
        try:
            self._calls.attach(call, process, came_from)
        except (AgentcgroupdError, OSError):
            self._calls.withdraw(call)
            raise
        return [
            *_entered(call, self._rightsize),
            *(f"say={sentence}" for sentence in _otherwise(call, asked)),
        ]

    def report(self, peer: Peer, request: Request) -> Answer:
        """Say how a call ended, once it has, where it did not simply end by itself."""
        request.only("call")
        caller, call_id = self._callers.of(peer), request.value("call")
        ended = caller.session.report(call_id)
        if ended is not None and caller.sees_report(ended):
            return _ending(ended)
        call = caller.find(call_id)
        if not caller.sees(call):
            raise NotFound(f"no call {call_id[:64]!r} is open in this session", "call_id", call_id)
        if call.grant.leftovers == "keep":
            return ["OK"]  # it may go on for ever
        # Asked for now: what awaits it runs later, and the call may have ended before that.
        return _ending_later(self._calls.ended_report(call))


class OperatorVerbs:
    """Verbs for the operator: a process enters the agent leaf of any session."""

    def __init__(self, sessions: Sessions, calls: Calls) -> None:
        self._sessions, self._calls = sessions, calls

    def enter(self, peer: Peer, request: Request) -> list[str]:
        """Move the peer into a session's agent leaf."""
        request.only("session")
        check_operator(peer, self._sessions.of_cgroup)
        session = self._sessions.get(request.value("session"))
        if session.closing:
            raise PermissionDenied(f"session {session.id} is being closed")
        self._calls.agent_entered(session, peer.process)
        set_oom_score_adj(peer.process.pid, AGENT_OOM_SCORE_ADJ)
        words = (f"env={word}" for word in session.environment)
        return ["OK", f"session={session.id}", *words]


FILES = {
    "memory_max": knobs.MEMORY_MAX.file,
    "cpu_weight": knobs.CPU_WEIGHT.file,
    "cpu_max": knobs.CPU_MAX.file,
    "pids_max": knobs.PIDS_MAX.file,
    "io_weight": knobs.IO_WEIGHT.file,
    **{name: setting.file for name, setting in SETTINGS.items()},
}
"""Fields of an intent by the interface file that keeps each."""
WHY_FAILED = (
    pb.FEEDBACK_CODE_OOM,
    pb.FEEDBACK_CODE_PIDS_LIMIT,
    pb.FEEDBACK_CODE_GROWTH_DENIED,
    pb.FEEDBACK_CODE_GPU_MEMORY_DENIED,
)
"""What may be the reason why a command ended by itself, and not well."""


def _otherwise(call: Call, asked: Mapping[str, str]) -> Iterator[str]:
    """Sentences on what the call got otherwise than was asked for, by field."""
    for sentence in call.grant.advice:
        if sentence.partition(":")[0] in asked:
            yield sentence
    for field, file in FILES.items():
        if field in asked and file in call.grant.not_enforced:
            yield f"{field}: it is not enforced on this host (see 'agentcg doctor')"


async def _ending_later(report: Awaitable[pb.Report]) -> list[str]:
    """Make the reply to whoever waits for the end of a call, once it has ended."""
    return _ending(await report)


def _ending(report: pb.Report) -> list[str]:
    """Make the reply to whoever waits for the end of a call."""
    said = [report.sentence]
    if report.verdict in ENDED_BY_ITSELF:
        said = [item.sentence for item in report.feedback if item.code in WHY_FAILED]
    if said and report.HasField("try_next"):
        said[-1] = f"{said[-1]} {in_words(report.try_next)}"
    return ["OK", *(f"say={sentence}" for sentence in said)]


def _entered(call: Call, rightsize: Sequence[Kind]) -> list[str]:
    """Make the reply to a process that is in its call now, with what the launcher is to set in the
    tool's environment, and with what only where it is not set there."""
    words = ["OK", f"call={call.id}", *(f"env={word}" for word in call.grant.environment)]
    return [*words, *(f"cap={name}={value}" for name, value in caps(call, rightsize))]
