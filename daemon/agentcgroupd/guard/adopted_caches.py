"""File cache of adopted sessions. Their cgroups lie beside the pool's, so that its memory.stat does
not count it, and its limit does not make the kernel reclaim it."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from agentcgroupd.errors import KnobError
from agentcgroupd.guard.look import COLD_SLICE_NS, FileCache, file_cache
from agentcgroupd.state.session import Session
from agentcgroupd.units import CgroupId

FRESH_USEC = 1_000_000
"""Readings of adopted sessions that are older than this are not used."""


@dataclass(frozen=True, slots=True)
class _Read:
    at_usec: int
    session: Session
    cache: FileCache


class AdoptedCaches:
    """Reads the file cache of adopted sessions in turns, as many as fit into a slice of time:
    memory.stat costs the kernel more than any other file."""

    def __init__(
        self,
        adopted: Callable[[], Iterable[Session]],
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """`adopted`: the adopted sessions; `clock_ns` measures what reading costs."""
        self._adopted = adopted
        self._clock_ns = clock_ns
        self._read: OrderedDict[CgroupId, _Read] = OrderedDict()
        """By the id of the cgroup, the one whose turn is next first."""
        self.known = 0
        """How many sessions the last look told of."""

    def look(self, now_usec: int) -> FileCache:
        """Read those that are due; returns what is known of all of them."""
        adopted = {s.cgroup.id: s for s in self._adopted() if not s.closing}
        for gone in self._read.keys() - adopted.keys():
            del self._read[gone]
        new = [id for id in adopted if id not in self._read]
        end_ns = self._clock_ns() + COLD_SLICE_NS
        for id in itertools.chain(new, list(self._read)):
            session = adopted[id]
            try:
                cache = file_cache(session.cgroup)
            except KnobError:  # its runtime has just removed it, or it has no memory controller
                cache = FileCache(0, 0)
            self._read[id] = _Read(now_usec, session, cache)
            self._read.move_to_end(id)
            if self._clock_ns() >= end_ns:
                break
        known = [read.cache for read in self._known(now_usec)]
        self.known = len(known)
        return FileCache(
            sum(cache.cold_bytes for cache in known), sum(cache.clean_bytes for cache in known)
        )

    def cold(self, now_usec: int) -> list[tuple[Session, int]]:
        """List the sessions with cold file cache at the last look, each with its bytes."""
        known = self._known(now_usec)
        return [(r.session, r.cache.cold_bytes) for r in known if r.cache.cold_bytes]

    def _known(self, now_usec: int) -> Iterator[_Read]:
        return (r for r in self._read.values() if now_usec - r.at_usec <= FRESH_USEC)
