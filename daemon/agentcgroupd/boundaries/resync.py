"""Events that were lost, and how they are made up for: the agent leaves themselves are read, and
processes whose exit event never came are given up.

The ring buffer may have had no room, or a program did not run because another task had interrupted
it on that CPU. The kernel counts both and sends no event of either.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from agentcgroupd.boundaries.jobs import reads_its_commands
from agentcgroupd.boundaries.placement import Placement
from agentcgroupd.boundaries.processes import (
    TICK_NS,
    Forked,
    Key,
    KnownProcesses,
    ObservedCall,
    lives,
)
from agentcgroupd.boundaries.rules import Rules, Started
from agentcgroupd.boundaries.startup import is_at_startup
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.errors import AgentcgroupdError, BpfError
from agentcgroupd.host.proc import CMDLINE_BYTES_MAX, command_line, program_name
from agentcgroupd.host.syscalls import process_stat
from agentcgroupd.intents.command import tool_name
from agentcgroupd.intents.script import is_shell
from agentcgroupd.intents.wrapped import user_command
from agentcgroupd.state.session import Session, boottime_usec
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)

CHECK_AFTER_S = 0.2
"""After events, until the kernel is asked whether it left some out; also how long a dead process's
exit event may be on its way."""
SETTLE_TICKS = 1_000_000_000 // TICK_NS
"""Events of processes that began longer ago than this have been handled, if no event waits."""


class Resync:
    """Notices that events were lost, and finds out what they would have told."""

    def __init__(
        self,
        rules: Rules,
        lifecycle: Lifecycle,
        known: KnownProcesses,
        placement: Placement,
        sessions: Callable[[], Iterable[Session]],
        behind: Callable[[], bool],
        left_lost: Callable[[], None],
        notices: Notices,
        settled_ticks: int,
    ) -> None:
        """`sessions`: those whose agent leaf is watched. `behind`: whether events wait to be dealt
        with. `left_lost`: told when those that tell who left a call were among the lost ones.
        `settled_ticks`: processes that were in an agent leaf at this time (clock ticks since
        boot) and in no call belong to the agent itself."""
        self._rules = rules
        self._lifecycle = lifecycle
        self._known = known
        self._placement = placement
        self._sessions = sessions
        self._behind = behind
        self._left_lost = left_lost
        self._notices = notices
        self._settled_ticks = settled_ticks
        self._lost_before: dict[str, int] = {}
        self._missed_before: dict[str, int] = {}
        self._dead: set[Key] = set()
        self._loop = asyncio.get_running_loop()
        self._check: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Make up for what is lost from now on. Raises BpfError."""
        self._lost_before = self._lifecycle.lost()
        self._missed_before = self._lifecycle.missed()

    # Finding out

    def check_lost(self) -> None:
        """Ask, after all events that came have been dealt with, whether the ring buffer had no
        room for more."""
        lost = self._lifecycle.lost()
        if lost == self._lost_before:
            return
        fresh = {kind: count - self._lost_before.get(kind, 0) for kind, count in lost.items()}
        self._lost_before = lost
        self._tell({kind: count for kind, count in fresh.items() if count})
        self.read_leaves()

    def check_soon(self) -> None:
        """Ask a moment after events whether the kernel left some out."""
        if self._check is None:
            self._check = self._loop.call_later(CHECK_AFTER_S, self._check_missed)

    def _check_missed(self) -> None:
        """Read the events that did not wake the daemon, and ask the kernel for those it left out,
        which it counts."""
        self._check = None
        self._lifecycle.drain()
        if self._known.without_call():
            # Calls without a cgroup, whose end is told by nothing else.
            self.check_soon()
        try:
            missed = self._lifecycle.missed()
        except BpfError as error:
            log.warning("%s", error)
            return
        if missed == self._missed_before:
            if not self._behind():
                self._settled_ticks = _now_ticks() - SETTLE_TICKS
            return
        before, self._missed_before = self._missed_before, missed
        fresh = {kind: count - before.get(kind, 0) for kind, count in missed.items()}
        self._tell({kind: count for kind, count in fresh.items() if count > 0})
        self.read_leaves()
        self.prune()
        self._loop.call_later(CHECK_AFTER_S, self.prune)

    def _tell(self, fresh: dict[str, int]) -> None:
        self._notices.events_lost(fresh)
        if "left" in fresh:
            self._left_lost()

    # Making up for it

    def prune(self) -> None:
        """Forget processes whose exit event was lost: those that were dead at the last call too, so
        that their event had time to come."""
        dead = {key for key in self._known.keys() if not lives(key)}
        self._lifecycle.drain()
        if self._behind():
            return  # their events may be among these; the next sweep prunes
        for key in dead & self._dead:
            _, observed = self._known.end(key)
            if observed is None:
                continue
            try:
                if not observed.members:
                    self._placement.over(observed)
            except (AgentcgroupdError, OSError) as error:
                log.warning("process %d: %s", key[0], error)
        self._dead = dead

    def read_leaves(self) -> None:
        """Read the agent leaves themselves: what should be in a call and is not is moved there."""
        for session in self._sessions():
            try:
                self._resync_session(session)
            except (AgentcgroupdError, OSError) as error:
                log.warning("session %s: its agent leaf cannot be read: %s", session.id, error)

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
            if self._known.settled(key):
                continue
            try:
                self._resync_process(session, keys, pid, key)
            except (FileNotFoundError, ProcessLookupError):
                continue
            except (AgentcgroupdError, OSError) as error:
                log.warning("process %d: %s", pid, error)

    def _resync_process(self, session: Session, keys: dict[int, Key], pid: int, key: Key) -> None:
        parent = keys.get(process_stat(pid).parent_pid)
        call_of_parent = self._known.seen(parent) if parent is not None else None
        if call_of_parent is not None:
            self._placement.follow(call_of_parent, key)
            return
        forked = self._known.forked(key)
        if forked is None:
            if parent is None or key[1] <= self._settled_ticks:
                return  # put here from outside, or seen before: the agent itself
            above = self._known.forked(parent)
            quiet = above is not None and above.quiet
            comm = program_name(parent[0])
            forked = Forked(session, comm, time.monotonic_ns(), parent, quiet=quiet)
            self._known.fork(key, forked)
        comm = program_name(pid)
        argv = command_line(pid, CMDLINE_BYTES_MAX)
        is_first = not forked.executed
        forked.executed = forked.executed or comm != forked.comm
        is_job = partial(reads_its_commands, forked.parent, forked.comm)
        if forked.quiet:
            return
        at_startup = is_shell(forked.comm) and is_at_startup(pid)
        started = Started(comm, argv, forked.comm, is_first, is_job, at_startup=at_startup)
        decision = self._rules.of(started)
        forked.quiet = decision.is_quiet and forked.executed
        if decision.begins_call:
            argv = user_command(argv)
            name = tool_name(comm, argv)
            self._placement.begin(ObservedCall(session, name, argv, key, time.monotonic_ns()))

    def close(self) -> None:
        """Ask no more."""
        if self._check is not None:
            self._check.cancel()


def _now_ticks() -> int:
    return boottime_usec() * 1000 // TICK_NS
