"""Verbs of the attach socket: each moves the process that asks into a cgroup."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from agentcgroupd.calls.admission import Admission
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.enforce.limits import AGENT_OOM_SCORE_ADJ, set_oom_score_adj
from agentcgroupd.errors import AgentcgroupdError, PermissionDenied
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

    def __init__(self, callers: Callers, calls: Calls, admission: Admission) -> None:
        self._callers, self._calls, self._admission = callers, calls, admission

    def attach(self, peer: Peer, request: Request) -> list[str]:
        """Move the peer into an open call."""
        request.only("call")
        call = self._callers.of(peer).find_to_enter(request.value("call"))
        self._calls.attach(call, peer.process)
        return _entered(call)

    def begin(self, peer: Peer, request: Request) -> Answer:
        """Begin a call, which may have to wait, and move the peer into it."""
        request.only(*WORDS)
        caller = self._callers.of(peer)
        name = request.values.get("name") or name_of_program(request.args)
        with self._calls.refusing(caller.session, name):
            asked = request_of_words(request.values, request.args)
        call = self._admission.begin(caller.session, asked, None, caller.outer)
        if isinstance(call, Call):
            return self._enter(call, peer.process)
        return self._enter_later(call, peer.process.copy())

    async def _enter_later(self, later: Coroutine[Any, Any, Call], process: Process) -> list[str]:
        try:
            return self._enter(await later, process)
        finally:
            process.close()

    def _enter(self, call: Call, process: Process) -> list[str]:
        try:
            self._calls.attach(call, process)
        except AgentcgroupdError:
            self._calls.withdraw(call)
            raise
        return _entered(call)


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


def _entered(call: Call) -> list[str]:
    """Make the reply to a process that is in its call now, with what the launcher is to set in the
    tool's environment."""
    return ["OK", f"call={call.id}", *(f"env={word}" for word in call.grant.environment)]
