"""What a verdict is judged from: plain values, gathered when a call has ended."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.ending import Asked, Asker, Gone, Held, Left

CALLER_REASONS = (pb.END_REASON_TIMEOUT, pb.END_REASON_CANCELLED)
"""Reasons for which a caller may have killed the main process itself before it says so."""


@dataclass(frozen=True, slots=True)
class LimitHit:
    """A limit that was reached, and how often."""

    level: pb.Level.ValueType
    name: str
    """The id of a call or session, or the path of a cgroup; empty: a cgroup that is gone."""
    limit: int | None
    """In bytes, or processes; None: not known."""
    times: int


@dataclass(frozen=True, slots=True)
class OomFacts:
    """What the kernel's OOM killer did to a call while its last main process was in it."""

    kills: int = 0
    """Processes of the call that it ended, as the kernel counts them: the one that it chose is
    counted twice where it ends a whole group (mm/oom_kill.c: oom_kill_process)."""
    groups: int = 0
    """How often it ended a whole group. How many processes that were is then known but for as
    many."""
    kills_before: int = 0
    """The same as `kills`, while earlier main processes were in it."""
    groups_before: int = 0
    hits_before: tuple[LimitHit, ...] = ()
    """Limits of memory reached since the call began, whichever main process was in it."""
    whole: bool = False
    """Whether it ended the call as a whole (memory.oom.group)."""
    main_chosen: bool | None = None
    """Whether it chose the main process; None: the kernel's log or programs do not tell."""
    hits: tuple[LimitHit, ...] = ()
    """Limits of memory that were reached, the innermost first; none: the host itself ran out."""
    swap: LimitHit | None = None
    """The limit of swap that had been reached as well."""
    held: Held | None = None
    """What holds the session's memory, where that was the limit."""

    @property
    def least(self) -> int:
        """How many processes of the call it ended for certain."""
        return _least(self.kills, self.groups)

    @property
    def least_before(self) -> int:
        """The same, while earlier main processes were in it."""
        return _least(self.kills_before, self.groups_before)


def _least(kills: int, groups: int) -> int:
    # One that was chosen and had ended before its group was looked at is counted once.
    return max(kills - groups, min(kills, 1))


