"""The verb `told` of the attach socket: what an agent's hook has to tell its model after a tool.

The report is found by the agent's own name for the tool call, else by the command that the model
asked for. Each report is told once, so that of two calls of the same command each hook tells of one
of its own. A tool that ran nothing, or whose call is still running, has nothing to be told of it.

Where an agent hands its model nothing after a tool, its hook asks later for all that is worth
telling. Nothing says which of the agents of a session a call is of, so what is told so is kept
apart: the hook of another agent beside it still finds the report of its own tool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from agentcgroup import worth_telling
from agentcgroup.unwrap import is_same
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.try_next import in_words
from agentcgroupd.errors import InvalidField, KnobError, RequestError
from agentcgroupd.host.syscalls import pidfd_alive
from agentcgroupd.rpc.callers import Caller, Callers
from agentcgroupd.rpc.packets import Request, packet
from agentcgroupd.rpc.peers import Peer
from agentcgroupd.state.session import Call, Session, unix_usec

FRESH_USEC = 30_000_000
"""A report that is found by its command ended at most this long ago: a hook comes at once."""
ENDING_S, GOING_ON_S = 3.0, 0.1
"""How long an answer waits for the end of a call whose main process has ended already: one whose
processes are ended now, and one in which what was left running may go on."""
SENTENCES_MAX = 6
SENTENCE_BYTES_MAX = 2048
"""A longer one is cut."""
ANSWER_BYTES_MAX = 16_384
"""What a hook reads of an answer (ANSWER_MAX in agent_sdk/exec/ask.h)."""
STOPS_MAX = 3
"""How often in a row an agent that is about to stop is told something, which makes it go on."""
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
        """Answer what there is to tell of a tool call that has just ended: sentences, and `call=`
        for each call of it; with `all=1` of all that has not been told. Raises RequestError."""
        request.only("tool_use_id", "command", "all", "stops")
        values = request.values
        _check(values)
        caller = self._callers.of(peer)
        if "all" in values:
            stops = "stops" in values
            if stops and caller.session.stops_delayed >= STOPS_MAX:
                # What there is to tell comes with the user's next message, or at the next stop.
                caller.session.stops_delayed = 0
                return ["OK"]
            ending = [call for call in _seen(caller) if _is_about_to_end(call)]
            return self._once_ended(ending, ENDING_S, lambda: _answer_of_all(caller, stops))
        tool_use_id, command = values.get("tool_use_id", ""), values.get("command", "")
        ending = [call for call in _open(caller, tool_use_id, command) if _has_ended(call)]
        most_s = GOING_ON_S if all(map(_may_go_on, ending)) else ENDING_S
        return self._once_ended(ending, most_s, lambda: _answer(caller, tool_use_id, command))

    def _once_ended(
        self, ending: Sequence[Call], most_s: float, answer: Callable[[], list[str]]
    ) -> list[str] | Coroutine[Any, Any, list[str]]:
        """Answer at once where no call is about to end."""
        # Asked for now: what awaits them runs later, and a call may have ended before that.
        reports = [self._calls.ended_report(call) for call in ending]
        return _later(reports, most_s, answer) if reports else answer()


async def _later(
    ending: Sequence[Coroutine[Any, Any, pb.Report]], most_s: float, answer: Callable[[], list[str]]
) -> list[str]:
    """Answer once calls have ended that are about to, or without them when they take long: what a
    command has left running may go on."""
    waits = [asyncio.ensure_future(report) for report in ending]
    done, late = await asyncio.wait(waits, timeout=most_s)
    for task in late:
        task.cancel()
    for task in done:
        if not task.cancelled() and not isinstance(task.exception(), RequestError | None):
            task.result()
    return answer()


def _check(values: dict[str, str]) -> None:
    """Refuse what asks for nothing, or for two things. Raises InvalidField."""
    for key in ("all", "stops"):
        if values.get(key, "1") != "1":
            raise InvalidField(key, values[key], "1, or to leave it out")
    if "all" in values:
        for key in ("tool_use_id", "command"):
            if key in values:
                raise InvalidField(key, values[key], "either a tool call or all=1, not both")
    elif "stops" in values:
        raise InvalidField("stops", values["stops"], "1 together with all=1")
    elif not values:
        raise InvalidField("command", "", "tool_use_id, command or both, or all=1", "it is missing")


def _has_ended(call: Call) -> bool:
    return call.main is not None and not pidfd_alive(call.main.pidfd)


def _may_go_on(call: Call) -> bool:
    try:
        return call.grant.leftovers == "keep" and call.cgroup.populated()
    except KnobError:
        return False  # its cgroup is going


def _is_about_to_end(call: Call) -> bool:
    """Whether nothing keeps a call open but that its end is still to be dealt with."""
    is_held = call.held and not call.one_command
    return not is_held and _has_ended(call) and not _may_go_on(call)


def _seen(caller: Caller) -> Iterator[Call]:
    """The open calls that the caller is shown."""
    return (call for call in caller.session.calls.values() if caller.sees(call))


def _open(caller: Caller, tool_use_id: str, command: str) -> Iterator[Call]:
    """Give the open calls that were begun for a tool call."""
    for call in _seen(caller):
        purpose = call.purpose
        if purpose is None:
            continue
        if tool_use_id and purpose.tool_use_id:
            if purpose.tool_use_id == tool_use_id:
                yield call
        elif command and is_same(command, purpose.command):
            yield call


def _answer(caller: Caller, tool_use_id: str, command: str) -> list[str]:
    found = _reports(caller, tool_use_id, command)
    told = list(dict.fromkeys(sentence for report in found for sentence in _sentences(report)))
    more = len(told) - SENTENCES_MAX
    says = told[:SENTENCES_MAX]
    if more > 0:
        says.append(f"And {more} more sentences, of calls inside it.")
    return _packed(says, found)


def _answer_of_all(caller: Caller, stops: bool) -> list[str]:
    """Tell of the calls that the caller is shown and nobody has told of, the newest last. Each says
    which it was, because the model does not hear it beside its command. What does not fit is told
    the next time."""
    session = caller.session
    fresh = [report for report in _fresh(caller) if report.call_id not in session.told_of_all]
    worth = [report for report in fresh if any(_sentences(report))]
    now, later = worth[-SENTENCES_MAX:], {report.call_id for report in worth[:-SENTENCES_MAX]}
    says = [_with_command(report) for report in now]
    if later:
        says.append(f"And {len(later)} more, which `agentcg history` lists.")
    told = {report.call_id for report in fresh if report.call_id not in later}
    session.told_of_all = _kept(session, session.told_of_all | told)
    session.stops_delayed = session.stops_delayed + 1 if stops and says else 0
    return _packed(says, now)


def _with_command(report: pb.Report) -> str:
    what = report.command or report.name
    what = what if len(what) <= COMMAND_CHARS else what[:COMMAND_CHARS] + "..."
    return f"`{what}`: {' '.join(_sentences(report))}"


def _packed(says: Sequence[str], reports: Sequence[pb.Report]) -> list[str]:
    """The words of an answer: what is to be said first, then as many calls as a hook reads."""
    words = ["OK", *(f"say={_cut(' '.join(text.split()))}" for text in says)]
    left = ANSWER_BYTES_MAX - len(packet(words))
    for report in reports:
        verdict = pb.Verdict.Name(report.verdict).removeprefix("VERDICT_").lower()
        more = [f"call={report.call_id}", f"verdict={verdict}"]
        left -= len(packet(more))
        if left < 0:
            break
        words += more
    return words


def _cut(text: str) -> str:
    """A text of at most SENTENCE_BYTES_MAX, cut between two characters."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= SENTENCE_BYTES_MAX:
        return text
    return raw[: SENTENCE_BYTES_MAX - 3].decode("utf-8", "ignore") + "..."


def _fresh(caller: Caller) -> list[pb.Report]:
    """The reports that the caller is shown and no hook has told of after their tool."""
    return [
        report
        for report in caller.session.reports
        if report.call_id not in caller.session.told and caller.sees_report(report)
    ]


def _reports(caller: Caller, tool_use_id: str, command: str) -> list[pb.Report]:
    """The reports of a tool call, the innermost last; none that has been told before."""
    session, fresh = caller.session, _fresh(caller)
    found = [report for report in fresh if tool_use_id and report.tool_use_id == tool_use_id]
    if not found and command:
        found = _by_command(fresh, command)
    ids = {report.call_id for report in found}
    found += [r for r in fresh if r.in_call_id in ids and r.call_id not in ids]
    if found:
        session.told = _kept(session, session.told | {report.call_id for report in found})
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


def _kept(session: Session, told: set[str]) -> set[str]:
    """Give the ids of calls whose reports are still kept, of those that were told."""
    return told & {report.call_id for report in session.reports}


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
