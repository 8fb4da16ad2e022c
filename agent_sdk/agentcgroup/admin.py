"""The operator's client: sessions of the whole pool. Needs root outside every session."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agentcgroup import flow, paths
from agentcgroup.channel import Connection
from agentcgroup.intent import Quantity, spec_message
from agentcgroup.streams import Stream
from agentcgroup.types import (
    CallInfo,
    Event,
    Explanation,
    PolicyState,
    PoolInfo,
    Report,
    SessionInfo,
)
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1.agentcgroup_pb2_grpc import AdminStub

if TYPE_CHECKING:
    from typing_extensions import Self


class Admin:
    """A connection to the daemon's admin socket, made when first needed.

    Limits of a session are text or numbers, as in an intent: memory_low, memory_high, memory_max
    (bytes), cpu_weight, cpu_max (cores), pids_max, priority, calls_max; gpu, gpu_memory,
    gpu_priority, gpu_device: for the agent itself.
    """

    def __init__(self, run_dir: str | None = None) -> None:
        self.run_dir = os.path.abspath(run_dir or paths.run_dir())
        self.connection = Connection(f"unix:{paths.admin_socket(self.run_dir)}", AdminStub)

    def close(self) -> None:
        """Close the connection; a later use opens a new one."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def pool(self) -> PoolInfo:
        """The pool as a whole."""
        return PoolInfo.from_proto(self._ask("GetPool", pb.GetPoolRequest()))

    def sessions(self) -> list[SessionInfo]:
        """All open sessions."""
        reply = self._ask("ListSessions", pb.ListSessionsRequest())
        return [SessionInfo.from_proto(session) for session in reply.sessions]

    def open_session(self, session_id: str, **limits: Quantity | None) -> SessionInfo:
        """Open a session.

        Raises:
            AlreadyExists: there is one of that name.
            InvalidIntent: a limit makes no sense.
        """
        request = pb.OpenSessionRequest(spec=spec_message(session_id, limits))
        return SessionInfo.from_proto(self._ask("OpenSession", request))

    def adopt_session(
        self, session_id: str, cgroup_path: str, **limits: Quantity | None
    ) -> SessionInfo:
        """Make a session of an existing cgroup; `cgroup_path` is below the cgroup2 mount."""
        spec = spec_message(session_id, limits)
        request = pb.AdoptSessionRequest(cgroup_path=cgroup_path, spec=spec)
        return SessionInfo.from_proto(self._ask("AdoptSession", request))

    def close_session(self, session_id: str) -> int:
        """End a session with all its processes; an adopted one is given back. Returns the number of
        calls that were ended with it."""
        reply = self._ask("CloseSession", pb.CloseSessionRequest(session_id=session_id))
        return int(reply.calls_ended)

    def calls(self, session_id: str = "") -> list[CallInfo]:
        """Open calls, of one session or of all."""
        reply = self._ask("ListCalls", pb.ListCallsRequest(session_id=session_id))
        return [CallInfo.from_proto(call) for call in reply.calls]

    def end_call(self, call_id: str, *, detach: bool = False) -> Report:
        """End a call of any session; with `detach`, leave its processes alone."""
        request = pb.EndCallRequest(call_id=call_id, detach=detach)
        return Report.from_proto(self._ask("EndCall", request))

    def report(self, call_id: str | None = None) -> Report:
        """The report of an ended call, or the newest one."""
        return Report.from_proto(self._ask("GetReport", pb.GetReportRequest(call_id=call_id or "")))

    def reports(self, limit: int = 20, session_id: str = "") -> list[Report]:
        """The newest reports, newest first, of one session or of all."""
        request = pb.ListReportsRequest(session_id=session_id, limit=limit)
        return [Report.from_proto(report) for report in self._ask("ListReports", request).reports]

    def policy(self) -> PolicyState:
        """The policy in force, and how its rulesets stand."""
        return PolicyState.from_proto(self._ask("GetPolicy", pb.GetPolicyRequest()))

    def reload_policy(self) -> PolicyState:
        """Have the policy's files read anew.

        Raises:
            Refused: they cannot be used; the policy before stays in force.
        """
        return PolicyState.from_proto(self._ask("ReloadPolicy", pb.ReloadPolicyRequest()))

    def explain_call(self, call_id: str) -> Explanation:
        """How the policy sees an open call, what it did to it, and what it would do next."""
        request = pb.ExplainCallRequest(call_id=call_id)
        return Explanation.from_proto(self._ask("ExplainCall", request))

    def events(self, session_id: str = "") -> Stream[Event]:
        """What happens, in one session or all, as it happens: an iterator without end."""
        self.pool()
        request = pb.WatchEventsRequest(session_id=session_id)
        return Stream(
            lambda: self.connection.stub.WatchEvents(request, wait_for_ready=True),
            Event.from_proto,
        )

    def _ask(self, method: str, request: Any) -> Any:
        return self.connection.carry(flow.unary(method, request))
