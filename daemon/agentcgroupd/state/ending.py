"""The account of how a call comes to its end: who asked for it, what was seen, and the counters
that an end is judged against.

Gathered while the call lives, and kept in its record, so that a daemon that is started again goes
on with it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.held import HeldKnob
from agentcgroupd.cgroup.tree import Cgroup

GONE_MOST = 4
"""Processes moved out of a call that are told one by one and named in its report; moves of its main
process, too."""
VICTIMS_MOST = 1000
"""How many processes that the kernel's OOM killer chose are known by their pids."""
LEFT_BEFORE_MOST = 4
FACTS_MOST = 64
"""How many facts an account keeps. Processes that the kernel's OOM killer chooses are told one by
one, and a tool can have any number of them."""


CALLER_WORDS = {
    pb.END_REASON_DONE: "the command has ended",
    pb.END_REASON_TIMEOUT: "a timeout of its own had passed",
    pb.END_REASON_CANCELLED: "it was cancelled or interrupted itself",
}
"""What a caller says with its reason for ending a call, as a clause after "it says that"."""


class Asker(enum.StrEnum):
    """Parties that can ask for the end of a call."""

    TIMEOUT = "timeout"
    AGENT = "agent"
    TOOL = "tool"
    """A process of a call that this one is in, or of one beside it where tools may do so."""
    OPERATOR = "operator"
    SESSION = "session"
    POLICY = "policy"
    LEFTOVERS = "leftovers"
    """The daemon, when the command had ended and its leftovers are not to be kept."""
    OUTER = "outer"
    """The end of the call that it was begun in."""
    WENT_ON = "went_on"
    """The main process itself: it asked for another call and went on as that."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A thing that is known about an end. `what`: a clause; `source`: the file, system call or
    message that tells it; `at_unix_usec`: when it was so or was seen."""

    what: str
    source: str
    at_unix_usec: int
    level: pb.Level.ValueType = pb.LEVEL_CALL


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to end a call."""

    by: Asker
    at_unix_usec: int
    main_ran: bool
    """Whether the main process still ran then: if not, only what it had left running was ended."""
    processes: int = 0
    """How many processes the call had then, nested cgroups included."""
    outside: int = 0
    """How many the main process had started that were elsewhere then."""
    why: str = ""
    """A sentence: why the policy did it, or what the process went on as."""
    reason: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED
    """What the caller gives as its reason."""


@dataclass(frozen=True, slots=True)
class Left:
    """A main process that is no longer in its call's cgroup."""

    pid: int
    path: str
    """The cgroup that it was found in, below the mount."""
    at_unix_usec: int
    moved_back: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """A process, not the main one, that was moved out of its call, and by whom."""

    pid: int
    name: str
    mover_pid: int
    mover: str
    path: str
    """Where it was moved to, below the mount; of a long one the end."""
    at_unix_usec: int


@dataclass(frozen=True, slots=True)
class Held:
    """What holds a session's memory, page cache aside."""

    agent_bytes: int
    calls_bytes: int
    """In the session's other calls."""
    files_bytes: int
    """In files of tmpfs, /dev/shm among them, whose call has ended."""


