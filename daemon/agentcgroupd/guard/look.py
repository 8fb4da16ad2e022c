"""How the guard finds out what calls hold: by one program in the kernel that looks at all of them,
or, where the kernel takes no such program, by reading their files.

A file costs some 20 microseconds and there may be 10,000 calls, so the second way reads as many as
fit into a slice of time. A call with credit cannot grow far in between: when it has used that up,
the kernel wakes the daemon (guard.credit), which then reads it each time.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from agentcgroupd.bpf.look import LookProgram
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import BpfError, CgroupGone, KnobError
from agentcgroupd.policy.snapshot import CallView
from agentcgroupd.state.session import Call
from agentcgroupd.units import CgroupId

log = logging.getLogger(__name__)

SLICE_NS = 5_000_000
"""Time that one look spends on reading files."""
COLD_SLICE_NS = 2_000_000
"""Time that one look spends on memory.stat."""
STAYS_PART = 16
STAYS_MOST_BYTES = 256 << 20
"""File cache that does not count as free: a sixteenth of the pool, and no more than this. What runs
in a pool shares its programs and libraries; those of a coding agent and its tools are 100 to 200
MiB."""


@dataclass(slots=True, eq=False)
class Seen:
    """What was last seen of one call."""

    call: Call
    slot: int | None = None
    """Place in the program's map; None: its files are read."""
    at_usec: int | None = None
    """When it was looked at last, since boot; None: not yet."""
    memory_bytes: int = 0
    before_usec: int = 0
    before_bytes: int = 0
    """What it held when it was looked at before that."""
    cold_bytes: int = 0
    """File cache that nobody had touched lately, at `cold_usec`."""
    cold_usec: int | None = None
    gone: bool = False
    """Whether its cgroup has gone."""
    view: CallView | None = None
    """None: the policy is not to see it, or there is none yet."""


class CallLook(Protocol):
    """A way to find out what calls hold."""

    def opened(self, seen: Seen) -> None:
        """Look at a call from now on."""

    def closed(self, seen: Seen) -> None:
        """Look at it no more; its cgroup may be gone."""

    def look(self, now_usec: int, wanted: Iterable[Seen]) -> Iterable[Seen]:
        """Bring what is known of the calls in `wanted` up to date, as far as that can be had.
        Returns others that have moved, up to date as well."""


class FileLook:
    """Reads the files of the calls that are asked for."""

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        """`clock_ns` measures what reading costs."""
        self._clock_ns = clock_ns

    def opened(self, seen: Seen) -> None:
        """Do nothing: files are opened when they are read."""

    def closed(self, seen: Seen) -> None:
        """Do nothing, as in `opened`."""

    def look(self, now_usec: int, wanted: Iterable[Seen]) -> Iterable[Seen]:
        """Read as many as fit into the slice, those first that were read longest ago."""
        end_ns = self._clock_ns() + SLICE_NS
        for seen in sorted(wanted, key=_longest_ago):
            _read(seen, now_usec)
            if self._clock_ns() >= end_ns:
                break
        return ()


def _longest_ago(seen: Seen) -> int:
    return -1 if seen.at_usec is None else seen.at_usec


def _read(seen: Seen, now_usec: int) -> None:
    cgroup = seen.call.cgroup
    try:
        memory = cgroup.read(knobs.MEMORY_CURRENT)
    except CgroupGone:
        seen.gone = True
        return
    except KnobError as error:
        log.debug("call %s: %s", seen.call.id, error)
        return  # as it was last seen
    seen.before_usec, seen.before_bytes = seen.at_usec or now_usec, seen.memory_bytes
    seen.at_usec, seen.memory_bytes = now_usec, memory


def read_cold(wanted: Iterable[Seen], now_usec: int, slice_ns: int = COLD_SLICE_NS) -> None:
    """Read the file cache of as many calls as fit into a slice of time, those first that it was
    read of longest ago, or never: memory.stat costs the kernel more than any other file."""
    end_ns = time.perf_counter_ns() + slice_ns
    for seen in sorted(wanted, key=lambda s: -1 if s.cold_usec is None else s.cold_usec):
        try:
            seen.cold_bytes, seen.cold_usec = cold_cache(seen.call.cgroup), now_usec
        except CgroupGone:
            seen.gone = True
        except KnobError as error:
            log.debug("call %s: %s", seen.call.id, error)
        if time.perf_counter_ns() >= end_ns:
            break


