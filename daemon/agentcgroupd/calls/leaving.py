"""Main processes that are no longer in their call's cgroup: found, told, watched until their end.

Whoever may write to cgroup.procs can move a process out of its call, as `systemd-run --scope` or a
container's runtime do. The call's limits do not hold there, but its timeout does, by pidfd, and the
call is not over before its main process is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.counters import shown
from agentcgroupd.calls.words import left_words_of
from agentcgroupd.enforce.outside import place_outside
from agentcgroupd.errors import AgentcgroupdError, FailedPrecondition, KnobError
from agentcgroupd.host.syscalls import pidfd_ended
from agentcgroupd.state.ending import Left
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import AGENT_LEAF, Call, unix_usec
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)

MOVES_BACK_MOST = 3
"""How often a main process is moved back into its call: one that leaves again and again is let go,
and told, rather than chased."""
LEFT_MAINS_MOST = 16
"""How many main processes of earlier commands may be outside of a call."""
PLACES_MOST = 8
"""How many places an account keeps, the last ones."""


class Leavers:
    """Follows main processes outside of their calls. On the running loop."""

    def __init__(
        self,
        notices: Notices,
        admit: Callable[[Call, Process], None],
        ended: Callable[[Call], None],
    ) -> None:
        """`admit` moves a process into a call; it may raise KnobError. `ended` is told of a call
        whose main process has ended after its cgroup was found empty."""
        self._notices, self._admit, self._ended = notices, admit, ended
        self._loop = asyncio.get_running_loop()
        self._watched: dict[Call, int] = {}

    def outlives(self, call: Call) -> bool:
        """Tell whether the main process of a call lives outside of it, or has not quite ended; its
        end is told then. A call that was killed is given up if it does not die."""
        main = call.main
        if main is None or call.account.given_up or pidfd_ended(main.pidfd):
            return False
        self.look(call)
        if call not in self._watched:
            # A copy: the call's own descriptor is closed with it, or when another process enters.
            watched = os.dup(main.pidfd)
            self._watched[call] = watched
            self._loop.add_reader(watched, self._main_ended, call)
        return True

    def check_room(self, call: Call) -> None:
        """Refuse another command in a call from which too many main processes of earlier ones have
        left. Raises FailedPrecondition."""
        for process in [p for p in call.left_mains if pidfd_ended(p.pidfd)]:
            call.left_mains.remove(process)
            process.close()
        if len(call.left_mains) >= LEFT_MAINS_MOST:
            pids = ", ".join(str(process.pid) for process in call.left_mains)
            raise FailedPrecondition(
                f"the main processes of {len(call.left_mains)} earlier commands of call {call.id} "
                f"have left it and still run ({pids}); end them, or the call"
            )

    def replaced(self, call: Call) -> None:
        """Let go of the main process of a call that another command has entered. One that lives
        elsewhere is kept, to be ended with the call."""
        self.drop(call)
        main = call.main
        if main is None:
            return
        self.look(call)
        lives_elsewhere = place_outside(call) is not None
        call.main = None
        if lives_elsewhere:
            call.left_mains.append(main)
        else:
            main.close()

    def look(self, call: Call) -> None:
        """Find out where the main process of a call is, and tell if it has left."""
        path, main = place_outside(call), call.main
        if path is None or main is None:
            return
        left, at = call.account.left, shown(path)
        if left and (left[-1].path, left[-1].moved_back) == (at, False):
            return  # told already
        found = Left(main.pid, at, unix_usec(), self._move_back(call, main, path))
        left.append(found)
        del left[:-PLACES_MOST]
        self._tell(call, found)

    def _move_back(self, call: Call, main: Process, path: str) -> bool:
        """Move a main process back that is among the processes of its own agent: nobody else looks
        after it there, and it would run without limits as if it were the agent. Elsewhere, somebody
        else's cgroup was meant, such as a unit of systemd's."""
        leaf = f"{call.session.cgroup_path}/{AGENT_LEAF}"
        in_leaf = path == leaf or path.startswith(f"{leaf}/")
        before = sum(left.moved_back for left in call.account.left)
        if not in_leaf or before >= MOVES_BACK_MOST or call.state == pb.CALL_STATE_ENDING:
            return False
        try:
            self._admit(call, main)
        except (AgentcgroupdError, OSError) as error:
            log.warning("call %s: its main process cannot be moved back: %s", call.id, error)
            return False
        return True

    def _tell(self, call: Call, left: Left) -> None:
        sentence = left_words_of(left, still_there=not left.moved_back)
        call.account.add(
            f"the main process ({left.pid}) was found in {left.path}"
            + (" and moved back" if left.moved_back else ""),
            "/proc/<pid>/cgroup",
            left.at_unix_usec,
        )
        try:
            call.cgroup.set_xattr(call.record())
        except KnobError as error:
            log.debug("call %s: %s", call.id, error)
        self._notices.left_call(call, left.pid, left.path, left.moved_back, sentence)

    def _main_ended(self, call: Call) -> None:
        self.drop(call)
        self._ended(call)

    def drop(self, call: Call) -> None:
        """Stop watching; no error if the call was not watched."""
        watched = self._watched.pop(call, None)
        if watched is not None:
            self._loop.remove_reader(watched)
            os.close(watched)
