"""Tool calls of agents that say nothing: where a call begins is seen from the kernel's side.

A process that was forked in a session's agent leaf and executes what a rule names begins a call: it
is moved into a leaf of its own with everything that it forks, double-forked children and new
sessions (setsid) included. Nested shells stay in the call they are in. A process that was put into
the agent leaf from outside is the agent itself, never a call.

Between the exec and the move a few hundred microseconds pass. What the process forks meanwhile is
known by its fork event and moved after it; a process that has ended by then still gets its report,
from its exit event.

Here events are dealt with in their order. What is known of the processes is in sightings.py, their
way into a leaf in placement.py, and what happens when events were lost in losses.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable

from agentcgroupd.boundaries.placement import Placement
from agentcgroupd.boundaries.processes import TICK_NS, Forked, Sighting, Sightings, key_of
from agentcgroupd.boundaries.resync import Losses
from agentcgroupd.boundaries.rules import argv_of, begins_call, may_begin_call
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.config import BoundariesConfig
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import AgentcgroupdError
from agentcgroupd.host.proc import command_line
from agentcgroupd.intents.command import tool_name
from agentcgroupd.state.session import Call, Session

log = logging.getLogger(__name__)

SLICE_S = 0.005
QUEUE_EVENTS_MAX = 4096
CMDLINE_BYTES_MAX = 65_536


class Boundaries:
    """Turns processes' lives into calls. Runs on the event loop."""

    def __init__(
        self,
        config: BoundariesConfig,
        lifecycle: Lifecycle,
        calls: Calls,
        sessions: Callable[[], Iterable[Session]],
        actions: Actions,
        settled_ticks: int,
    ) -> None:
        """`settled_ticks`: processes that were in an agent leaf at this time (clock ticks since
        boot) and in no call belong to the agent itself, because a daemon was there to see them."""
        self._config = config
        self._lifecycle = lifecycle
        self._calls = calls
        self._sessions = sessions
        self._actions = actions
        self._agents: dict[int, Session] = {}
        self._call_of_cgroup: dict[int, Call] = {}
        self._queue: deque[AnyEvent] = deque()
        self._busy = False
        self._loop = asyncio.get_running_loop()
        self._work_later: asyncio.Handle | None = None
        self._sightings = Sightings()
        self._placement = Placement(self._sightings, calls, actions, self._read_on)
        self._losses = Losses(
            config,
            lifecycle,
            self._sightings,
            self._placement,
            self._watched,
            lambda: self.behind,
            actions,
            settled_ticks,
        )

    @property
    def behind(self) -> bool:
        """Whether events wait to be dealt with."""
        return bool(self._queue)

    def start(self) -> None:
        """Begin with what runs now."""
        self._losses.start()
        self._lifecycle.start(self.handle)
        self._losses.resync()

    # What is watched

    def session_opened(self, session: Session) -> None:
        """Watch its agent leaf. Raises BpfError."""
        self._lifecycle.manage(session.agent.id, abi.CgroupKind.AGENT)
        self._agents[session.agent.id] = session

    def session_closed(self, session: Session) -> None:
        """No more. Raises BpfError."""
        self._agents.pop(session.agent.id, None)
        self._sightings.drop(session)
        self._lifecycle.unmanage(session.agent.id)

    def _watched(self) -> list[Session]:
        return [s for s in self._sessions() if s.agent.id in self._agents and not s.closing]

    def call_opened(self, call: Call) -> None:
        """Watch a call's leaf. Raises BpfError."""
        self._lifecycle.manage(call.cgroup.id, abi.CgroupKind.CALL)
        self._call_of_cgroup[call.cgroup.id] = call

    def call_closed(self, call: Call) -> None:
        """No more. Raises BpfError."""
        self._call_of_cgroup.pop(call.cgroup.id, None)
        self._lifecycle.unmanage(call.cgroup.id)
        refused = self._sightings.refused(call.session)
        if refused and not call.session.closing:
            self._loop.call_soon(self._placement.try_again, refused)

    # Events

    def handle(self, batch: list[AnyEvent]) -> None:
        """Events in the kernel's order. May come again while it runs; what comes then is dealt
        with after what was there before."""
        for event in batch:
            if isinstance(event, abi.ExitEvent):
                self._note_status(event)
        self._queue.extend(batch)
        if not self._busy and self._work_later is None:
            self._work()

    def _work(self) -> None:
        """Deal with events for a while, then let the loop's other users have their turn; the ring
        buffer keeps what comes meanwhile."""
        self._work_later = None
        self._busy = True
        deadline = self._loop.time() + SLICE_S
        try:
            while self._queue and self._loop.time() < deadline:
                self._one(self._queue.popleft())
            if not self._queue:
                self._losses.look()
        finally:
            self._busy = False
        self._lifecycle.read(not self._queue)
        if self._queue:
            self._work_later = self._loop.call_soon(self._work)
            return
        self._calls.look_postponed()
        self._losses.check_soon()

    def catch_up(self) -> None:
        """Read what has not been worth a wake-up: statuses at once, the rest in its turn, because
        whoever asks is in the middle of ending a call."""
        before, self._busy = self._busy, True
        try:
            self._lifecycle.drain()
        finally:
            self._busy = before
        if self._queue and not self._busy and self._work_later is None:
            self._work_later = self._loop.call_soon(self._work)

    def prune(self) -> None:
        """Now and then: give up processes whose end nobody will tell."""
        self._losses.prune()

    def _read_on(self) -> None:
        """Take in what is there, unless so much waits that it is better left in the buffer."""
        if len(self._queue) < QUEUE_EVENTS_MAX:
            self._lifecycle.drain()

    def _one(self, event: AnyEvent) -> None:
        try:
            match event:
                case abi.ForkEvent():
                    self._fork(event)
                case abi.ExecEvent():
                    self._exec(event)
                case abi.ExitEvent():
                    self._exit(event)
                case abi.OomEvent():
                    self._oom(event)
        except (AgentcgroupdError, OSError) as error:
            # One process that cannot be dealt with must not take the others with it.
            log.warning("%s: %s", type(event).__name__, error)

    def _note_status(self, event: abi.ExitEvent) -> None:
        """At once: the end of its call may be dealt with before this event's turn."""
        call = self._call_of_cgroup.get(event.event.cgroup_id)
        if call is not None and call.main is not None:
            if (call.main.pid, call.main.start_ticks) == key_of(event.process):
                call.exit_status = event.wait_status

    def _fork(self, event: abi.ForkEvent) -> None:
        session = self._agents.get(event.event.cgroup_id)
        if session is None or not event.child.pid:
            return
        child = key_of(event.child)
        if self._sightings.settled(child):
            return  # a resync was there first
        parent = event.child.parent_pid, event.parent_start_ns // TICK_NS
        sighting = self._sightings.seen(parent)
        if sighting is None:
            comm = event.child.comm.decode("utf-8", "replace")
            self._sightings.fork(child, Forked(session, comm, event.event.at_ns))
        else:
            self._placement.follow(sighting, child)

    def _exec(self, event: abi.ExecEvent) -> None:
        session = self._agents.get(event.event.cgroup_id)
        key = key_of(event.process)
        forked = self._sightings.forked(key)
        if session is None or forked is None:
            return
        forked.executed = True
        comm = event.process.comm.decode("utf-8", "replace")
        argv = argv_of(event)
        begins = begins_call(self._config, comm, argv)
        if not begins and (event.argv_cut or not argv):
            # The head did not say it, or its page could not be read: /proc has all of it.
            argv = command_line(key[0], CMDLINE_BYTES_MAX) or argv
            begins = begins_call(self._config, comm, argv)
        if begins:
            name = tool_name(comm, argv)
            self._placement.begin(Sighting(session, name, argv, key, event.event.at_ns))

    def _exit(self, event: abi.ExitEvent) -> None:
        key = key_of(event.process)
        forked, sighting = self._sightings.end(key)
        if forked is not None:
            self._exec_was_missed(forked, event)
        if sighting is None:
            return
        if key == sighting.main:
            sighting.exit = event
            if sighting.call is not None:
                sighting.call.exit_status = event.wait_status
        if not sighting.members:
            self._placement.over(sighting)

    def _exec_was_missed(self, forked: Forked, event: abi.ExitEvent) -> None:
        """It has executed something, says its exit event, but no exec event did."""
        comm = event.process.comm.decode("utf-8", "replace")
        if forked.executed or not event.executed or not may_begin_call(self._config, comm):
            return
        over = Sighting(forked.session, tool_name(comm, []), [], key_of(event.process),
                        forked.at_ns, exit=event)  # fmt: skip
        self._placement.over(over)

    def _oom(self, event: abi.OomEvent) -> None:
        call = self._call_of_cgroup.get(event.event.cgroup_id)
        session = call.session if call else self._agents.get(event.event.cgroup_id)
        if session is not None:
            comm = event.process.comm.decode("utf-8", "replace")
            self._actions.oom_victim(session, call, event.process.pid, comm)

    def close(self) -> None:
        """Forget everything; calls stay as they are."""
        self._losses.close()
        if self._work_later is not None:
            self._work_later.cancel()
        self._agents.clear()
        self._sightings.clear()
        self._queue.clear()
