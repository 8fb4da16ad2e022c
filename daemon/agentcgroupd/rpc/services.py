"""The gRPC services. Each method finds out who calls, checks the request, and asks the part of the
daemon that answers it; what goes in and comes out is in agentcgroup.proto."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from agentcgroupd.enforce import hold
from agentcgroupd.errors import (
    AgentcgroupdError,
    ConfigError,
    FailedPrecondition,
    NotFound,
)
from agentcgroupd.history.read import ALL
from agentcgroupd.rpc.agent_calls import end_command, refuse_unknown
from agentcgroupd.rpc.callers import Caller
from agentcgroupd.rpc.messages import Asking
from agentcgroupd.rpc.pages import PAGE_BYTES, list_reports
from agentcgroupd.rpc.past import scope_of
from agentcgroupd.rpc.peers import check_operator
from agentcgroupd.rpc.relay import Relay
from agentcgroupd.rpc.service import Context, Parts, Service, answers
from agentcgroupd.sessions.lifecycle import CLOSED, DONE
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.session import Call, Session
from agentcgroupd.telemetry.wire import call_to_proto

log = logging.getLogger(__name__)

OPERATOR = "operator"
"""Whose questions to the store are the operator's."""


class AgentService(Service, pb_grpc.AgentServicer):
    """What an agent may ask, about its own session only."""

    def __init__(self, parts: Parts, relay: Relay) -> None:
        super().__init__(parts, relay)
        self._calls = parts.agent_calls

    def _caller(self, by: Asking) -> Caller:
        return self._calls.caller(by.peer)

    def _session(self, by: Asking) -> Session:
        return self._caller(by).session

    @answers
    async def GetSession(self, request: pb.GetSessionRequest, by: Asking) -> pb.Session:
        """Describe the session of the caller."""
        return self.parts.lifecycle.describe(self._session(by), admin=False)

    @answers
    async def BeginCall(self, request: pb.BeginCallRequest, by: Asking) -> pb.Call:
        """Begin a call in the session of the caller, whose process holds it open; waits where it
        has to wait."""
        call = self._calls.begin(by.peer, request)
        return call if isinstance(call, pb.Call) else await call

    @answers
    async def EndCall(self, request: pb.EndCallRequest, by: Asking) -> pb.Report:
        """End a call of the caller's session; returns its report once it has ended."""
        report = self._calls.end(by.peer, request)
        return report if isinstance(report, pb.Report) else await report

    @answers
    async def UpdateIntent(self, request: pb.UpdateIntentRequest, by: Asking) -> pb.Call:
        """Change the grant of an open call of the caller's session; returns the call."""
        return self._calls.update(by.peer, request)

    @answers
    async def ListCalls(self, request: pb.ListCallsRequest, by: Asking) -> pb.ListCallsResponse:
        """List the open and waiting calls of the caller's session; for a tool, those that it is
        in and those inside."""
        caller = self._caller(by)
        _check_own(request.session_id, caller)
        slices = self.slices(by)
        return await self.parts.views.list_calls(
            [caller.session],
            request,
            False,
            slices,
            caller.sees if caller.is_tool else None,
        )

    @answers
    async def GetBudget(self, request: pb.GetBudgetRequest, by: Asking) -> pb.Budget:
        """Say what is left for the session of the caller, or for the call that it is in."""
        caller = self._caller(by)
        return self.parts.views.budget(caller.session, caller.outer)

    @answers
    async def GetReport(self, request: pb.GetReportRequest, by: Asking) -> pb.Report:
        """Find the report of an ended call of the caller's session; without an id, the newest."""
        caller = self._caller(by)
        try:
            return _report(caller.session, request.call_id, caller.sees_report)
        except NotFound as missing:
            past, asker = self.parts.past, caller.session.turns_key
            return await past.report_or(missing, scope_of(caller), asker, request.call_id)

    @answers
    async def ListReports(
        self, request: pb.ListReportsRequest, by: Asking
    ) -> pb.ListReportsResponse:
        """List the newest reports of the caller's session."""
        caller = self._caller(by)
        _check_own(request.session_id, caller)
        slices = self.slices(by)
        return await list_reports([caller.session], request, slices, caller.sees_report)

    @answers
    async def ListHistory(
        self, request: pb.ListHistoryRequest, by: Asking
    ) -> pb.ListHistoryResponse:
        """List reports of the caller's session from the store, newest first."""
        caller = self._caller(by)
        _check_own(request.session_id, caller)
        asker = caller.session.turns_key
        return await self.parts.past.list_history(scope_of(caller), asker, request)

    @answers
    async def GetStory(self, request: pb.GetStoryRequest, by: Asking) -> pb.Story:
        """Tell what happened to a call of the caller's session."""
        caller = self._caller(by)
        asker = caller.session.turns_key
        past = self.parts.past
        return await past.story(scope_of(caller), asker, request.call_id, caller.sees)

    async def WatchFeedback(
        self, request: pb.WatchFeedbackRequest, context: Context
    ) -> AsyncIterator[pb.Feedback]:
        """Send what the caller's session is told from now on, of one call or of all, until the
        session is closed."""
        try:
            refuse_unknown(request)
            caller = self._caller(self.relay.connection(context.peer()))
        except AgentcgroupdError as error:
            await self.refuse("WatchFeedback", error, context)
            return
        listener = self.parts.notices.feed.join(caller.session.id, request.call_id)
        try:
            # Headers now: the caller knows from them that nothing after this is missed.
            await context.send_initial_metadata(())
            async for event in listener:
                if caller.sees_feedback(event.feedback.call_id):
                    yield event.feedback
        except AgentcgroupdError as error:
            await self.refuse("WatchFeedback", error, context)
        finally:
            self.parts.notices.feed.leave(listener)


