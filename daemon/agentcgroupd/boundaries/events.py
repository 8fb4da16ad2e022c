"""Tool calls of agents that say nothing: where a call begins is seen from the kernel's side.

A process that was forked in a session's agent leaf and executes what a rule names begins a call: it
is moved into a leaf of its own with everything that it forks, double-forked children and new
sessions (setsid) included. Nested shells stay in the call they are in. A process that was put into
the agent leaf from outside is the agent itself, never a call.

Between the exec and the move a few hundred microseconds pass. What the process forks meanwhile is
known by its fork event and moved after it; a process that has ended by then still gets its report,
from its exit event.

Here events are dealt with in their order. What is known of the processes is in processes.py, their
way into a leaf in placement.py, and what happens when events were lost in resync.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial

from agentcgroup.text import printable
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.boundaries.insiders import Insiders, is_runtime
from agentcgroupd.boundaries.jobs import Jobs, reads_its_commands
from agentcgroupd.boundaries.leaving import Moves
from agentcgroupd.boundaries.placement import Placement
from agentcgroupd.boundaries.processes import (
    TICK_NS,
    Forked,
    Key,
    KnownProcesses,
    ObservedCall,
    key_of,
    runs,
)
from agentcgroupd.boundaries.resync import Resync
from agentcgroupd.boundaries.rules import (
    OWN_LAUNCHERS,
    Rules,
    Started,
    argv_of,
    continues,
    declares,
)
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.config import BoundariesConfig
from agentcgroupd.errors import AgentcgroupdError, RequestError
from agentcgroupd.host.proc import CMDLINE_BYTES_MAX, command_line, read_proc
from agentcgroupd.intents.command import tool_name
from agentcgroupd.intents.environment import ENVIRONMENT_BYTES_MAX, declared_in
from agentcgroupd.intents.parse import Intent
from agentcgroupd.intents.script import is_shell, shell_command
from agentcgroupd.intents.wrapped import user_command
from agentcgroupd.state.session import Call, Session, unix_usec
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)

Declared = Callable[[Session, Key, bytes, bool], None]
"""Takes the session in which a launcher was executed, its process, the head of its arguments, and
whether these are all of them."""
SLICE_S = 0.005
QUEUE_EVENTS_MAX = 4096
READ_AGAIN, READ_AGAIN_S = 3, 0.0002
"""How often, and after which time, arguments are read again that are not there."""


class Boundaries:
    """Turns processes' lives into calls. Runs on the event loop."""

    def __init__(
        self,
        config: BoundariesConfig,
        lifecycle: Lifecycle,
        calls: Calls,
        sessions: Callable[[], Iterable[Session]],
        notices: Notices,
        settled_ticks: int,
        declared: Declared,
        decided: Callable[[int, int], None],
    ) -> None:
        """`settled_ticks`: processes that were in an agent leaf at this time (clock ticks since
        boot) and in no call belong to the agent itself, because a daemon was there to see them.
        `declared`: told of each launcher that declares a call without a socket; `decided`: of each
        process that has executed a program, and when, as soon as it is where it belongs."""
        self._rules = Rules(config)
        self._declared = declared
        self._decided = decided
        self._lifecycle = lifecycle
        self._calls = calls
        self._sessions = sessions
        self._notices = notices
        self._agents: dict[int, Session] = {}
        self._call_of_cgroup: dict[int, Call] = {}
        self._moves = Moves(lifecycle, notices, self._call_of_cgroup)
        self._queue: deque[AnyEvent | partial[None]] = deque()
        self._busy = False
        self._loop = asyncio.get_running_loop()
        self._work_later: asyncio.Handle | None = None
        self._known = KnownProcesses()
        self._jobs = Jobs()
        self._insiders = Insiders()
        self._placement = Placement(self._known, calls, notices, self._read_on)
        self._resync = Resync(
            self._rules,
            lifecycle,
            self._known,
            self._placement,
            self._watched,
            lambda: self.behind,
            self._moves.lost,
            notices,
            settled_ticks,
        )

    @property
    def behind(self) -> bool:
        """Whether events wait to be dealt with."""
        return bool(self._queue)

    def start(self) -> None:
        """Begin with what runs now."""
        self._resync.start()
        self._moves.start()
        self._lifecycle.start(self.handle)
        self._resync.read_leaves()

    # What is watched

    def session_opened(self, session: Session) -> None:
        """Follow the processes of a session's agent leaf. Raises BpfError."""
        self._lifecycle.manage(session.agent.id, abi.CgroupKind.AGENT)
        self._agents[session.agent.id] = session
        self._insiders.opened(session)

    def entered(self, pid: int) -> None:
        """Count a process that the daemon has put into an agent leaf as the agent's own."""
        self._insiders.add_pid(pid)

    def session_closed(self, session: Session) -> None:
        """Forget a session and its processes. Raises BpfError."""
        self._agents.pop(session.agent.id, None)
        self._known.drop(session)
        self._insiders.closed(session)
        self._jobs.closed(session)
        self._lifecycle.unmanage(session.agent.id)

    def _watched(self) -> list[Session]:
        return [s for s in self._sessions() if s.agent.id in self._agents and not s.closing]

    def call_opened(self, call: Call) -> None:
        """Follow the processes of a call's leaf. Raises BpfError."""
        self._lifecycle.manage(call.cgroup.id, abi.CgroupKind.CALL)
        self._call_of_cgroup[call.cgroup.id] = call

    def call_closed(self, call: Call) -> None:
        """Forget a call's leaf, and ask again for observed calls that were refused. Raises
        BpfError."""
        self._call_of_cgroup.pop(call.cgroup.id, None)
        self._lifecycle.unmanage(call.cgroup.id)
        refused = self._known.refused(call.session)
        if refused and not call.session.closing:
            self._loop.call_soon(self._placement.try_again, refused)

    # Events

    def handle(self, batch: list[AnyEvent]) -> None:
        """Take in events in the kernel's order. May be called again while it runs; what comes then
        is dealt with after what was there before."""
        for event in batch:
            if isinstance(event, abi.ExitEvent):
                self._note_status(event)
            elif isinstance(event, abi.OomEvent):
                self._note_victim(event)
            elif isinstance(event, abi.LeftEvent):
                self._queue.extend(self._moves.count(event))
        self._queue.extend(batch)
        if not self._busy and self._work_later is None:
            self._work()

    def _work(self) -> None:
        """Deal with events for SLICE_S, then let the loop's other users run; the ring buffer keeps
        what comes meanwhile."""
        self._work_later = None
        self._busy = True
        deadline = self._loop.time() + SLICE_S
        try:
            while self._queue and self._loop.time() < deadline:
                self._one(self._queue.popleft())
            if not self._queue:
                self._resync.check_lost()
        finally:
            self._busy = False
        self._lifecycle.read(not self._queue)
        if self._queue:
            self._work_later = self._loop.call_soon(self._work)
            return
        self._calls.check_postponed()
        self._resync.check_soon()

    def catch_up(self) -> None:
        """Read the events that have not been worth a wake-up. Exit statuses are kept at once, the
        rest is dealt with later, because whoever asks is in the middle of ending a call."""
        before, self._busy = self._busy, True
        try:
            self._lifecycle.drain()
        finally:
            self._busy = before
        if self._queue and not self._busy and self._work_later is None:
            self._work_later = self._loop.call_soon(self._work)

    def prune(self) -> None:
        """Give up processes whose end nobody will tell; to be called again and again."""
        self._resync.prune()
        self._insiders.prune()

    def _read_on(self) -> None:
        """Take in what is there, unless so much waits that it is better left in the buffer."""
        if len(self._queue) < QUEUE_EVENTS_MAX:
            self._lifecycle.drain()

    def _one(self, event: AnyEvent | partial[None]) -> None:
        try:
            match event:
                case partial():
                    event()
                case abi.ForkEvent():
                    self._fork(event)
                case abi.ExecEvent():
                    try:
                        self._exec(event)
                    finally:
                        self._decided(event.process.pid, event.event.at_ns)
                case abi.ExitEvent():
                    self._exit(event)
                case abi.OomEvent():
                    self._oom(event)
        except (AgentcgroupdError, OSError) as error:
            # One process that cannot be dealt with must not take the others with it.
            log.warning("%s: %s", type(event).__name__, error)

    def _note_status(self, event: abi.ExitEvent) -> None:
        """Keep the status of a call's main process at once: the end of the call may be dealt with
        before this event is."""
        call = self._call_of_cgroup.get(event.event.cgroup_id)
        while call is not None:
            # It may have gone on from the call around this one.
            main = call.main
            if main is not None and (main.pid, main.start_ticks) == key_of(event.process):
                call.exit_status = event.wait_status
            call = call.parent

    def _note_victim(self, event: abi.OomEvent) -> None:
        """Keep at once whom the kernel's OOM killer chose, for the same reason."""
        call = self._call_of_cgroup.get(event.event.cgroup_id)
        if call is not None:
            comm = printable(event.process.comm.decode("utf-8", "replace"))
            call.account.note_victim(event.process.pid, comm, "mark_victim", unix_usec())

    def _fork(self, event: abi.ForkEvent) -> None:
        session = self._agents.get(event.event.cgroup_id)
        if session is None or not event.child.pid:
            return
        child = key_of(event.child)
        if self._known.settled(child):
            return  # a resync was there first
        parent = event.child.parent_pid, event.parent_start_ns // TICK_NS
        observed = self._known.seen(parent)
        if observed is None:
            comm = event.child.comm.decode("utf-8", "replace")
            outside = self._is_outside(session, parent, comm)
            forked = self._known.forked(parent)
            quiet = forked is not None and forked.quiet
            at_ns = event.event.at_ns
            self._known.fork(child, Forked(session, comm, at_ns, parent, outside, quiet=quiet))
        else:
            self._placement.follow(observed, child)

    def _is_outside(self, session: Session, parent: Key, comm: str) -> bool:
        """Whether a process that was forked in an agent leaf belongs to what came from outside.
        `comm`: the name of its parent."""
        forked = self._known.forked(parent)
        if forked is not None:
            return forked.outside
        return is_runtime(comm) or not self._insiders.forks(session, parent)

    def _exec(self, event: abi.ExecEvent) -> None:
        session = self._agents.get(event.event.cgroup_id)
        key = key_of(event.process)
        forked = self._known.forked(key)
        is_first = forked is not None and not forked.executed
        if forked is not None:
            forked.executed = True
        if declares(event):
            self._declare(session, key, event)
            return
        comm = event.process.comm.decode("utf-8", "replace")
        if session is None:
            return
        observed = self._known.seen(key)
        if observed is not None:
            self._goes_on(observed, key, comm, event)
            return
        if forked is None or forked.outside:
            if not self._insiders.has(session, key):
                self._came_in(session, key, comm, event)
            return
        if forked.quiet:
            return
        is_job = cache(partial(reads_its_commands, forked.parent, forked.comm))
        is_cut = bool(event.argv_cut)
        at_startup = bool(event.at_startup)
        started = Started(comm, argv_of(event), forked.comm, is_first, is_job, is_cut, at_startup)
        if is_cut or not started.argv:
            started = self._in_full(started, key)
        decision = self._rules.of(started)
        forked.quiet = decision.is_quiet
        if decision.begins_call:
            self._begin(forked, key, started, event.event.at_ns)

    def _declare(self, session: Session | None, key: Key, event: abi.ExecEvent) -> None:
        """Pass on a launcher that declares a call, in an agent leaf (`session` has it) or in a call
        around its own."""
        around = self._call_of_cgroup.get(event.event.cgroup_id)
        session = around.session if around is not None else session
        if session is not None:
            head = bytes(event.argv)[: event.argv_bytes]
            self._declared(session, key, head, not event.argv_cut)

    @staticmethod
    def _goes_on(observed: ObservedCall, key: Key, comm: str, event: abi.ExecEvent) -> None:
        """Take in a further exec of a call's first process. Agents have a long script become a
        shell with the command itself, and where all of that has ended by now nothing else tells
        the command."""
        argv = argv_of(event)
        is_short = key == observed.main and observed.call is None and observed.is_cut
        if is_short and argv and is_shell(argv[0]) and shell_command(argv) is not None:
            observed.argv = user_command(argv)
            observed.name = tool_name(comm, observed.argv)
            observed.is_cut = bool(event.argv_cut)

    def _came_in(self, session: Session, key: Key, comm: str, event: abi.ExecEvent) -> None:
        """Deal with a program that was executed in a session from outside: a call if the session
        says so, else the agent's own."""
        if is_runtime(comm) or self._known.settled(key):
            return
        if not session.limits.exec_is_call or comm in OWN_LAUNCHERS:
            self._known.leave(key)
            self._insiders.add(key)
            return
        started = self._in_full(Started(comm, argv_of(event)), key)
        argv = user_command(started.argv)
        said, intent = self._said_by(session, key[0], tool_name(comm, argv))
        name = said or tool_name(comm, argv)
        observed = ObservedCall(session, name, argv, key, event.event.at_ns, intent)
        self._placement.begin(observed)

    def _said_by(self, session: Session, pid: int, name: str) -> tuple[str, Intent | None]:
        """Read what a program's environment says of its call. What makes no sense is refused, and
        the program is a call as if it had said nothing."""
        try:
            environment = read_proc(pid, "environ", ENVIRONMENT_BYTES_MAX)
            with self._calls.refusing(session, name):
                return declared_in(environment)
        except OSError:
            return "", None
        except RequestError as error:
            sentence = f"what the environment of {name!r} says of it is ignored: {error.sentence}"
            feedback = pb.Feedback(code=pb.FEEDBACK_CODE_NOT_IN_CALL, sentence=sentence)
            self._notices.tell(session, "", feedback)
            return "", None

    @staticmethod
    def _in_full(started: Started, key: Key) -> Started:
        """Complete what the event holds of a program's arguments: /proc has all of them, unless it
        has executed another program since. Such a one counts where a shell has gone on as a shell,
        as agents have theirs do."""
        found = command_line(key[0], CMDLINE_BYTES_MAX)
        for _ in range(READ_AGAIN):
            if found or not runs(key):
                break
            # It is just executing another program, and has no arguments for a moment.
            time.sleep(READ_AGAIN_S)
            found = command_line(key[0], CMDLINE_BYTES_MAX)
        head = started.argv
        if continues(found, head) or (found and is_shell(found[0]) and shell_command(found)):
            return replace(started, argv=found, is_cut=False)
        return started

    def _begin(self, forked: Forked, key: Key, started: Started, at_ns: int) -> None:
        """Begin a call, unless the program belongs to one that has begun: that of its job."""
        argv = user_command(started.argv)
        name = tool_name(started.comm, argv)
        observed = ObservedCall(forked.session, name, argv, key, at_ns, is_cut=started.is_cut)
        if started.is_job():
            of_job = self._jobs.of(forked.session, key[0], forked.parent, at_ns)
            if of_job is not None:
                self._placement.follow(of_job, key)
                return
            self._jobs.began(key[0], forked.parent, observed)
        self._placement.begin(observed)

    def _exit(self, event: abi.ExitEvent) -> None:
        key = key_of(event.process)
        self._insiders.ended(key)
        forked, observed = self._known.end(key)
        if forked is not None:
            self._exec_was_missed(forked, event)
        if observed is None:
            return
        if key == observed.main:
            observed.exit = event
            if observed.call is not None:
                observed.call.exit_status = event.wait_status
        if not observed.members:
            self._placement.over(observed)

    def _exec_was_missed(self, forked: Forked, event: abi.ExitEvent) -> None:
        """Report a call whose exec event was lost: the exit event says that the process had
        executed something. Not one that ended in a call, which it had asked for itself."""
        comm = event.process.comm.decode("utf-8", "replace")
        if event.event.cgroup_id not in self._agents:
            return
        if forked.executed or forked.quiet or not event.executed:
            return
        if not self._rules.may_begin_call(comm):
            return
        key, name = key_of(event.process), tool_name(comm, [])
        self._placement.over(ObservedCall(forked.session, name, [], key, forked.at_ns, exit=event))

    def _oom(self, event: abi.OomEvent) -> None:
        call = self._call_of_cgroup.get(event.event.cgroup_id)
        session = call.session if call else self._agents.get(event.event.cgroup_id)
        if session is not None:
            comm = event.process.comm.decode("utf-8", "replace")
            self._notices.oom_victim(session, call, event.process.pid, comm)

    def close(self) -> None:
        """Forget everything; calls stay as they are."""
        self._resync.close()
        if self._work_later is not None:
            self._work_later.cancel()
        self._agents.clear()
        self._known.clear()
        self._queue.clear()
