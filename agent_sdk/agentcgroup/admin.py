"""The operator's client: sessions of the whole pool. Needs root outside every session."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from agentcgroup import paths, queries
from agentcgroup.channel import Client, Connection
from agentcgroup.intent import Limit, spec_message
from agentcgroup.queries import Query
from agentcgroup.types import (
    CallInfo,
    Event,
    Explanation,
    PastSession,
    PolicyState,
    PoolInfo,
    Report,
    SessionEnd,
    SessionInfo,
    Story,
    Usages,
)
from agentcgroup.v1 import agentcgroup_pb2 as pb

if TYPE_CHECKING:
    import grpc

    from agentcgroup.streams import Stream
    from agentcgroup.v1.agentcgroup_pb2_grpc import AdminStub


def _stub(channel: grpc.Channel) -> AdminStub:
    from agentcgroup.v1.agentcgroup_pb2_grpc import AdminStub

    return AdminStub(channel)


class Admin(Client["AdminStub"]):
    """A connection to the daemon's admin socket, made when first needed.

    Limits of a session are text or numbers, as in an intent: memory_low, memory_high, memory_max
    (bytes), cpu_weight, cpu_max (cores), io_weight, io_latency (seconds), pids_max, priority,
    calls_max; gpu, gpu_memory, gpu_priority, gpu_device: for the agent itself; exec_is_call: "yes"
    or "no". labels: at most 16, text by text, which stay as they are: what `usage` adds up by.
    """

    def __init__(self, run_dir: str | None = None) -> None:
        self.run_dir = os.path.abspath(run_dir or paths.run_dir())
        target = f"unix:{paths.admin_socket(self.run_dir)}"
        super().__init__(Connection(target, _stub, paths.admin_attach_socket(self.run_dir)))

    def pool(self) -> PoolInfo:
        """Return the state of the pool as a whole."""
        return self._ask(Query("GetPool", pb.GetPoolRequest(), PoolInfo.from_proto))

    def sessions(self) -> list[SessionInfo]:
        """Return all open sessions."""
        return self._ask(queries.sessions())

    def open_session(
        self, session_id: str, *, end_with_caller: bool = False, **limits: Limit
    ) -> SessionInfo:
        """Open a session. `end_with_caller`: it ends with this process, however that comes to its
        end.

        Raises:
            AlreadyExists: there is one of that name.
            InvalidIntent: a limit makes no sense.
        """
        spec = spec_message(session_id, limits)
        request = pb.OpenSessionRequest(spec=spec, end_with_caller=end_with_caller)
        return self._ask(Query("OpenSession", request, SessionInfo.from_proto))

    def update_session(self, session_id: str, **limits: Limit) -> SessionInfo:
        """Change limits of an open session; what is not named stays. "none" takes a limit away:
        memory_low, memory_high, memory_max, cpu_max.

        Raises:
            InvalidIntent: a limit makes no sense, or is below what the session holds.
            NotFound: no session of that name is open.
        """
        request = pb.UpdateSessionRequest(spec=spec_message(session_id, limits))
        # The kernel may have to reclaim what is above a new limit first.
        return self._ask(Query("UpdateSession", request, SessionInfo.from_proto, timeout=60.0))

    def adopt_session(self, session_id: str, cgroup_path: str, **limits: Limit) -> SessionInfo:
        """Make a session of an existing cgroup; `cgroup_path` is below the cgroup2 mount."""
        spec = spec_message(session_id, limits)
        request = pb.AdoptSessionRequest(cgroup_path=cgroup_path, spec=spec)
        return self._ask(Query("AdoptSession", request, SessionInfo.from_proto))

    def close_session(self, session_id: str) -> int:
        """End a session with all its processes; an adopted cgroup is given back.

        Returns the number of calls that were ended with it.
        """
        return self.end_session(session_id).calls_ended

    def end_session(self, session_id: str) -> SessionEnd:
        """Do what `close_session` does, and return what was found out about the session's end."""
        request = pb.CloseSessionRequest(session_id=session_id)
        return self._ask(Query("CloseSession", request, SessionEnd.from_proto))

    def calls(self, session_id: str = "") -> list[CallInfo]:
        """Return the open calls of one session, or of all."""
        return self._ask(queries.calls(session_id))

    def end_call(self, call_id: str, *, detach: bool = False) -> Report:
        """End a call of any session; with `detach`, leave its processes alone."""
        return self._ask(queries.end_call(call_id, detach))

    def pause_call(self, call_id: str, why: str = "") -> CallInfo:
        """Hold an open call paused, whatever the policy does, until `resume_call` or the daemon's
        end. `why`: told to its agent.

        Raises:
            CallNotFound: it is not open.
            Refused: it is ending.
        """
        request = pb.PauseCallRequest(call_id=call_id, why=why)
        return self._ask(Query("PauseCall", request, CallInfo.from_proto))

    def resume_call(self, call_id: str) -> CallInfo:
        """Let a paused call go on; one that the policy paused as well, until it decides so anew.

        Raises:
            CallNotFound: it is not open.
            Refused: it is not paused, or only with a call that it is in.
        """
        request = pb.ResumeCallRequest(call_id=call_id)
        return self._ask(Query("ResumeCall", request, CallInfo.from_proto))

    def report(self, call_id: str | None = None) -> Report:
        """Return the report of an ended call, or the newest one."""
        return self._ask(queries.report(call_id))

    def reports(self, limit: int = 20, session_id: str = "") -> list[Report]:
        """Return the newest reports, newest first, of one session or of all."""
        return self._ask(queries.reports(limit, session_id))

    def history(
        self,
        session_id: str = "",
        *,
        verdicts: Iterable[str] = (),
        since: float | str = 0,
        limit: int = 20,
    ) -> list[Report]:
        """Return reports from the store, newest first, of closed sessions as well.

        Args:
            session_id: only of sessions of this name; empty: of all.
            verdicts: only these, e.g. Verdict.TIMEOUT; empty: all.
            since: only calls that ended then or later: seconds since 1970, or text such as
                "2h", for so long ago, or "2026-01-31T12:00".
            limit: at most so many.
        """
        return self._ask(queries.history(session_id, verdicts, since, limit))

    def past_sessions(
        self, session_id: str = "", *, since: float | str = 0, limit: int = 20
    ) -> list[PastSession]:
        """Return sessions from the store, open and closed, the one opened last first."""
        return self._ask(queries.past_sessions(session_id, since, limit))

    def usage(
        self, by: str = "session", *, session_id: str = "", since: float | str = 0, limit: int = 20
    ) -> list[Usages]:
        """Return sums over ended calls, those whose reports are gone among them.

        Args:
            by: session, tool, day or label; days come newest first, the others by their use of
                CPU. A session counts for each label that it has.
            session_id: only of sessions of this name; empty: of all.
            since: from the day of this time on: seconds since 1970, or text as for `history`.
            limit: at most so many, and not more than 500.
        """
        return self._ask(queries.usage(by, session_id, since, limit))

    def story(self, call_id: str) -> Story:
        """Return what happened to a call of any session, in order.

        Raises:
            CallNotFound: nothing is known of it.
        """
        return self._ask(queries.story(call_id))

    def policy(self) -> PolicyState:
        """Return the policy in force, and how its rulesets stand."""
        return self._ask(Query("GetPolicy", pb.GetPolicyRequest(), PolicyState.from_proto))

    def reload_policy(self) -> PolicyState:
        """Have the policy's files read anew.

        Raises:
            Refused: they cannot be used; the policy before stays in force.
        """
        return self._ask(Query("ReloadPolicy", pb.ReloadPolicyRequest(), PolicyState.from_proto))

    def explain_call(self, call_id: str) -> Explanation:
        """Say how the policy sees an open call, what it did to it, and what it would do next."""
        request = pb.ExplainCallRequest(call_id=call_id)
        return self._ask(Query("ExplainCall", request, Explanation.from_proto))

    def events(self, session_id: str = "") -> Stream[Event]:
        """Watch what happens, in one session or all: an iterator without end."""
        from agentcgroup.streams import Stream

        self.pool()
        request = pb.WatchEventsRequest(session_id=session_id)
        return Stream(
            lambda: self.connection.stub.WatchEvents(request, wait_for_ready=True),
            Event.from_proto,
        )
