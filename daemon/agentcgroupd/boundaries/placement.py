"""Moving the processes of observed calls into a leaf of their own, and reporting calls that ended
before they came there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.boundaries.processes import Key, KnownProcesses, ObservedCall
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.errors import AgentcgroupdError, FailedPrecondition, KnobError, RequestError
from agentcgroupd.host.proc import cgroup_of
from agentcgroupd.host.syscalls import pidfd_alive
from agentcgroupd.intents.request import observed_request
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import AGENT_LEAF
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)


class Placement:
    """Gives each observed call its cgroup, and moves its processes there."""

    def __init__(
        self,
        known: KnownProcesses,
        calls: Calls,
        notices: Notices,
        read_on: Callable[[], None],
    ) -> None:
        """`read_on`: take in the events that are there; asked for after each move."""
        self._known = known
        self._calls = calls
        self._notices = notices
        self._read_on = read_on

    def begin(self, observed: ObservedCall) -> None:
        """Begin a call for an exec that a rule names."""
        self.follow(observed, observed.main)

    def follow(self, observed: ObservedCall, key: Key) -> None:
        """Take a process of this call out of the agent leaf: the first, or a child that was forked
        before its parent was moved."""
        self._known.join(observed, key)
        self._place(observed, key)

    def _place(self, observed: ObservedCall, key: Key) -> None:
        """Move a process into the observed call, unless it has ended, is there already, or has gone
        to a call of its own. The exit event of one that has ended is on its way."""
        process = Process.find(*key)
        if process is None:
            return
        leaf = f"{observed.session.cgroup_path}/{AGENT_LEAF}"
        try:
            path = cgroup_of(key[0])
            if path == leaf or path.startswith(f"{leaf}/"):
                self._enter(observed, process)
            elif key == observed.main:
                observed.declared = True
        except (FileNotFoundError, ProcessLookupError):
            log.debug("process %d has ended", key[0])
        finally:
            process.close()

    def _enter(self, observed: ObservedCall, process: Process) -> None:
        call = observed.call
        if call is None or call.id not in self._calls.open:
            if observed.refused:
                return
            # The time since the exec counts, but not what was spent waiting for a call.
            waited = observed.was_refused or call is not None
            age_usec = 0 if waited else (time.monotonic_ns() - observed.at_ns) // 1000
            try:
                request = observed_request(observed.name, observed.argv, observed.intent)
                call = self._calls.begin(observed.session, request, None, age_usec)
            except RequestError as error:
                self._refused(observed, error)
                return
            observed.call = call
        try:
            if (process.pid, process.start_ticks) == observed.main:
                self._calls.attach(call, process)
                self._notices.moved(call, time.monotonic_ns() - observed.at_ns)
            else:
                self._calls.admit(call, process)
        except (KnobError, FailedPrecondition):
            if pidfd_alive(process.pidfd):
                raise
            log.debug("process %d ended while it was moved", process.pid)
            # It may have been in the call for a moment: being empty is an end then.
            call.entered = True
        # What it forked before the move is in the buffer now, and is to be seen before anyone
        # finds the call empty.
        self._read_on()

    def _refused(self, observed: ObservedCall, error: RequestError) -> None:
        """Leave its processes in the agent leaf and say so once; another attempt is made when a
        call of the session has ended."""
        observed.refused, observed.was_refused = error.sentence, True
        sentence = f"{observed.name!r} runs without a call of its own: {error.sentence}"
        feedback = pb.Feedback(code=pb.FEEDBACK_CODE_NOT_IN_CALL, sentence=sentence)
        self._notices.tell(observed.session, "", feedback)

    def try_again(self, refused: set[ObservedCall]) -> None:
        """Ask again for calls that were refused, the oldest first, until one is refused again."""
        for observed in sorted(refused, key=lambda o: o.at_ns):
            observed.refused = ""
            for key in sorted(observed.members, key=lambda k: k != observed.main):
                try:
                    self._place(observed, key)
                except (AgentcgroupdError, OSError) as error:
                    log.warning("process %d: %s", key[0], error)
            if observed.refused:
                return

    def over(self, observed: ObservedCall) -> None:
        """Deal with a call whose last known process has ended: end it, or report it if it never
        had a cgroup."""
        call, event = observed.call, observed.exit
        if call is not None:
            self._calls.end_if_empty(call)
            return
        if observed.declared:
            return
        cpu = {"user_usec": 0, "system_usec": 0, "usage_usec": 0}
        ended_ns = time.monotonic_ns()
        if event is not None:
            cpu = {"user_usec": event.user_ns // 1000, "system_usec": event.system_ns // 1000}
            cpu["usage_usec"] = cpu["user_usec"] + cpu["system_usec"]
            ended_ns = event.event.at_ns
        self._calls.record_short(
            observed.session,
            observed.name,
            observed.argv,
            max(0, ended_ns - observed.at_ns) // 1000,
            event.wait_status if event else None,
            cpu,
            observed.refused,
        )
