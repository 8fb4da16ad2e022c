"""What the daemon says of the past: reports, sessions and stories, from the store."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField, NotFound, RequestError
from agentcgroupd.history import read
from agentcgroupd.history.history import History
from agentcgroupd.history.read import ALL, Happened, Place, Scope
from agentcgroupd.history.rows import SessionKey
from agentcgroupd.history.story import story
from agentcgroupd.history.usage import usages
from agentcgroupd.rpc.callers import Caller
from agentcgroupd.rpc.pages import REPORTS_DEFAULT, key_of, token_of
from agentcgroupd.state.session import Call, all_inside, unix_usec
from agentcgroupd.telemetry.wire import call_to_proto

ID_CHARS_MAX = 64


def scope_of(caller: Caller) -> Scope:
    """What a process of a session may see: its session since that was opened; a tool, the calls
    inside its own."""
    session, outer = caller.session, caller.outer
    key = SessionKey(session.id, session.opened_unix_usec)
    if outer is None:
        return Scope(key)
    return Scope(key, (outer.id, *(call.id for call in all_inside(outer))))


class Past:
    """Answers from the store, each within what the caller may see."""

    def __init__(
        self,
        history: History,
        open_call: Callable[[str], Call | None],
        waits: Callable[[str], bool],
    ) -> None:
        """`open_call`: finds an open call by its id. `waits`: whether one is in the queue."""
        self._history, self._open_call, self._waits = history, open_call, waits

    async def is_current(self) -> bool:
        """Tell whether the store has all that has ended."""
        return await self._history.is_current()

    async def knows_more(self, session_id: str) -> bool:
        """Tell whether the store has reports that are not in memory, and none is missing there:
        of all sessions, or of one that is not open."""
        return await (self._history.is_kept() if session_id else self._history.is_current())

    async def list_history(
        self,
        scope: Scope,
        asker: str,
        request: pb.ListHistoryRequest,
        page_bytes: int = read.PAGE_BYTES,
    ) -> pb.ListHistoryResponse:
        """A page of reports, newest first. Raises RequestError."""
        for verdict in request.verdicts:
            if verdict not in pb.Verdict.values():
                raise InvalidField("verdicts", str(verdict), "numbers of Verdict")
        wanted = read.Wanted(
            request.session_id,
            tuple(set(request.verdicts)),
            request.since_unix_usec,
            request.limit or REPORTS_DEFAULT,
            _place(request.page_token),
            page_bytes,
        )
        query = partial(read.reports, scope=scope, wanted=wanted)
        found, place = await self._history.ask(asker, query)
        return pb.ListHistoryResponse(reports=found, next_page_token=_token(place))

    async def list_sessions(
        self, asker: str, request: pb.ListPastSessionsRequest
    ) -> pb.ListPastSessionsResponse:
        """A page of sessions, the one opened last first. Raises RequestError."""
        query = partial(
            read.sessions,
            name=request.session_id,
            since_usec=request.since_unix_usec,
            limit=request.limit or REPORTS_DEFAULT,
            before=_place(request.page_token),
        )
        found, place = await self._history.ask(asker, query)
        return pb.ListPastSessionsResponse(sessions=found, next_page_token=_token(place))

    async def list_usage(self, asker: str, request: pb.ListUsageRequest) -> pb.ListUsageResponse:
        """Sums by session, tool or day. Raises RequestError."""
        if request.by not in pb.UsageBy.values():
            raise InvalidField("by", str(request.by), "a number of UsageBy")
        query = partial(
            usages,
            by=request.by,
            session=request.session_id,
            since_usec=max(0, request.since_unix_usec),
            limit=request.limit or REPORTS_DEFAULT,
        )
        return pb.ListUsageResponse(usages=await self._history.ask(asker, query))

    async def newest(self, scope: Scope, asker: str, session_id: str = "") -> pb.Report | None:
        """The report of the call that ended last; None: there is none. Raises RequestError."""
        query = partial(read.reports, scope=scope, wanted=read.Wanted(session_id, limit=1))
        found, _ = await self._history.ask(asker, query)
        return found[0] if found else None

    async def report(self, scope: Scope, asker: str, call_id: str) -> pb.Report | None:
        """The report of a call; None: there is none that the caller may see. Raises
        RequestError."""
        if not call_id or len(call_id) > ID_CHARS_MAX:
            return None
        return await self._history.ask(asker, partial(read.report, scope=scope, call=call_id))

    async def story(
        self, scope: Scope, asker: str, call_id: str, sees: Callable[[Call], bool]
    ) -> pb.Story:
        """What happened to a call, open or ended. `sees`: whether the caller may see an open
        one. Raises RequestError."""
        if not call_id or len(call_id) > ID_CHARS_MAX:
            raise InvalidField("call_id", call_id, "the id of a call")
        call = self._open_call(call_id)
        if call is not None and not (_is_of(call, scope) and sees(call)):
            call = None
        query = partial(_gather, scope, call, call_id)
        found = await self._history.ask(asker, query)
        if found is None:
            raise NotFound(f"nothing is known of a call {call_id!r}", "call_id", call_id)
        session_id, report, entries = found
        is_open = report is None and call is not None
        described = call_to_proto(call, admin=False) if is_open and call is not None else None
        told = story(call_id, session_id, described, report, entries)
        if report is None and call is None and self._waits(call_id):
            told.state = pb.CALL_STATE_WAITING
        return told

    async def report_or(
        self, refusal: RequestError, scope: Scope, asker: str, call_id: str
    ) -> pb.Report:
        """The report of a call that is not in memory any more. Raises `refusal` where it is not in
        the store either."""
        if not await self._history.is_kept():
            raise refusal
        found = await (self.report(scope, asker, call_id) if call_id else self.newest(scope, asker))
        if found is None:
            raise refusal
        return found


def _is_of(call: Call, scope: Scope) -> bool:
    session = call.session
    return scope.session in (None, SessionKey(session.id, session.opened_unix_usec))


def _gather(
    scope: Scope, call: Call | None, call_id: str, db: sqlite3.Connection
) -> tuple[str, pb.Report | None, list[Happened]] | None:
    """Read what there is of a call, with the name of its session; None: nothing that the caller
    may see."""
    report = read.report(db, scope, call_id)
    known: pb.Report | Call | None = report if report is not None else call
    key = read.session_of(db, call_id)
    if known is None and not (key is not None and scope in (ALL, Scope(key))):
        return None
    if key is None:
        name = report.session_id if report is not None else call.session.id if call else ""
        return name, report, []
    entries = read.happened(db, key, call_id)
    if scope.roots is None and (known is not None or entries):
        begun = entries[0].at_usec if known is None else known.began_unix_usec - known.waited_usec
        until = unix_usec() if report is None else report.began_unix_usec + report.wall_usec
        entries += read.happened_to_session(db, key, begun, until)
    return key.name, report, entries


def _place(token: str) -> Place:
    """Read the token of a page. Raises InvalidField."""
    key = key_of(token)
    if key is None:
        return read.NO_END, read.NO_END
    usec, seq = key
    if not seq.isdecimal() or len(seq) > 18 or not 0 <= usec < read.NO_END:
        raise InvalidField("page_token", token, "the next_page_token of the page before")
    return usec, int(seq)


def _token(place: Place | None) -> str:
    return "" if place is None else token_of((place[0], str(place[1])))
