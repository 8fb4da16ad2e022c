"""Tool calls of agents that say nothing: where a call begins is seen from the kernel's side.

A process that was forked in a session's agent leaf and executes what a rule names begins a call: it
is moved into a leaf of its own with everything that it forks, double-forked children and new
sessions (setsid) included. Nested shells stay in the call they are in. A process that was put into
the agent leaf from outside is the agent itself, never a call.

Between the exec and the move a few hundred microseconds pass. What the process forks meanwhile is
known by its fork event and moved after it; a process that has ended by then still gets its report,
from its exit event.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.calls import Calls
from agentcgroupd.config import BoundariesConfig
from agentcgroupd.errors import (
    AgentcgroupdError,
    BpfError,
    FailedPrecondition,
    KnobError,
    RequestError,
)
from agentcgroupd.policy.actions import Actions
from agentcgroupd.rules import argv_of, begins_call, may_begin_call, tool_name
from agentcgroupd.session import AGENT_LEAF, Call, Process, Session, boottime_usec
from agentcgroupd.syscalls import cgroup_of, pidfd_alive, process_stat

log = logging.getLogger(__name__)

CHECK_AFTER_S = 0.2
"""After events, until the kernel is asked whether it left some out; also how long a dead process's
exit event may be on its way."""
SLICE_S = 0.005
QUEUE_EVENTS_MAX = 4096
OVER_MAX = 65_536
CMDLINE_BYTES_MAX = 65_536
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

SETTLE_TICKS = 1_000_000_000 // TICK_NS
"""What is older than a second has been dealt with when no event waits."""

Key = tuple[int, int]
"""(pid, start time in clock ticks), as in the daemon's other records of processes."""


def key_of(process: abi.Process) -> Key:
    """Whose event it is."""
    return process.pid, process.start_ns // TICK_NS


@dataclass(slots=True)
class Forked:
    """A process that was forked in an agent leaf and has begun no call."""

    session: Session
    comm: str
    """When it was forked: its parent's."""
    at_ns: int
    executed: bool = False