NOTHING_HELD = Held(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Place:
    """A cgroup above a call, at which a limit can stand."""

    level: pb.Level.ValueType
    cgroup: Cgroup
    name: str
    """The call's id where it is another call; else its path."""
    memory: HeldKnob[dict[str, int]] | None = None
    """The memory.events.local of it, held open; None: nothing is."""
    pids: HeldKnob[dict[str, int]] | None = None
    """The pids.events.local of it."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Counters of one cgroup that only grow. 0 where this kernel or cgroup does not have one."""

    ooms: int = 0
    """Times its limit was reached with nothing left to reclaim (`oom`)."""
    oom_kills: int = 0
    """Processes in it that the kernel's OOM killer ended (`oom_kill`)."""
    group_kills: int = 0
    """Times that it was ended as a whole (`oom_group_kill`)."""
    pids_refused: int = 0
    """Times that a process or thread was refused (pids.events: `max`)."""

    def __sub__(self, before: Counts) -> Counts:
        """What was counted since `before`."""
        return Counts(
            self.ooms - before.ooms,
            self.oom_kills - before.oom_kills,
            self.group_kills - before.group_kills,
            self.pids_refused - before.pids_refused,
        )

    def plain(self) -> list[int]:
        """The counters for a record."""
        return [self.ooms, self.oom_kills, self.group_kills, self.pids_refused]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Counters as they were when the main process entered its call."""

    below: Counts = Counts()
    """Of the call and of all below it."""
    own: Counts = Counts()
    """Of the call's own cgroup alone."""
    above: tuple[Counts, ...] = ()
    """Of each cgroup above the call, the nearest first."""

    def plain(self) -> list[list[int]]:
        """The counters for a record."""
        return [counts.plain() for counts in (self.below, self.own, *self.above)]

    @classmethod
    def from_plain(cls, data: list[list[int]]) -> Baseline:
        """The inverse of `plain`. Raises TypeError or ValueError."""
        below, own, *above = (Counts(*map(int, counts)) for counts in data)
        return cls(below, own, tuple(above))


@dataclass(slots=True)
class Account:
    """What is known so far of how a call ends."""

    facts: list[Fact] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    main_killed: bool = False
    """Whether the daemon sent SIGKILL while the main process ran."""
    main_lost: bool = False
    """Whether the main process ended while no daemon was there."""
    given_up: bool = False
    """Whether the main process, outside of the call, did not die of SIGKILL in time."""
    removed: bool = False
    """Whether somebody else removed the call's cgroup."""
    left: list[Left] = field(default_factory=list)
    left_before: list[Left] = field(default_factory=list)
    """Where the main processes of earlier commands were last, the last LEFT_BEFORE_MOST of those
    that had left."""
    gone: list[Gone] = field(default_factory=list)
    """Processes that were moved out of the call, the first GONE_MOST, as far as the kernel told."""
    gone_count: int = 0
    """How many such processes there were. A process that went twice counts twice."""
    gone_more: bool = False
    """Whether there were more: the kernel's program did not tell of all."""
    gone_before: int = 0
    """How many were moved out while earlier commands ran."""
    main_moves: int = 0
    """How often the main process was moved out, as far as the kernel told."""
    victims: set[int] = field(default_factory=set)
    """Pids of processes that the kernel's OOM killer chose since the main process entered, as far
    as the kernel told."""
    began: Baseline | None = None
    """Counters when the call began. None: they are not known, and what was counted above the call
    before cannot be told apart."""
    baseline: Baseline | None = None
    """Counters when the main process entered; None: as when the call began."""
    commands: int = 0
    """How many processes have been the main process."""

    def add(
        self,
        what: str,
        source: str,
        at_unix_usec: int,
        level: pb.Level.ValueType = pb.LEVEL_CALL,
    ) -> None:
        """Take a fact down; the first FACTS_MOST count."""
        if len(self.facts) < FACTS_MOST:
            self.facts.append(Fact(what, source, at_unix_usec, level))

    def ask(self, asked: Asked, what: str, source: str) -> None:
        """Take down that the end was asked for, which `what` says as a clause. Of several requests
        by the same asker the first counts."""
        if any(a.by is asked.by and a.main_ran == asked.main_ran for a in self.asked):
            return
        self.asked.append(asked)
        self.add(what, source, asked.at_unix_usec)

    def note_victim(self, pid: int, name: str, source: str, at_unix_usec: int) -> None:
        """Take down that the kernel's OOM killer chose a process; the first VICTIMS_MOST count."""
        if len(self.victims) < VICTIMS_MOST:
            self.victims.add(pid)
            self.add(f"the kernel's OOM killer chose {name} ({pid})", source, at_unix_usec)

    def count_gone(self, is_main: bool) -> int:
        """Count a process that was moved out of the call. Returns its number: the first GONE_MOST
        are to be named."""
        if is_main:
            self.main_moves += 1
            return self.main_moves
        self.gone_count += 1
        return self.gone_count

    def name_gone(self, gone: Gone, is_main: bool, words: str, source: str) -> None:
        """Take down, after it was counted, which process was moved out of the call. `words`: a
        clause that says so."""
        if not is_main:
            self.gone.append(gone)
        self.add(words, source, gone.at_unix_usec)

    def command_begins(self, baseline: Baseline | None) -> None:
        """Begin anew with another main process. `baseline`: the counters as they are now; None:
        they are as they were."""
        if baseline is not None:
            self.baseline = baseline
        self.commands += 1
        # A call that is being ended takes nobody in: what was asked for is that the process before
        # this one went on elsewhere.
        self.asked.clear()
        self.left_before += [left for left in self.left[-1:] if not left.moved_back]
        del self.left_before[:-LEFT_BEFORE_MOST]
        self.left.clear()
        self.gone_before += self.gone_count
        self.gone.clear()
        self.gone_count = self.main_moves = 0
        self.gone_more = False
        self.victims.clear()
        self.main_lost = self.main_killed = False

    def plain(self) -> dict[str, Any]:
        """The account for a record; what is as at the beginning is left out."""
        data: dict[str, Any] = {"commands": self.commands}
        for name, counters in (("began", self.began), ("baseline", self.baseline)):
            if counters is not None:
                data[name] = counters.plain()
        if self.asked:
            data["asked"] = [
                [a.by, a.at_unix_usec, a.main_ran, a.processes, a.outside, a.why, a.reason]
                for a in self.asked
            ]
            data["main_killed"] = self.main_killed
        if self.main_lost:
            data["main_lost"] = True
        for name, places in (("left", self.left), ("left_before", self.left_before)):
            if places:
                data[name] = [[m.pid, m.path, m.at_unix_usec, m.moved_back] for m in places]
        if self.gone:
            data["gone"] = [
                [g.pid, g.name, g.mover_pid, g.mover, g.path, g.at_unix_usec] for g in self.gone
            ]
        counts = [self.gone_count, self.gone_before, self.main_moves, int(self.gone_more)]
        if any(counts):
            data["gone_counts"] = counts
        if self.facts:
            data["facts"] = [[f.what, f.source, f.at_unix_usec, f.level] for f in self.facts[:16]]
        return data

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Account:
        """The inverse of `plain`. Raises TypeError or ValueError."""
        began, before = (
            Baseline.from_plain(data[name]) if name in data else None
            for name in ("began", "baseline")
        )
        gone_count, gone_before, main_moves, gone_more = map(
            int, data.get("gone_counts", (0, 0, 0, 0))
        )
        return cls(
            facts=[Fact(*values) for values in data.get("facts", ())],
            asked=[Asked(Asker(by), *values) for by, *values in data.get("asked", ())],
            main_killed=bool(data.get("main_killed")),
            main_lost=bool(data.get("main_lost")),
            left=[Left(*values) for values in data.get("left", ())],
            left_before=[Left(*values) for values in data.get("left_before", ())],
            gone=[Gone(*values) for values in data.get("gone", ())],
            gone_count=gone_count,
            gone_more=bool(gone_more),
            gone_before=gone_before,
            main_moves=main_moves,
            began=began,
            baseline=before,
            commands=int(data.get("commands", 0)),
        )