def _report(
    session: Session, call_id: str, sees: Callable[[pb.Report], bool] = lambda _: True
) -> pb.Report:
    named = call_id or None
    for report in reversed(session.reports):
        if named in (None, report.call_id) and sees(report):
            return report
    if call_id in session.calls:
        raise FailedPrecondition(f"call {call_id} has not ended; its report is made when it does")
    what = f"of a call {call_id[:64]!r}" if call_id else "yet: no call of this session has ended"
    raise NotFound(f"there is no report {what}", "call_id", call_id)


def _check_own(session_id: str, caller: Caller) -> None:
    """Refuse an agent that asks for another session than its own. Raises NotFound."""
    if session_id not in ("", caller.session.id):
        raise NotFound("an agent sees its own session only", "session_id", session_id)


class AdminService(Service, pb_grpc.AdminServicer):
    """What the operator may ask."""

    def _check(self, by: Asking) -> None:
        check_operator(by.peer, self.parts.sessions.of_cgroup)

    def _sessions(self, session_id: str) -> list[Session]:
        sessions = self.parts.sessions
        return [sessions.get(session_id)] if session_id else list(sessions.open.values())

    def _describe(self, session: Session) -> pb.Session:
        return self.parts.lifecycle.describe(session, admin=True)

    def _open_call(self, call_id: str) -> Call:
        call = self.parts.calls.open.get(call_id)
        if call is None:
            raise NotFound(f"no call {call_id[:64]!r} is open", "call_id", call_id)
        return call

    @answers
    async def GetPool(self, request: pb.GetPoolRequest, by: Asking) -> pb.Pool:
        """Describe the pool."""
        self._check(by)
        return self.parts.views.describe_pool()

    @answers
    async def OpenSession(self, request: pb.OpenSessionRequest, by: Asking) -> pb.Session:
        """Make a session; returns its description."""
        self._check(by)
        owner = by.peer.process if request.end_with_caller else None
        return self._describe(self.parts.lifecycle.open(request.spec, owner))

    @answers
    async def UpdateSession(self, request: pb.UpdateSessionRequest, by: Asking) -> pb.Session:
        """Change limits of an open session; returns its description."""
        self._check(by)
        session = self.parts.sessions.get(request.spec.id)
        return self._describe(await self.parts.lifecycle.change(session, request.spec))

    @answers
    async def AdoptSession(self, request: pb.AdoptSessionRequest, by: Asking) -> pb.Session:
        """Make a session of an existing cgroup; returns its description."""
        self._check(by)
        return self._describe(self.parts.lifecycle.adopt(request.cgroup_path, request.spec))

    @answers
    async def CloseSession(
        self, request: pb.CloseSessionRequest, by: Asking
    ) -> pb.CloseSessionResponse:
        """End a session and all of its calls; returns how many were open."""
        self._check(by)
        session = self.parts.sessions.get(request.session_id)
        is_owner = session.owner is not None and session.owner.is_same(by.peer.process)
        closed = await self.parts.lifecycle.close(session, DONE if is_owner else CLOSED)
        return pb.CloseSessionResponse(
            calls_ended=closed.calls_ended,
            agent_oom_kills=closed.agent_kills,
            agent_sentence=closed.sentence,
        )

    @answers
    async def ListSessions(
        self, request: pb.ListSessionsRequest, by: Asking
    ) -> pb.ListSessionsResponse:
        """Describe all open sessions."""
        self._check(by)
        return await self.parts.views.list_sessions(request, self.slices(by))

    @answers
    async def ListCalls(self, request: pb.ListCallsRequest, by: Asking) -> pb.ListCallsResponse:
        """List open and waiting calls, of one session or of all."""
        self._check(by)
        sessions = self._sessions(request.session_id)
        return await self.parts.views.list_calls(sessions, request, True, self.slices(by))

    @answers
    async def EndCall(self, request: pb.EndCallRequest, by: Asking) -> pb.Report:
        """End any call; returns its report once it has ended."""
        self._check(by)
        why = "the operator ended the call"
        waited = self.parts.queue.leave(request.call_id, why)
        if waited is not None:
            return waited
        call = self._open_call(request.call_id)
        if request.command_only:
            return end_command(self.parts.calls, call, request, Asker.OPERATOR)
        report = self.parts.calls.end(call, request.detach, None, Asker.OPERATOR)
        return report if isinstance(report, pb.Report) else await report

    @answers
    async def PauseCall(self, request: pb.PauseCallRequest, by: Asking) -> pb.Call:
        """Hold an open call paused until the operator lets it go on."""
        self._check(by)
        call = self._open_call(request.call_id)
        hold.hold(self.parts.calls.actions, call, request.why)
        return call_to_proto(call, admin=True)

    @answers
    async def ResumeCall(self, request: pb.ResumeCallRequest, by: Asking) -> pb.Call:
        """Let a paused call go on."""
        self._check(by)
        call = self._open_call(request.call_id)
        hold.resume(self.parts.calls.actions, call)
        return call_to_proto(call, admin=True)

    @answers
    async def GetReport(self, request: pb.GetReportRequest, by: Asking) -> pb.Report:
        """Find the report of an ended call of any session; without an id, the newest."""
        self._check(by)
        if not request.call_id:
            one = pb.ListReportsRequest(limit=1)
            newest = await list_reports(self._sessions(""), one, self.slices(by))
            missing = NotFound("there is no report yet: no call has ended", "call_id", "")
            if newest.reports and not await self.parts.past.is_current():
                return newest.reports[0]
            return await self.parts.past.report_or(missing, ALL, OPERATOR, "")
        for session in self._sessions(""):
            if session.report(request.call_id) or request.call_id in session.calls:
                return _report(session, request.call_id)
        sentence = f"there is no report of a call {request.call_id[:64]!r}"
        missing = NotFound(sentence, "call_id", request.call_id)
        return await self.parts.past.report_or(missing, ALL, OPERATOR, request.call_id)

    @answers
    async def ListReports(
        self, request: pb.ListReportsRequest, by: Asking
    ) -> pb.ListReportsResponse:
        """List the newest reports of one session or of all; where there is a store, of closed ones
        as well."""
        self._check(by)
        is_open = request.session_id in self.parts.sessions.open
        if not is_open and await self.parts.past.knows_more(request.session_id):
            return await self._list_past(request)
        sessions = self._sessions(request.session_id)
        return await list_reports(sessions, request, self.slices(by))

    async def _list_past(self, request: pb.ListReportsRequest) -> pb.ListReportsResponse:
        """Answer ListReports from the store."""
        asked = pb.ListHistoryRequest(
            session_id=request.session_id, limit=request.limit, page_token=request.page_token
        )
        found = await self.parts.past.list_history(ALL, OPERATOR, asked, PAGE_BYTES)
        if request.session_id and not found.reports:
            self.parts.sessions.get(request.session_id)
        return pb.ListReportsResponse(reports=found.reports, next_page_token=found.next_page_token)

    @answers
    async def ListHistory(
        self, request: pb.ListHistoryRequest, by: Asking
    ) -> pb.ListHistoryResponse:
        """List reports from the store, newest first."""
        self._check(by)
        return await self.parts.past.list_history(ALL, OPERATOR, request)

    @answers
    async def ListPastSessions(
        self, request: pb.ListPastSessionsRequest, by: Asking
    ) -> pb.ListPastSessionsResponse:
        """List sessions from the store, the one opened last first."""
        self._check(by)
        return await self.parts.past.list_sessions(OPERATOR, request)

    @answers
    async def ListUsage(self, request: pb.ListUsageRequest, by: Asking) -> pb.ListUsageResponse:
        """Sum up ended calls by session, tool or day."""
        self._check(by)
        return await self.parts.past.list_usage(OPERATOR, request)

    @answers
    async def GetStory(self, request: pb.GetStoryRequest, by: Asking) -> pb.Story:
        """Tell what happened to a call of any session."""
        self._check(by)
        return await self.parts.past.story(ALL, OPERATOR, request.call_id, lambda _: True)

    @answers
    async def GetPolicy(self, request: pb.GetPolicyRequest, by: Asking) -> pb.PolicyState:
        """Describe the policy in force."""
        self._check(by)
        return self.parts.views.describe_policy()

    @answers
    async def ReloadPolicy(self, request: pb.ReloadPolicyRequest, by: Asking) -> pb.PolicyState:
        """Read the policy's files anew; returns the policy in force then."""
        self._check(by)
        try:
            self.parts.policy_files.reload()
        except ConfigError as error:
            raise FailedPrecondition(str(error), "policy") from None
        return self.parts.views.describe_policy()

    @answers
    async def ExplainCall(self, request: pb.ExplainCallRequest, by: Asking) -> pb.Explanation:
        """Say how the policy sees an open call, and what was done to it."""
        self._check(by)
        return self.parts.views.explain(self._open_call(request.call_id))

    async def WatchEvents(
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.Event]:
        """Send the events of one session or of all from now on, until the session is closed."""
        try:
            refuse_unknown(request)
            self._check(self.relay.connection(context.peer()))
            if request.session_id:
                self.parts.sessions.get(request.session_id)
        except AgentcgroupdError as error:
            await self.refuse("WatchEvents", error, context)
            return
        listener = self.parts.notices.feed.join(request.session_id)
        try:
            await context.send_initial_metadata(())
            async for event in listener:
                yield event
        except AgentcgroupdError as error:
            await self.refuse("WatchEvents", error, context)
        finally:
            self.parts.notices.feed.leave(listener)