@dataclass(frozen=True, slots=True)
class EndFacts:
    """Facts that are known when a call's cgroup has become empty; None where this kernel does not
    say."""

    grant: Grant
    wall_usec: int
    ever_entered: bool
    wait_status: int | None = None
    """The main process's, as waitpid(2) gives it."""
    evidence: pb.Evidence.ValueType = pb.EVIDENCE_NONE
    asked: tuple[Asked, ...] = ()
    """Requests to end it, the first one first."""
    main_killed: bool = False
    """Whether the daemon sent SIGKILL while the main process ran."""
    main_lives: bool = False
    """Whether the main process goes on somewhere, although it was sent SIGKILL."""
    main_lost: bool = False
    """Whether the main process ended while no daemon was there."""
    removed: bool = False
    """Whether somebody else removed the cgroup."""
    left: tuple[Left, ...] = ()
    """Where the main process was found outside of its call's cgroup."""
    gone: tuple[Gone, ...] = ()
    """Processes besides the main one that were moved out of the call, those that are named."""
    gone_count: int = 0
    gone_more: bool = False
    """Whether there were more than these."""
    gone_before: int = 0
    """How many were moved out while earlier commands ran."""
    left_before: tuple[Left, ...] = ()
    """Where the main processes of earlier commands were that had left."""
    left_lives: frozenset[int] = frozenset()
    """Pids of those that still ran at the end of the call, and were ended with it."""
    outside: bool | None = False
    """Whether it was at the last of these places when it ended, as far as is known. None: it was in
    a cgroup that has been removed since, perhaps one that the tool had made in the call."""
    commands: int = 1
    """How many processes have been the main process, one after the other. 0: those in the call
    entered by another way than the attach socket."""
    oom_kills: int | None = None
    """Processes that the kernel's OOM killer ended for certain, all of the call; None: not
    known."""
    oom: OomFacts = OomFacts()
    pids_hits: tuple[LimitHit, ...] = ()
    memory_peak_bytes: int | None = None
    memory_high_events: int | None = None
    memory_throttled_usec: int | None = None
    cpu: dict[str, int] = field(default_factory=dict)
    """Numbers by their keys in cpu.stat."""
    cpus_seen: int | None = None
    """CPUs that a program in the call counts."""
    session_cpu_millicores: int | None = None
    pids_peak: int | None = None
    pids_max_events: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    frozen_usec: int = 0
    """For how long the daemon had paused it."""
    frozen_by_others_usec: int = 0
    """For how long others than the daemon had frozen it, alone or with its session."""
    delays: pb.Delays | None = None
    """What it waited for; None: the kernel does not tell."""
    devices: tuple[pb.DeviceIo, ...] = ()
    """What it did with each block device, the busiest first."""
    operator_usec: int = 0
    """Time for which the operator held it paused, a part of `frozen_usec`."""
    disk_usec: int = 0
    """Time for which it was paused because a file system was filling, a part of `frozen_usec`."""
    late_pauses: int = 0
    """Pauses that did not stop all tasks at once (`Call.late_pauses`)."""

    # Conclusions

    @property
    def ender(self) -> Asked | None:
        """Give the request that ended the main process: the first that came while it ran."""
        return next((a for a in self._to_end if a.main_ran), None)

    @property
    def _to_end(self) -> list[Asked]:
        """List the requests to end something: a main process that goes on as another call asks for
        the end of nothing."""
        return [a for a in self.asked if a.by is not Asker.WENT_ON]

    @property
    def sweeper(self) -> Asked | None:
        """Give the request that ended what the main process had left running."""
        if self.ender is not None:
            return None
        return next((a for a in self._to_end if a.processes), None)

    @property
    def leftovers(self) -> int:
        """How many processes were ended that had outlived the main process."""
        if self.ender is not None:
            return 0
        return max((a.processes for a in self._to_end), default=0)

    @property
    def claim(self) -> Asked | None:
        """Give the request of a caller that came with a reason after the main process had died of a
        signal. Whether the two have to do with each other is not known."""
        if self.signal not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            return None
        later = (a for a in self.asked if not a.main_ran and a.reason in CALLER_REASONS)
        return None if self.ender is not None else next(later, None)

    @property
    def went_on(self) -> Asked | None:
        """The main process's own request for another call, as which it goes on."""
        return next((a for a in self.asked if a.by is Asker.WENT_ON), None)

    @property
    def signal(self) -> int | None:
        """The signal that the main process died of."""
        if self.wait_status is None or not os.WIFSIGNALED(self.wait_status):
            return None
        return os.WTERMSIG(self.wait_status)

    @property
    def exit_code(self) -> int | None:
        """The exit status of the main process, if it exited."""
        if self.wait_status is None or os.WIFSIGNALED(self.wait_status):
            return None
        return os.WEXITSTATUS(self.wait_status)

    @property
    def main_oom(self) -> bool:
        """Whether the kernel's OOM killer ended the main process."""
        oom = self.oom
        if not oom.kills or self.outside or self.exit_code is not None or self.went_on:
            return False
        if self.signal not in (None, signal.SIGKILL):
            return False
        # Of a call that dies as a whole all processes are killed, but not all are told: one that
        # shares its memory with another, as after vfork(2), dies with that.
        if oom.whole or self.signal is None:
            return oom.whole
        if oom.main_chosen is not None:
            return oom.main_chosen
        # A kill by the daemon, which found the main process alive, came after the other's.
        return not self.main_killed

    @property
    def oom_outside(self) -> bool:
        """Whether it did so in a cgroup that the main process had left its call for."""
        return bool(self.outside and self.oom.main_chosen and self.signal == signal.SIGKILL)

    @property
    def oom_hit(self) -> LimitHit | None:
        """The limit at which the kernel's OOM killer was called; None: the host's memory. A call
        that was ended as a whole had reached its own limit, or one above."""
        hits = self.oom.hits
        if self.oom.whole:
            hits = tuple(hit for hit in hits if hit.level != pb.LEVEL_NESTED) or hits
        return hits[0] if hits else None
