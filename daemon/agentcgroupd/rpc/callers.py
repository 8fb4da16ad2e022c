"""What a caller may do to the calls of its session, by where its process stands now.

The agent itself manages its session's calls. A tool stands in a call, and that call is a promise
about it: it may see the session, lower the limits of its own call, and begin, enter and end calls
inside it. It may raise nothing and touch no call beside or around its own. A call that the daemon
only observed is no promise by anyone: its shell is the agent's hand, and may do what the agent may,
but for raising the limits of that call itself.

Every request asks here, whether it came over gRPC or in a packet. Where the process stands is read
from the kernel for each request, because a connection that was made before its process entered a
call gives no right that the process has lost. A request that is served as soon as its connection is
accepted uses what was read on accepting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import NotFound, PermissionDenied
from agentcgroupd.rpc.peers import Peer, session_of
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.session import Call, Session, lies_in

DEPTH_MOST = 16
"""More calls are never in one another."""
ToolsMay = Literal["nest", "manage"]


@dataclass(frozen=True, slots=True)
class Caller:
    """A process of a session, and the innermost call that it is in."""

    session: Session
    call: Call | None
    """None: it is in none, so it is the agent itself."""
    trusted: bool
    """Whether tools may do what agents may (calls.tools_may)."""

    @property
    def is_tool(self) -> bool:
        """Whether it is bound to a call that somebody declared."""
        return self.call is not None and not self.call.observed and not self.trusted

    @property
    def outer(self) -> Call | None:
        """The call that what it begins is to be in; None: in none."""
        return self.call if self.is_tool else None

    def find(self, call_id: str) -> Call:
        """Find an open call of the caller's session. Raises NotFound, the same for one of another
        session."""
        call = self.session.calls.get(call_id)
        if call is None:
            raise NotFound(f"no call {call_id[:64]!r} is open in this session", "call_id", call_id)
        return call

    # What it may do

    def sees(self, call: Call) -> bool:
        """Tell whether it is shown an open call."""
        return not self.is_tool or call is self.call or self._began(call)

    def sees_report(self, report: pb.Report) -> bool:
        """Tell whether it is shown the report of an ended call."""
        if self.outer is None:
            return True
        outer_id = report.parent_call_id
        for _ in range(DEPTH_MOST):
            if not outer_id or outer_id == self.outer.id:
                break
            outer = self.session.calls.get(outer_id)
            if outer is not None:
                return outer is self.outer or lies_in(outer, self.outer)
            above = self.session.report(outer_id)
            outer_id = above.parent_call_id if above is not None else ""
        return outer_id == self.outer.id

    def sees_feedback(self, call_id: str) -> bool:
        """Tell whether it is shown feedback about a call of its session that is open, waits or has
        just ended."""
        if not self.is_tool:
            return True
        call, report = self.session.calls.get(call_id), self.session.report(call_id)
        if call is not None:
            return self.sees(call)
        return bool(call_id) and report is not None and self.sees_report(report)

    def find_to_end(self, call_id: str) -> Call:
        """Find an open call that it wants to end. Raises NotFound or PermissionDenied."""
        call = self.find(call_id)
        if self.is_tool and not self._began(call):
            raise self._refusal("ended", call)
        return call

    def find_to_enter(self, call_id: str) -> Call:
        """Find an open call that it wants to enter. Raises NotFound or PermissionDenied."""
        call = self.find(call_id)
        if self.is_tool and call is not self.call and not self._began(call):
            raise self._refusal("entered", call)
        return call

    def find_to_change(self, call_id: str) -> tuple[Call, bool]:
        """Find an open call whose intent it wants to change, and tell whether it may only lower
        what the call has. Raises NotFound or PermissionDenied."""
        call = self.find(call_id)
        if self.is_tool and call is not self.call and not self._began(call):
            raise self._refusal("changed", call)
        return call, self.is_tool or (call is self.call and not self.trusted)

    def check_queue(self, call_id: str) -> None:
        """Refuse to take a call out of the queue for a tool: no call inside another waits there.
        Raises NotFound, as for a call that is not there."""
        if self.is_tool:
            self.find(call_id)

    def _began(self, call: Call) -> bool:
        """Whether the call was begun inside the caller's own, at whatever depth."""
        return self.call is not None and lies_in(call, self.call)

    def _refusal(self, what: str, call: Call) -> PermissionDenied:
        mine = "" if self.call is None else self.call.id
        allowed = f"a call that was begun in call {mine}"
        own = f"this process is in call {mine}"
        if call is self.call:
            own, why = f"this process is in call {call.id} itself", "its agent decides on that"
        elif self.call is not None and lies_in(self.call, call):
            why = f"which lies in call {call.id}"
        else:
            why = f"and call {call.id} is not inside that"
        sentence = f"call {call.id} may not be {what} from here: {own}, {why}; allowed is {allowed}"
        return PermissionDenied(sentence, "call_id", call.id, allowed)


class Callers:
    """Finds out where callers stand."""

    def __init__(self, sessions: Sessions, tools_may: ToolsMay) -> None:
        self._sessions = sessions
        self._trusted = tools_may == "manage"

    def of(self, peer: Peer) -> Caller:
        """Find the caller's session and call by its cgroup as it is now. Raises
        PermissionDenied."""
        path = peer.cgroup_path()
        session = session_of(path, self._sessions.of_cgroup)
        return Caller(session, self._sessions.call_of(session, path), self._trusted)
