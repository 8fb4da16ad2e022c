"""Calls that hold a file lock for which somebody more important waits: git's index.lock by fcntl,
sqlite, caches of pip and npm.

To pause such a call pauses whoever waits as well, for as long as the lease. So the call is lent the
priority of who waits (priority inheritance: L. Sha, R. Rajkumar, J. P. Lehoczky, 1990) as long as
it holds the lock: by that it gets memory first, is paused last, and goes on first. Who waits in the
same session has no more priority to lend, so a session gains nothing by waiting for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from agentcgroupd.host.locks import Contested, contested
from agentcgroupd.host.proc import CgroupUnknown, cgroup_of
from agentcgroupd.state.session import Call, Session

log = logging.getLogger(__name__)

READ_USEC = 100_000
"""Between two readings of /proc/locks: the kernel walks all locks of the host for it."""


class LockHolders:
    """Lends priority to calls that hold others up (`Call.lent_priority`)."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        touched: Callable[[Call], None],
        read: Callable[[], list[Contested]] = contested,
    ) -> None:
        """`touched`: told of each call that this changes for."""
        self._sessions, self._touched, self._read = sessions, touched, read
        self._read_usec: int | None = None
        self._lent: dict[str, Call] = {}
        """Calls that have been lent priority, by id."""

    def update(self, now_usec: int) -> None:
        """Read the locks, unless that was done a moment ago. Raises OSError."""
        if self._read_usec is None or not 0 <= now_usec - self._read_usec < READ_USEC:
            self._read_usec = now_usec
            self._lend(self._wanted(self._read()))

    def clear(self) -> None:
        """Lend nothing any more: nobody is about to be paused."""
        self._lend([])

    def _lend(self, wanted: list[tuple[Call, int]]) -> None:
        lent = {call.id: (call, priority) for call, priority in wanted}
        for id, call in self._lent.items():
            lent.setdefault(id, (call, 0))
        for call, priority in lent.values():
            if call.lent_priority != priority:
                call.lent_priority = priority
                self._touched(call)
        self._lent = {id: call for id, (call, priority) in lent.items() if priority}

    def _wanted(self, locks: Iterable[Contested]) -> list[tuple[Call, int]]:
        """Find the calls that somebody more important waits for, with their priorities."""
        found: dict[str, tuple[Call, int]] = {}
        for lock in locks:
            _, holder = self._place_of(lock.holder)
            if holder is None:
                continue
            highest = max((self._priority_of(pid) for pid in lock.waiters), default=0)
            before = found.get(holder.id, (holder, 0))[1]
            if highest > max(holder.grant.priority, before):
                found[holder.id] = holder, highest
        return list(found.values())

    def _priority_of(self, pid: int) -> int:
        """Find the priority of who waits; 0: it is none of ours, or could not go on anyway."""
        session, call = self._place_of(pid)
        if call is not None:
            return 0 if call.frozen_since_usec is not None else call.grant.priority
        return 0 if session is None else session.limits.priority

    def _place_of(self, pid: int) -> tuple[Session | None, Call | None]:
        """Find the session and the outermost call that a process is in."""
        try:
            path = cgroup_of(pid)
        except (FileNotFoundError, ProcessLookupError, CgroupUnknown):
            return None, None
        for session in self._sessions.values():
            if path.startswith(f"{session.cgroup_path}/"):
                name = path[len(session.cgroup_path) + 1 :].partition("/")[0]
                outer = (c for c in session.calls.values() if c.parent is None)
                return session, next((c for c in outer if c.cgroup.path.name == name), None)
        return None, None
