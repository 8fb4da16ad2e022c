"""The verb `told` of the attach socket: what an agent's hook has to tell its model after a tool.

The report is found by the agent's own name for the tool call, else by the command that the model
asked for. Each report is told once, so that of two calls of the same command each hook tells of one
of its own. A tool that ran nothing, or whose call is still running, has nothing to be told of it.

Where an agent hands its model nothing after a tool, its hook asks later for all that is worth
telling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from agentcgroup import worth_telling
from agentcgroup.unwrap import is_same
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.try_next import in_words
from agentcgroupd.errors import KnobError, RequestError
from agentcgroupd.host.syscalls import pidfd_alive
from agentcgroupd.rpc.callers import Caller, Callers
from agentcgroupd.rpc.packets import Request
from agentcgroupd.rpc.peers import Peer
from agentcgroupd.state.session import Call, Session, unix_usec

FRESH_USEC = 30_000_000
"""A report that is found by its command ended at most this long ago: a hook comes at once."""
ENDING_S, GOING_ON_S = 3.0, 0.1
"""How long an answer waits for the end of a call whose main process has ended already: one whose
processes are ended now, and one in which what was left running may go on."""
SENTENCES_MAX = 6
COMMAND_CHARS = 80
"""How much of a command is repeated to the model."""
BY_ITSELF = frozenset(pb.Verdict.Value(f"VERDICT_{name}") for name in worth_telling.BY_ITSELF)
WORTH_TELLING = frozenset(
    pb.FeedbackCode.Value(f"FEEDBACK_CODE_{name}") for name in worth_telling.FEEDBACK
)


class HookVerb:
    """Tells hooks of the calls of their session."""

    def __init__(self, callers: Callers, calls: Calls) -> None:
        self._callers, self._calls = callers, calls

    def told(self, peer: Peer, request: Request) -> list[str] | Coroutine[Any, Any, list[str]]:
        """Answer what there is to tell of a tool call that has just ended: `call=` and its
        sentences, for each call of it; with `all=1` of all that has not been told. Raises
        RequestError."""
        request.only("tool_use_id", "command", "all")
        caller = self._callers.of(peer)
        if request.values.get("all"):
            return _answer_of_all(caller)
        tool_use_id = request.values.get("tool_use_id", "")
        command = request.values.get("command", "")
        ending = [call for call in _open(caller, tool_use_id, command) if _has_ended(call)]
        if ending:
            # Asked for now: what awaits them runs later, and a call may have ended before that.
            reports = [self._calls.ended_report(call) for call in ending]
            most = GOING_ON_S if all(map(_may_go_on, ending)) else ENDING_S
            return self._later(caller, tool_use_id, command, reports, most)
        return _answer(caller, tool_use_id, command)

    async def _later(
        self,
        caller: Caller,
        tool_use_id: str,
        command: str,
        ending: Sequence[Coroutine[Any, Any, pb.Report]],
        most_s: float,
    ) -> list[str]:
        """Answer once calls have ended that are about to, or without them when they take long:
        what a command has left running may go on."""
        waits = [asyncio.ensure_future(report) for report in ending]
        done, late = await asyncio.wait(waits, timeout=most_s)
        for task in late:
            task.cancel()
        for task in done:
            if not task.cancelled() and not isinstance(task.exception(), RequestError | None):
                task.result()
        return _answer(caller, tool_use_id, command)


def _has_ended(call: Call) -> bool:
    return call.main is not None and not pidfd_alive(call.main.pidfd)


def _may_go_on(call: Call) -> bool:
    try:
        return call.grant.leftovers == "keep" and call.cgroup.populated()
    except KnobError:
        return False  # its cgroup is going


def _open(caller: Caller, tool_use_id: str, command: str) -> Iterator[Call]:
    """The open calls of a tool call that the caller is shown."""
    for call in caller.session.calls.values():
        purpose = call.purpose
        if purpose is None or not caller.sees(call):
            continue
        if tool_use_id and purpose.tool_use_id:
            if purpose.tool_use_id == tool_use_id:
                yield call
        elif command and is_same(command, purpose.command):
            yield call


def _answer(caller: Caller, tool_use_id: str, command: str) -> list[str]:
    found = _reports(caller, tool_use_id, command)
    words, told = ["OK"], list[str]()
    for report in found:
        verdict = pb.Verdict.Name(report.verdict).removeprefix("VERDICT_").lower()
        words += [f"call={report.call_id}", f"verdict={verdict}"]
        told += [sentence for sentence in _sentences(report) if sentence not in told]
    return [*words, *(f"say={' '.join(sentence.split())}" for sentence in told[:SENTENCES_MAX])]


def _answer_of_all(caller: Caller) -> list[str]:
    """Tell of the calls that the caller is shown and nobody has told of, the newest last. Each says
    which it was, because the model does not hear it beside its command."""
    session = caller.session
    fresh = [
        report
        for report in session.reports
        if report.call_id not in session.told and caller.sees_report(report)
    ]
    _note(session, fresh)
    words, told = ["OK"], list[str]()
    for report in fresh:
        said = list(_sentences(report))
        if said:
            words.append(f"call={report.call_id}")
            what = report.command or report.name
            what = what if len(what) <= COMMAND_CHARS else what[:COMMAND_CHARS] + "..."
            told.append(f"`{what}`: {' '.join(said)}")
    return [*words, *(f"say={' '.join(text.split())}" for text in told[-SENTENCES_MAX:])]


def _reports(caller: Caller, tool_use_id: str, command: str) -> list[pb.Report]:
    """The reports of a tool call, the innermost last; none that has been told before."""
    session = caller.session
    fresh = [
        report
        for report in session.reports
        if report.call_id not in session.told and caller.sees_report(report)
    ]
    found = [report for report in fresh if tool_use_id and report.tool_use_id == tool_use_id]
    if not found and command:
        found = _by_command(fresh, command)
    ids = {report.call_id for report in found}
    found += [r for r in fresh if r.in_call_id in ids and r.call_id not in ids]
    _note(session, found)
    return found


def _by_command(fresh: Sequence[pb.Report], command: str) -> list[pb.Report]:
    """The newest report of a command, unless it names another tool call or ended long ago."""
    since = unix_usec() - FRESH_USEC
    for report in reversed(fresh):
        if report.began_unix_usec + report.wall_usec < since or report.in_call_id:
            continue
        if is_same(command, report.command):
            return [report]
    return []


def _note(session: Session, found: Sequence[pb.Report]) -> None:
    """Remember which reports have been told, as long as they are kept."""
    if found:
        kept = {report.call_id for report in session.reports}
        session.told = (session.told & kept) | {report.call_id for report in found}


def _sentences(report: pb.Report) -> Iterator[str]:
    """What a model is to hear of a report; nothing where all went well."""
    said = [item.sentence for item in report.feedback if item.code in WORTH_TELLING]
    if report.verdict not in BY_ITSELF or (report.HasField("try_next") and not said):
        yield report.sentence
    yield from (sentence for sentence in said if sentence != report.sentence)
    if report.HasField("try_next"):
        yield in_words(report.try_next) + _as_command(report)


def _as_command(report: pb.Report) -> str:
    """How a model that has only a shell asks for what would be enough."""
    options = [
        f"--{name.replace('_', '-')} {value}" for name, value in report.try_next.enough.items()
    ]
    return f" In a shell: agentcg exec {' '.join(options)} -- COMMAND" if options else ""
