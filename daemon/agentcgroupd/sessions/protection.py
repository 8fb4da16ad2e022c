"""Guarantees of memory, up to the slice.

The kernel caps what a cgroup is protected by at what its parent is (mm/page_counter.c:
effective_protection), so a session's memory.low is worth nothing unless the pool and all above it
have at least the sum. Whole sessions are protected where cgroup2 is mounted with
memory_recursiveprot; `agentcg doctor` says whether it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from mmap import PAGESIZE

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import KnobError
from agentcgroupd.sessions.pool import DELEGATE_XATTRS, Pool
from agentcgroupd.state.session import Session

log = logging.getLogger(__name__)

SLICE = "agentcg.slice"
"""The slice that comes with the daemon; memory.low of other cgroups above is not ours to set."""


class Protection:
    """Keeps memory.low of the pool, and of what is ours above it, at the sum of what the sessions
    in it are guaranteed."""

    def __init__(self, pool: Pool, sessions: Callable[[], Iterable[Session]]) -> None:
        """`sessions`: all that are open."""
        self._pool, self._sessions = pool, sessions
        self._above = _ours_above(pool) if "memory" in pool.controllers else []
        self._said = False

    def keep(self) -> None:
        """Set memory.low where it is not the sum. What cannot be set is logged once."""
        if "memory" not in self._pool.controllers:
            return
        inside = (s.limits.memory_low_bytes or 0 for s in self._sessions() if not s.adopted)
        wanted = sum(inside) // PAGESIZE * PAGESIZE
        for cgroup in (self._pool.cgroup, *self._above):
            try:
                if cgroup.read(knobs.MEMORY_LOW) != wanted:
                    cgroup.write(knobs.MEMORY_LOW, wanted)
            except KnobError as error:
                if not self._said:
                    self._said = True
                    log.error("guarantees of memory are not kept (said once): %s", error)

    def close(self) -> None:
        """Close the cgroups above; what is set stays, as the sessions do."""
        for cgroup in self._above:
            cgroup.close()
        self._above = []


def _ours_above(pool: Pool) -> list[Cgroup]:
    """Open the cgroups above a pool that are ours: those that systemd has delegated, and the
    slice. Raises OSError or KnobError."""
    found: list[Cgroup] = []
    path = pool.cgroup.path.parent
    while path != pool.mount:
        above = Cgroup.open(path)
        delegated = any(name in above.list_xattrs() for name in DELEGATE_XATTRS)
        if not above.has(knobs.MEMORY_LOW) or not (delegated or path.name == SLICE):
            above.close()
            break
        found.append(above)
        path = path.parent
    return found
