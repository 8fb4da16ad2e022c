"""Events that were lost, and how they are made up for: the agent leaves themselves are looked at,
and processes whose exit event never came are given up.

The ring buffer may have had no room, or a program did not run because another task had interrupted
it on that CPU. The kernel counts both and sends no event of either.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from agentcgroupd.boundaries.placement import Placement
from agentcgroupd.boundaries.processes import (
    TICK_NS,
    Forked,
    Key,
    Sighting,
    Sightings,
    lives,
)
from agentcgroupd.boundaries.rules import begins_call
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.config import BoundariesConfig
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import AgentcgroupdError, BpfError
from agentcgroupd.host.proc import command_line, program_name
from agentcgroupd.host.syscalls import process_stat
from agentcgroupd.intents.command import tool_name
from agentcgroupd.state.session import Session, boottime_usec

log = logging.getLogger(__name__)

CHECK_AFTER_S = 0.2
"""After events, until the kernel is asked whether it left some out; also how long a dead process's
exit event may be on its way."""
SETTLE_TICKS = 1_000_000_000 // TICK_NS
"""What is older than a second has been dealt with when no event waits."""


class Losses:
    """Finds out that events were lost, and what they would have told."""

    def __init__(
        self,
        config: BoundariesConfig,
        lifecycle: Lifecycle,
        sightings: Sightings,
        placement: Placement,
        sessions: Callable[[], Iterable[Session]],
        behind: Callable[[], bool],
        actions: Actions,
        settled_ticks: int,
    ) -> None:
        """`sessions`: those whose agent leaf is watched. `behind`: whether events wait to be dealt
        with. `settled_ticks`: see Boundaries."""
        self._config = config
        self._lifecycle = lifecycle
        self._sightings = sightings
        self._placement = placement
        self._sessions = sessions
        self._behind = behind
        self._actions = actions
        self._settled_ticks = settled_ticks
        self._lost_before: dict[str, int] = {}
        self._missed_before: dict[str, int] = {}
        self._dead: set[Key] = set()
        self._loop = asyncio.get_running_loop()
        self._check: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """What was lost before now is not made up for. Raises BpfError."""
        self._lost_before = self._lifecycle.lost()
        self._missed_before = self._lifecycle.missed()

    # Finding out

    def look(self) -> None:
        """All events have been dealt with: were there more?"""
        lost = self._lifecycle.lost()
        if lost == self._lost_before:
            return
        fresh = {kind: count - self._lost_before.get(kind, 0) for kind, count in lost.items()}
        self._lost_before = lost
        self._actions.events_lost({kind: count for kind, count in fresh.items() if count})
        self.resync()

    def check_soon(self) -> None:
        """There were events: look again a moment after them."""
        if self._check is None:
            self._check = self._loop.call_later(CHECK_AFTER_S, self._check_missed)

    def _check_missed(self) -> None:
        """A moment after events: read what did not wake the daemon, and ask the kernel, which
        counts what it left out but sends no event."""
        self._check = None
        self._lifecycle.drain()
        if self._sightings.without_call():
            # Short ones, whose end is told by nothing else.
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
        self._actions.events_lost(
            {kind: count - before.get(kind, 0) for kind, count in missed.items()
             if count > before.get(kind, 0)}
        )  # fmt: skip
        self.resync()
        self.prune()
        self._loop.call_later(CHECK_AFTER_S, self.prune)

    # Making up for it

    def prune(self) -> None:
        """Forget processes whose exit event was lost: those found dead twice, with time for their
        event in between."""
        dead = {key for key in self._sightings.keys() if not lives(key)}
        self._lifecycle.drain()
        if self._behind():
            return  # their events may be among these; the next sweep prunes
        for key in dead & self._dead:
            _, sighting = self._sightings.end(key)
            if sighting is None:
                continue
            try:
                if not sighting.members:
                    self._placement.over(sighting)
            except (AgentcgroupdError, OSError) as error:
                log.warning("process %d: %s", key[0], error)
        self._dead = dead

    def resync(self) -> None:
        """Look at the agent leaves themselves: what should be in a call and is not, goes there."""
        for session in self._sessions():
            try:
                self._resync_session(session)
            except (AgentcgroupdError, OSError) as error:
                log.warning("session %s: its agent leaf cannot be looked at: %s", session.id, error)

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
            if self._sightings.settled(key):
                continue
            try:
                self._resync_process(session, keys, pid, key)
            except (FileNotFoundError, ProcessLookupError):
                continue
            except (AgentcgroupdError, OSError) as error:
                log.warning("process %d: %s", pid, error)

    def _resync_process(self, session: Session, keys: dict[int, Key], pid: int, key: Key) -> None:
        parent = keys.get(process_stat(pid).parent_pid)
        call_of_parent = self._sightings.seen(parent) if parent is not None else None
        if call_of_parent is not None:
            self._placement.follow(call_of_parent, key)
            return
        forked = self._sightings.forked(key)
        if forked is None:
            if parent is None or key[1] <= self._settled_ticks:
                return  # put here from outside, or seen before: the agent itself
            forked = Forked(session, "", time.monotonic_ns())
            self._sightings.fork(key, forked)
        comm = program_name(pid)
        argv = command_line(pid, abi.ABI_ARGV_BYTES)
        forked.executed = forked.executed or comm != forked.comm
        if begins_call(self._config, comm, argv):
            name = tool_name(comm, argv)
            self._placement.begin(Sighting(session, name, argv, key, time.monotonic_ns()))

    def close(self) -> None:
        """Look no more."""
        if self._check is not None:
            self._check.cancel()


def _now_ticks() -> int:
    return boottime_usec() * 1000 // TICK_NS