def cold_cache(cgroup: Cgroup) -> int:
    """File cache in bytes that the kernel would take back first. Raises KnobError."""
    return file_cache(cgroup).cold_bytes


@dataclass(frozen=True, slots=True)
class FileCache:
    """File cache of a cgroup and all below it."""

    cold_bytes: int
    """Not touched lately: the kernel takes it back first, and nobody misses it."""
    clean_bytes: int
    """All of it that needs no writing first, the part in use included: the kernel takes it back
    before it ends anybody, and who needs a page of it again waits for the disk."""

    def freeable_bytes(self, limit_bytes: int) -> int:
        """What counts as free of a limit. Some stays, as in the kernel's own MemAvailable
        (mm/show_mem.c: si_mem_available): without the pages of the programs that run, all of them
        would wait for the disk all the time."""
        stays = min(self.clean_bytes // 2, limit_bytes // STAYS_PART, STAYS_MOST_BYTES)
        return max(self.cold_bytes, self.clean_bytes - stays)


def file_cache(cgroup: Cgroup) -> FileCache:
    """Read how much file cache there is, in one read of memory.stat. Raises KnobError."""
    stat = cgroup.read(knobs.MEMORY_STAT)
    cold = stat.get("inactive_file", 0)
    waits = stat.get("file_dirty", 0) + stat.get("file_writeback", 0)
    return FileCache(cold, max(0, cold + stat.get("active_file", 0) - waits))


class KernelLook:
    """Has the program look at all calls; those without a slot are read."""

    def __init__(self, program: LookProgram, root: Callable[[], CgroupId]) -> None:
        """`root`: the cgroup that all calls lie below."""
        self._program, self._root = program, root
        self._files = FileLook()
        self._of_slot: dict[int, Seen] = {}
        self._looked_usec: int | None = None
        self._works = True

    def opened(self, seen: Seen) -> None:
        """Give a call a slot; where there is none to be had, its files are read."""
        try:
            slot = self._program.add(seen.call.cgroup.id)
        except BpfError as error:
            log.error("call %s is read rather than looked at: %s", seen.call.id, error)
            return
        if slot is not None:
            seen.slot = slot
            self._of_slot[slot] = seen

    def closed(self, seen: Seen) -> None:
        """Take a call's slot back."""
        slot, seen.slot = seen.slot, None
        if slot is None:
            return
        del self._of_slot[slot]
        try:
            self._program.remove(seen.call.cgroup.id, slot)
        except BpfError as error:
            log.error("call %s is looked at for ever: %s", seen.call.id, error)

    def look(self, now_usec: int, wanted: Iterable[Seen]) -> Iterable[Seen]:
        """Look at all calls. What the program cannot tell is read."""
        listed = self._run()
        if listed is None:
            return self._files.look(now_usec, wanted)
        before_usec = now_usec if self._looked_usec is None else self._looked_usec
        self._looked_usec = now_usec
        moved = [seen for slot in listed if (seen := self._of_slot.get(slot)) is not None]
        unseen, rounds = [], self._program.rounds
        for seen in (*moved, *wanted):
            if not self._take(seen, now_usec, before_usec, rounds):
                unseen.append(seen)
        if unseen:
            self._files.look(now_usec, unseen)
        return moved

    def _run(self) -> list[int] | None:
        if not self._works:
            return None
        try:
            return self._program.look(self._root())
        except BpfError as error:
            if error.errno != errno.EINTR:
                self._works = False
                log.error("calls are read one by one from now on: %s", error)
            return None

    def _take(self, seen: Seen, now_usec: int, before_usec: int, rounds: int) -> bool:
        """Take over what the last look has found; False: it has not found this call."""
        slot, program = seen.slot, self._program
        if slot is None or program.seen_in(slot) != rounds:
            return False
        if seen.at_usec == now_usec:
            return True
        seen.before_usec, seen.before_bytes = before_usec, program.before_bytes(slot)
        if seen.at_usec is None:
            seen.before_usec, seen.before_bytes = now_usec, 0
        seen.at_usec, seen.memory_bytes = now_usec, program.usage_bytes(slot)
        return True