@dataclass(slots=True, eq=False)
class Sighting:
    """A call that began with an exec in an agent leaf."""

    session: Session
    name: str
    argv: list[str]
    main: Key
    at_ns: int
    """Of the exec, CLOCK_MONOTONIC."""
    call: Call | None = None
    members: set[Key] = field(default_factory=set)
    exit: abi.ExitEvent | None = None
    refused: str = ""
    """Why it has no call; tried again when another call of the session has ended."""
    declared: bool = False
    """Its main process asked for a call before it could be moved: that one has the report."""


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
        self._forked: dict[Key, Forked] = {}
        self._seen: dict[Key, Sighting] = {}
        self._queue: deque[AnyEvent] = deque()
        self._busy = False
        self._dead: set[Key] = set()
        self._over_keys: dict[Key, None] = {}
        """The newest that are known to have ended, the oldest first: a resync may find a process
        before its events are read, or still in its cgroup after its exit event."""
        self._lost_before: dict[str, int] = {}
        self._missed_before: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._check: asyncio.TimerHandle | None = None
        self._work_later: asyncio.Handle | None = None
        self._settled_ticks = settled_ticks

    @property
    def behind(self) -> bool:
        """Whether events wait to be dealt with."""
        return bool(self._queue)

    def start(self) -> None:
        """Begin with what runs now."""
        self._lost_before = self._lifecycle.lost()
        self._missed_before = self._lifecycle.missed()
        self._lifecycle.start(self.handle)
        self.resync()

    # What is watched

    def session_opened(self, session: Session) -> None:
        """Watch its agent leaf. Raises BpfError."""
        self._lifecycle.manage(session.agent.id, abi.CgroupKind.AGENT)
        self._agents[session.agent.id] = session

    def session_closed(self, session: Session) -> None:
        """No more. Raises BpfError."""
        self._agents.pop(session.agent.id, None)
        for forked in [k for k, f in self._forked.items() if f.session is session]:
            del self._forked[forked]
        for seen in [k for k, s in self._seen.items() if s.session is session]:
            del self._seen[seen]
        self._lifecycle.unmanage(session.agent.id)

    def call_opened(self, call: Call) -> None:
        """Watch a call's leaf. Raises BpfError."""
        self._lifecycle.manage(call.cgroup.id, abi.CgroupKind.CALL)
        self._call_of_cgroup[call.cgroup.id] = call

    def call_closed(self, call: Call) -> None:
        """No more. Raises BpfError."""
        self._call_of_cgroup.pop(call.cgroup.id, None)
        self._lifecycle.unmanage(call.cgroup.id)
        refused = {s for s in self._seen.values() if s.session is call.session and s.refused}
        if refused and not call.session.closing:
            self._loop.call_soon(self._try_again, refused)

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
            if not self._queue and self._were_lost():
                self.resync()
        finally:
            self._busy = False
        self._lifecycle.read(not self._queue)
        if self._queue:
            self._work_later = self._loop.call_soon(self._work)
            return
        self._calls.look_postponed()
        if self._check is None:
            self._check = self._loop.call_later(CHECK_AFTER_S, self._check_missed)

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
        if child in self._seen or child in self._over_keys:
            return  # a resync was there first
        parent = event.child.parent_pid, event.parent_start_ns // TICK_NS
        sighting = self._seen.get(parent)
        if sighting is None:
            comm = event.child.comm.decode("utf-8", "replace")
            self._forked[child] = Forked(session, comm, event.event.at_ns)
        else:
            self._follow(sighting, child)

    def _exec(self, event: abi.ExecEvent) -> None:
        session = self._agents.get(event.event.cgroup_id)
        key = key_of(event.process)
        forked = self._forked.get(key)
        if session is None or forked is None:
            return
        forked.executed = True
        comm = event.process.comm.decode("utf-8", "replace")
        argv = argv_of(event)
        begins = begins_call(self._config, comm, argv)
        if not begins and (event.argv_cut or not argv):
            # The head did not say it, or its page could not be read: /proc has all of it.
            argv = _cmdline(key[0], whole=True) or argv
            begins = begins_call(self._config, comm, argv)
        if not begins:
            return
        del self._forked[key]
        self._begin(Sighting(session, tool_name(comm, argv), argv, key, event.event.at_ns))

    def _exit(self, event: abi.ExitEvent) -> None:
        key = key_of(event.process)
        forked = self._forked.pop(key, None)
        sighting = self._seen.pop(key, None)
        if forked is not None or sighting is not None:
            self._forget(key)
        if forked is not None:
            self._exec_was_missed(forked, event)
        if sighting is None:
            return
        sighting.members.discard(key)
        if key == sighting.main:
            sighting.exit = event
            if sighting.call is not None:
                sighting.call.exit_status = event.wait_status
        if not sighting.members:
            self._over(sighting)

    def _forget(self, key: Key) -> None:
        self._over_keys[key] = None
        if len(self._over_keys) > OVER_MAX:
            del self._over_keys[next(iter(self._over_keys))]

    def _exec_was_missed(self, forked: Forked, event: abi.ExitEvent) -> None:
        """It has executed something, says its exit event, but no exec event did."""
        comm = event.process.comm.decode("utf-8", "replace")
        if forked.executed or not event.executed or not may_begin_call(self._config, comm):
            return
        over = Sighting(forked.session, tool_name(comm, []), [], key_of(event.process),
                        forked.at_ns, exit=event)  # fmt: skip
        self._over(over)

    def _oom(self, event: abi.OomEvent) -> None:
        call = self._call_of_cgroup.get(event.event.cgroup_id)
        session = call.session if call else self._agents.get(event.event.cgroup_id)
        if session is not None:
            comm = event.process.comm.decode("utf-8", "replace")
            self._actions.oom_victim(session, call, event.process.pid, comm)

    # Calls

    def _begin(self, sighting: Sighting) -> None:
        self._seen[sighting.main] = sighting
        sighting.members.add(sighting.main)
        self._place(sighting, sighting.main)

    def _follow(self, sighting: Sighting, child: Key) -> None:
        """A child that was forked before its parent was moved."""
        self._seen[child] = sighting
        sighting.members.add(child)
        self._place(sighting, child)

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
            try:
                call = self._calls.begin(
                    sighting.session, sighting.name, {}, sighting.argv, None, observed=True
                )
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
        if len(self._queue) < QUEUE_EVENTS_MAX:
            self._lifecycle.drain()

    def _refused(self, sighting: Sighting, error: RequestError) -> None:
        """It runs on in the agent leaf; said once, and tried again when there may be room."""
        sighting.refused = error.sentence
        self._actions.tell(sighting.session, "", pb.Feedback(
            code=pb.FEEDBACK_CODE_NOT_IN_CALL,
            sentence=f"{sighting.name!r} runs without a call of its own: {error.sentence}",
        ))  # fmt: skip

    def _try_again(self, refused: set[Sighting]) -> None:
        for sighting in sorted(refused, key=lambda s: s.at_ns):
            sighting.refused = ""
            for key in sorted(sighting.members, key=lambda k: k != sighting.main):
                try:
                    self._place(sighting, key)
                except (AgentcgroupdError, OSError) as error:
                    log.warning("process %d: %s", key[0], error)
            if sighting.refused:
                return

    def _over(self, sighting: Sighting) -> None:
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

    # When events were lost

    def _were_lost(self) -> bool:
        """Whether events were lost since the last look; said and counted if so."""
        lost = self._lifecycle.lost()
        if lost == self._lost_before:
            return False
        fresh = {kind: count - self._lost_before.get(kind, 0) for kind, count in lost.items()}
        self._lost_before = lost
        self._actions.events_lost({kind: count for kind, count in fresh.items() if count})
        return True

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

    def _check_missed(self) -> None:
        """A moment after events: read what did not wake the daemon, and ask the kernel, which
        counts what it left out but sends no event."""
        self._check = None
        self._lifecycle.drain()
        if self._check is None and any(s.call is None for s in self._seen.values()):
            # Short ones, whose end is told by nothing else.
            self._check = self._loop.call_later(CHECK_AFTER_S, self._check_missed)
        try:
            missed = self._lifecycle.missed()
        except BpfError as error:
            log.warning("%s", error)
            return
        if missed == self._missed_before:
            if not self._queue:
                self._settled_ticks = _now_ticks() - SETTLE_TICKS
            return
        before, self._missed_before = self._missed_before, missed
        self._actions.events_lost(
            {kind: count - before.get(kind, 0) for kind, count in missed.items()
             if count > before.get(kind, 0)}
        )  # fmt: skip
        self.resync()
        self.prune()
        self._loop.call_later(CHECK_AFTER_S, self.prune)

    def resync(self) -> None:
        """Look at the agent leaves themselves: what should be in a call and is not, goes there."""
        for session in self._sessions():
            if session.agent.id not in self._agents or session.closing:
                continue
            try:
                self._resync_session(session)
            except (AgentcgroupdError, OSError) as error:
                log.warning("session %s: its agent leaf cannot be looked at: %s", session.id, error)

    def prune(self) -> None:
        """Forget processes whose exit event was lost: those found dead twice, with time for their
        event in between."""
        dead = {key for key in (*self._forked, *self._seen) if not _lives(key)}
        self._lifecycle.drain()
        if self._queue:
            return  # their events may be among these; the next sweep prunes
        for key in dead & self._dead:
            forked = self._forked.pop(key, None)
            sighting = self._seen.pop(key, None)
            if forked is not None or sighting is not None:
                self._forget(key)
            if sighting is None:
                continue
            sighting.members.discard(key)
            try:
                if not sighting.members:
                    self._over(sighting)
            except (AgentcgroupdError, OSError) as error:
                log.warning("process %d: %s", key[0], error)
        self._dead = dead

    def _resync_session(self, session: Session) -> None:
        here = session.agent.procs()
        keys: dict[int, Key] = {}
        for pid in here:
            try:
                keys[pid] = (pid, process_stat(pid).start_ticks)
            except (FileNotFoundError, ProcessLookupError):
                continue
        # Parents before their children, so that a child finds its parent's call.
        for pid, key in sorted(keys.items(), key=lambda item: item[1][1]):
            if key in self._seen or key in self._over_keys:
                continue
            try:
                self._resync_process(session, keys, pid, key)
            except (FileNotFoundError, ProcessLookupError):
                continue
            except (AgentcgroupdError, OSError) as error:
                log.warning("process %d: %s", pid, error)

    def _resync_process(self, session: Session, keys: dict[int, Key], pid: int, key: Key) -> None:
        parent = keys.get(process_stat(pid).parent_pid)
        if parent is not None and parent in self._seen:
            self._forked.pop(key, None)
            self._follow(self._seen[parent], key)
            return
        if key not in self._forked:
            if parent is None or key[1] <= self._settled_ticks:
                return  # put here from outside, or seen before: the agent itself
            self._forked[key] = Forked(session, "", time.monotonic_ns())
        forked = self._forked[key]
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            comm = file.read().rstrip("\n")
        argv = _cmdline(pid)
        forked.executed = forked.executed or comm != forked.comm
        if begins_call(self._config, comm, argv):
            del self._forked[key]
            self._begin(Sighting(session, tool_name(comm, argv), argv, key, time.monotonic_ns()))

    def close(self) -> None:
        """Forget everything; calls stay as they are."""
        for timer in (self._check, self._work_later):
            if timer is not None:
                timer.cancel()
        self._agents.clear()
        self._forked.clear()
        self._seen.clear()
        self._queue.clear()


def _cmdline(pid: int, whole: bool = False) -> list[str]:
    """A process's arguments, or their head; none of one that has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            text = file.read(CMDLINE_BYTES_MAX if whole else abi.ABI_ARGV_BYTES)
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rstrip("\0").split("\0") if text else []


def _now_ticks() -> int:
    return boottime_usec() * 1000 // TICK_NS


def _lives(key: Key) -> bool:
    try:
        return process_stat(key[0]).start_ticks == key[1]
    except OSError:
        return False
