"""What is known of the processes in agent leaves.

A process that was forked there has begun no call at first; then it may belong to a call that was
seen to begin; at last it has ended. It is in one of these states at a time, in this order. Only
`lives` and `runs` ask the kernel.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from agentcgroupd.bpf import abi
from agentcgroupd.host.syscalls import process_stat
from agentcgroupd.intents.parse import Intent
from agentcgroupd.state.session import Call, Session

ENDED_MAX = 65_536
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

Key = tuple[int, int]
"""(pid, start time in clock ticks), as in the daemon's other records of processes."""


def key_of(process: abi.Process) -> Key:
    """The key of the process that an event is about."""
    return process.pid, process.start_ns // TICK_NS


@dataclass(slots=True)
class Forked:
    """A process that was forked in an agent leaf and has begun no call."""

    session: Session
    comm: str
    """Name right after the fork, which is the name of its parent; empty: not known."""
    at_ns: int
    parent: Key = (0, 0)
    """The process that forked it; (0, 0): not known."""
    outside: bool = False
    """Whether a runtime's helper has forked it, which was put into the leaf from outside."""
    executed: bool = False
    quiet: bool = False
    """Whether it belongs to what only asks something for the agent, and so begins no call."""


@dataclass(slots=True, eq=False)
class ObservedCall:
    """A call that began with an exec in an agent leaf."""

    session: Session
    name: str
    argv: list[str]
    main: Key
    at_ns: int
    """Time of the exec (CLOCK_MONOTONIC)."""
    intent: Intent | None = None
    """What its environment says; None: that was not asked."""
    call: Call | None = None
    members: set[Key] = field(default_factory=set)
    exit: abi.ExitEvent | None = None
    refused: str = ""
    """Why it has no call; tried again when another call of the session has ended."""
    was_refused: bool = False
    is_cut: bool = False
    """Whether only the head of its arguments is known."""
    declared: bool = False
    """Whether the main process asked for a call before it could be moved; the report is that
    call's then."""


class KnownProcesses:
    """The state of each process that was seen in an agent leaf."""

    def __init__(self) -> None:
        self._forked: dict[Key, Forked] = {}
        self._seen: dict[Key, ObservedCall] = {}
        self._ended: dict[Key, None] = {}
        """The processes that ended last, the oldest first: a resync may find a process before its
        events are read, or still in its cgroup after its exit event."""

    def settled(self, key: Key) -> bool:
        """Whether a process is in a call or has ended, so that what else is heard of it is old."""
        return key in self._seen or key in self._ended

    def forked(self, key: Key) -> Forked | None:
        """The process as it was forked; None: it is unknown, or is in a call."""
        return self._forked.get(key)

    def seen(self, key: Key) -> ObservedCall | None:
        """The call that a process belongs to; None: it is in none."""
        return self._seen.get(key)

    def keys(self) -> list[Key]:
        """Keys of all processes that have not ended, as far as is known."""
        return [*self._forked, *self._seen]

    def without_call(self) -> bool:
        """Whether an observed call has no cgroup, so that only an exit event tells its end."""
        return any(observed.call is None for observed in self._seen.values())

    def refused(self, session: Session) -> set[ObservedCall]:
        """Observed calls of a session that were refused a cgroup."""
        return {o for o in self._seen.values() if o.session is session and o.refused}

    def fork(self, key: Key, forked: Forked) -> None:
        """Take in a process that was forked and is in no call."""
        self._forked[key] = forked

    def leave(self, key: Key) -> None:
        """Forget a process that has turned out to be an agent's own."""
        self._forked.pop(key, None)

    def join(self, observed: ObservedCall, key: Key) -> None:
        """Count a process, known or not, among those of an observed call."""
        self._forked.pop(key, None)
        self._seen[key] = observed
        observed.members.add(key)

    def end(self, key: Key) -> tuple[Forked | None, ObservedCall | None]:
        """Note that a process has ended; returns what was known of it, None for each that was
        not."""
        forked = self._forked.pop(key, None)
        observed = self._seen.pop(key, None)
        if observed is not None:
            observed.members.discard(key)
        if forked is not None or observed is not None:
            self._ended[key] = None
            if len(self._ended) > ENDED_MAX:
                del self._ended[next(iter(self._ended))]
        return forked, observed

    def drop(self, session: Session) -> None:
        """Forget the processes of a session."""
        for key in [k for k, forked in self._forked.items() if forked.session is session]:
            del self._forked[key]
        for key in [k for k, observed in self._seen.items() if observed.session is session]:
            del self._seen[key]

    def clear(self) -> None:
        """Forget all processes that have not ended."""
        self._forked.clear()
        self._seen.clear()


def lives(key: Key) -> bool:
    """Whether the very process of this key is there, if only as a zombie."""
    try:
        return process_stat(key[0]).start_ticks == key[1]
    except OSError:
        return False


def runs(key: Key) -> bool:
    """Whether the very process of this key is there and has not ended."""
    try:
        stat = process_stat(key[0])
    except OSError:
        return False
    return stat.start_ticks == key[1] and stat.state not in "ZX"
