"""What is known of the processes in agent leaves: which were forked there and have begun no call,
which belong to a call that was seen to begin, and which have ended.

A process is in one of these at a time and goes through them in this order. Nothing here asks the
kernel, but for the few questions at the end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from agentcgroupd.bpf import abi
from agentcgroupd.host.syscalls import process_stat
from agentcgroupd.state.session import Call, Session

ENDED_MAX = 65_536
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

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


class Sightings:
    """All of them, by process."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._forked: dict[Key, Forked] = {}
        self._seen: dict[Key, Sighting] = {}
        self._ended: dict[Key, None] = {}
        """The newest that are known to have ended, the oldest first: a resync may find a process
        before its events are read, or still in its cgroup after its exit event."""

    def settled(self, key: Key) -> bool:
        """Whether it is in a call or has ended, so that what else is heard of it is old."""
        return key in self._seen or key in self._ended

    def forked(self, key: Key) -> Forked | None:
        """What is known of a process that has begun no call."""
        return self._forked.get(key)

    def seen(self, key: Key) -> Sighting | None:
        """The call it belongs to."""
        return self._seen.get(key)

    def keys(self) -> list[Key]:
        """All that have not ended, as far as is known."""
        return [*self._forked, *self._seen]

    def without_call(self) -> bool:
        """Whether there is one whose end only an exit event tells."""
        return any(sighting.call is None for sighting in self._seen.values())

    def refused(self, session: Session) -> set[Sighting]:
        """Those of a session that found no room for a call."""
        return {s for s in self._seen.values() if s.session is session and s.refused}

    def fork(self, key: Key, forked: Forked) -> None:
        """A process began, in no call."""
        self._forked[key] = forked

    def join(self, sighting: Sighting, key: Key) -> None:
        """A process, known or not, belongs to this call from now on."""
        self._forked.pop(key, None)
        self._seen[key] = sighting
        sighting.members.add(key)

    def end(self, key: Key) -> tuple[Forked | None, Sighting | None]:
        """A process has ended: what was known of it. Nothing, if it was known no longer."""
        forked = self._forked.pop(key, None)
        sighting = self._seen.pop(key, None)
        if sighting is not None:
            sighting.members.discard(key)
        if forked is not None or sighting is not None:
            self._ended[key] = None
            if len(self._ended) > ENDED_MAX:
                del self._ended[next(iter(self._ended))]
        return forked, sighting

    def drop(self, session: Session) -> None:
        """Forget a session's."""
        for forked in [k for k, f in self._forked.items() if f.session is session]:
            del self._forked[forked]
        for seen in [k for k, s in self._seen.items() if s.session is session]:
            del self._seen[seen]

    def clear(self) -> None:
        """Forget all that have not ended."""
        self._forked.clear()
        self._seen.clear()


def lives(key: Key) -> bool:
    """Whether that very process is there, if only as a zombie."""
    try:
        return process_stat(key[0]).start_ticks == key[1]
    except OSError:
        return False
