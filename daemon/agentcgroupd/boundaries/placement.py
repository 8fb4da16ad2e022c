"""Processes of calls that were seen to begin, on their way into a leaf of their own; and the report
of those that ended before they came there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.boundaries.processes import Key, Sighting, Sightings
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import AgentcgroupdError, FailedPrecondition, KnobError, RequestError
from agentcgroupd.host.proc import cgroup_of
from agentcgroupd.host.syscalls import pidfd_alive
from agentcgroupd.intents.request import observed_request
from agentcgroupd.state.session import AGENT_LEAF, Process

log = logging.getLogger(__name__)


class Placement:
    """Gives each sighting its call, and moves its processes there."""

    def __init__(
        self,
        sightings: Sightings,
        calls: Calls,
        actions: Actions,
        read_on: Callable[[], None],
    ) -> None:
        """`read_on`: take in the events that are there; asked for after each move."""
        self._sightings = sightings
        self._calls = calls
        self._actions = actions
        self._read_on = read_on

    def begin(self, sighting: Sighting) -> None:
        """An exec that a rule names."""
        self.follow(sighting, sighting.main)

    def follow(self, sighting: Sighting, key: Key) -> None:
        """A process of this call in the agent leaf: the first, or a child that was forked before
        its parent was moved."""
        self._sightings.join(sighting, key)
        self._place(sighting, key)

    def _place(self, sighting: Sighting, key: Key) -> None:
        """Move a process into the sighting's call, unless it has ended or is there already, or has
        gone to a call of its own. One that has ended has its exit event on the way."""
        process = Process.find(*key)
        if process is None:
            return
        leaf = f"{sighting.session.cgroup_path}/{AGENT_LEAF}"
        try:
            path = cgroup_of(key[0])
            if path == leaf or path.startswith(f"{leaf}/"):
                self._enter(sighting, process)
            elif key == sighting.main:
                sighting.declared = True
        except (FileNotFoundError, ProcessLookupError):
            log.debug("process %d has ended", key[0])
        finally:
            process.close()

    def _enter(self, sighting: Sighting, process: Process) -> None:
        call = sighting.call
        if call is None or call.id not in self._calls.open:
            if sighting.refused:
                return
            age_usec = (time.monotonic_ns() - sighting.at_ns) // 1000
            try:
                request = observed_request(sighting.name, sighting.argv)
                call = self._calls.begin(sighting.session, request, None, age_usec)
            except RequestError as error:
                self._refused(sighting, error)
                return
            sighting.call = call
        try:
            if (process.pid, process.start_ticks) == sighting.main:
                self._calls.attach(call, process)
                self._actions.moved(call, time.monotonic_ns() - sighting.at_ns)
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

    def _refused(self, sighting: Sighting, error: RequestError) -> None:
        """It runs on in the agent leaf; said once, and tried again when there may be room."""
        sighting.refused = error.sentence
        self._actions.tell(sighting.session, "", pb.Feedback(
            code=pb.FEEDBACK_CODE_NOT_IN_CALL,
            sentence=f"{sighting.name!r} runs without a call of its own: {error.sentence}",
        ))  # fmt: skip

    def try_again(self, refused: set[Sighting]) -> None:
        """There may be room for those that found none."""
        for sighting in sorted(refused, key=lambda s: s.at_ns):
            sighting.refused = ""
            for key in sorted(sighting.members, key=lambda k: k != sighting.main):
                try:
                    self._place(sighting, key)
                except (AgentcgroupdError, OSError) as error:
                    log.warning("process %d: %s", key[0], error)
            if sighting.refused:
                return

    def over(self, sighting: Sighting) -> None:
        """The last process that was seen has ended."""
        call, event = sighting.call, sighting.exit
        if call is not None:
            self._calls.look(call)
            return
        if sighting.declared:
            return
        cpu = {"user_usec": 0, "system_usec": 0, "usage_usec": 0}
        ended_ns = time.monotonic_ns()
        if event is not None:
            cpu = {"user_usec": event.user_ns // 1000, "system_usec": event.system_ns // 1000}
            cpu["usage_usec"] = cpu["user_usec"] + cpu["system_usec"]
            ended_ns = event.event.at_ns
        self._calls.record_short(
            sighting.session, sighting.name, sighting.argv,
            max(0, ended_ns - sighting.at_ns) // 1000, event.wait_status if event else None, cpu,
            sighting.refused,
        )  # fmt: skip
