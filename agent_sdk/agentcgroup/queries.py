"""Questions to the daemon that take one request and one reply, for all three clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from agentcgroup.errors import InvalidIntent
from agentcgroup.flow import RPC_TIMEOUT_S, Flow, Rpc
from agentcgroup.moment import moment_usec
from agentcgroup.types import (
    Budget,
    CallInfo,
    Grant,
    PastSession,
    Report,
    SessionInfo,
    Story,
    Usages,
    Verdict,
)
from agentcgroup.v1 import agentcgroup_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Query(Generic[T]):
    """A request, and how its reply is read.

    method: its name in the protocol. read: makes what the caller gets of the reply's message.
    timeout: seconds for the answer.
    """

    method: str
    request: Message
    read: Callable[[Any], T]
    timeout: float = RPC_TIMEOUT_S

    def flow(self) -> Flow[T]:
        """Ask; the outcome is what `read` makes of the reply."""
        return self.read((yield Rpc(self.method, self.request, self.timeout)))


@dataclass(frozen=True, slots=True)
class Pages(Query[list[T]]):
    """A request for a list that comes in pages, and how the items of one are read.

    most: items wanted at most, where the request has a `limit`; 0: all.
    """

    most: int = 0

    def flow(self) -> Flow[list[T]]:
        """Ask for one page after the other; the outcome is all items."""
        request: Any = type(self.request)()
        request.CopyFrom(self.request)
        items: list[T] = []
        while True:
            reply = yield Rpc(self.method, request)
            items += self.read(reply)
            if not reply.next_page_token or 0 < self.most <= len(items):
                return items
            request.page_token = reply.next_page_token
            if self.most:
                request.limit = self.most - len(items)


def session() -> Query[SessionInfo]:
    """Ask which session the caller is in."""
    return Query("GetSession", pb.GetSessionRequest(), SessionInfo.from_proto)


def budget() -> Query[Budget]:
    """Ask what is left for the caller's session."""
    return Query("GetBudget", pb.GetBudgetRequest(), Budget.from_proto)


def calls(session_id: str = "") -> Pages[CallInfo]:
    """Ask for the open calls; only the operator may name a session."""
    request = pb.ListCallsRequest(session_id=session_id)
    return Pages("ListCalls", request, lambda reply: [*map(CallInfo.from_proto, reply.calls)])


def report(call_id: str | None) -> Query[Report]:
    """Ask for the report of an ended call; None: the newest."""
    return Query("GetReport", pb.GetReportRequest(call_id=call_id or ""), Report.from_proto)


def reports(limit: int, session_id: str = "") -> Pages[Report]:
    """Ask for the newest reports, newest first; only the operator may name a session."""
    request = pb.ListReportsRequest(session_id=session_id, limit=limit)
    return Pages("ListReports", request, _read_reports, most=limit or 20)


def _read_reports(reply: Any) -> list[Report]:
    return [*map(Report.from_proto, reply.reports)]


def _verdict(word: str) -> pb.Verdict.ValueType:
    """Return a verdict's number by its word. Raises InvalidIntent."""
    try:
        return pb.Verdict.Value(f"VERDICT_{word.upper()}")
    except ValueError:
        known = (verdict for verdict in Verdict if verdict is not Verdict.UNSPECIFIED)
        allowed = ", ".join(verdict.value for verdict in known)
        sentence = f"verdicts: {word!r} cannot be used: allowed is {allowed}"
        raise InvalidIntent(sentence, field="verdicts", value=word, allowed=allowed) from None


def history(
    session_id: str, verdicts: Iterable[str], since: float | str, limit: int
) -> Pages[Report]:
    """Ask for reports from the store, newest first; only the operator may name a session. `since`:
    seconds since 1970, or text such as "2h", for so long ago. Raises InvalidIntent."""
    request = pb.ListHistoryRequest(
        session_id=session_id,
        verdicts=[_verdict(word) for word in verdicts],
        since_unix_usec=moment_usec("since", since),
        limit=limit,
    )
    read = Report.from_proto
    return Pages("ListHistory", request, lambda reply: [*map(read, reply.reports)], most=limit)


def past_sessions(session_id: str, since: float | str, limit: int) -> Pages[PastSession]:
    """Ask for sessions from the store, the one opened last first."""
    request = pb.ListPastSessionsRequest(
        session_id=session_id, since_unix_usec=moment_usec("since", since), limit=limit
    )
    return Pages("ListPastSessions", request, _read_past_sessions, most=limit)


def _read_past_sessions(reply: Any) -> list[PastSession]:
    return [*map(PastSession.from_proto, reply.sessions)]


USAGE_BY = ("session", "tool", "day", "label")


def usage(by: str, session_id: str, since: float | str, limit: int) -> Query[list[Usages]]:
    """Ask for sums over ended calls. Raises InvalidIntent."""
    if by not in USAGE_BY:
        allowed = ", ".join(USAGE_BY)
        sentence = f"by: {by!r} cannot be used: allowed is {allowed}"
        raise InvalidIntent(sentence, field="by", value=by, allowed=allowed)
    request = pb.ListUsageRequest(
        by=pb.UsageBy.Value(f"USAGE_BY_{by.upper()}"),
        session_id=session_id,
        since_unix_usec=moment_usec("since", since),
        limit=limit,
    )
    read = Usages.from_proto
    return Query("ListUsage", request, lambda reply: [*map(read, reply.usages)])


def story(call_id: str) -> Query[Story]:
    """Ask what happened to a call."""
    return Query("GetStory", pb.GetStoryRequest(call_id=call_id), Story.from_proto)


def sessions() -> Pages[SessionInfo]:
    """Ask for the open sessions."""
    read = SessionInfo.from_proto
    return Pages("ListSessions", pb.ListSessionsRequest(), lambda r: [*map(read, r.sessions)])


def end_call(call_id: str, detach: bool) -> Query[Report]:
    """Ask for the end of a call; with `detach` its processes are left alone."""
    request = pb.EndCallRequest(call_id=call_id, detach=detach)
    return Query("EndCall", request, Report.from_proto)


def update(request: pb.UpdateIntentRequest) -> Query[Grant]:
    """Ask for another grant for an open call."""
    return Query("UpdateIntent", request, lambda reply: Grant.from_proto(reply.grant))
