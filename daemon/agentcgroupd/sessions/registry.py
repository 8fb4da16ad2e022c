"""The open sessions: by id, and by the cgroup that a process is in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import CgroupGone, NotFound, PermissionDenied
from agentcgroupd.host.proc import CgroupUnknown, cgroup_of
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import CALL_PREFIX, Call, Session

log = logging.getLogger(__name__)


class Sessions:
    """All open sessions, by id and by where they are. Only `sessions.cgroups` adds and drops."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.open: dict[str, Session] = {}
        self._by_path: dict[str, Session] = {}
        self._depths: Counter[int] = Counter()
        """How many sessions lie so deep below the mount."""

    def add(self, session: Session) -> None:
        """Enter a session whose cgroup is there into the books."""
        self.open[session.id] = session
        if session.cgroup_path not in self._by_path:
            self._depths[session.cgroup_path.count("/")] += 1
        self._by_path[session.cgroup_path] = session

    def drop(self, session: Session) -> None:
        """Take a session out of the books; its cgroup is not touched."""
        self.open.pop(session.id, None)
        if self._by_path.pop(session.cgroup_path, None) is not None:
            depth = session.cgroup_path.count("/")
            self._depths[depth] -= 1
            if not self._depths[depth]:
                del self._depths[depth]

    def get(self, session_id: str) -> Session:
        """The open session of that id. Raises NotFound."""
        session = self.open.get(session_id)
        if session is None:
            raise NotFound(f"no session {session_id[:64]!r} is open", "session_id", session_id)
        return session

    def of_cgroup(self, path: str) -> Session | None:
        """The session that a process in the cgroup `path` (as in /proc/<pid>/cgroup) belongs to."""
        # Who calls chooses how deep its cgroup lies: names of one letter make some 2,000 of them in
        # a path. So only what lies as deep as a session is looked up.
        deepest = max(self._depths, default=0)
        names = path.split("/", deepest + 1)
        for depth in sorted(self._depths, reverse=True):
            if depth < len(names):
                session = self._by_path.get("/".join(names[: depth + 1]))
                if session is not None:
                    return session
        return None

    def place_of(self, pid: int) -> tuple[Session, str] | None:
        """The session that a process is in, and the name of the leaf of it; None: in none, or it
        has ended."""
        try:
            path = cgroup_of(pid)
        except (FileNotFoundError, ProcessLookupError):
            return None
        except CgroupUnknown as error:
            log.warning("process %d is taken to be in no session: %s", pid, error)
            return None
        session = self.of_cgroup(path)
        if session is None:
            return None
        return session, path[len(session.cgroup_path) :].strip("/").partition("/")[0]

    def call_of(self, session: Session, path: str) -> Call | None:
        """Find the innermost open call that a process of a session is in, from its cgroup `path`;
        None: the process is the agent's own. Raises PermissionDenied in what is left of a call that
        has ended."""
        found: Call | None = None
        for name in path[len(session.cgroup_path) :].strip("/").split("/"):
            call = session.calls.get(name.removeprefix(CALL_PREFIX))
            # A tool may give a cgroup of its own any name, also that of another call.
            if name.startswith(CALL_PREFIX) and call is not None and call.parent is found:
                found = call
                continue
            if name.startswith(CALL_PREFIX) and found is None:
                raise PermissionDenied(f"this process is in {name}, a call that has ended")
            break
        return found

    # What is there besides

    def unknown(self) -> Iterator[Cgroup | None]:
        """Cgroups in the pool that are no session, and those in sessions that are no open call.
        None stands for one more session that has been looked at."""
        for name in [name for name in self._pool.cgroup.children() if name not in self.open]:
            yield from _child_if_there(self._pool.cgroup, name)
        for session in list(self.open.values()):
            # Others may have been closed while this one waited for its step.
            if self.open.get(session.id) is session:
                yield from _unknown_in(session)
            yield None


def _unknown_in(session: Session) -> Iterator[Cgroup]:
    """Cgroups in a session that are named as calls and are none."""
    known = {c.cgroup.path.name for c in session.calls.values() if c.parent is None}
    try:
        names = [] if session.closing else list(session.cgroup.children())
    except CgroupGone:
        return  # the sweep closes it
    for name in names:
        if name.startswith(CALL_PREFIX) and name not in known:
            yield from _child_if_there(session.cgroup, name)
    for call in list(session.calls.values()):
        yield from _unknown_inside(call)


def _unknown_inside(call: Call) -> Iterator[Cgroup]:
    """Cgroups in a split call that are named as calls and are none."""
    if call.main_leaf is None:
        return
    known = {inner.cgroup.path.name for inner in call.inner.values()}
    try:
        names = list(call.cgroup.children())
    except CgroupGone:
        return
    for name in names:
        if name.startswith(CALL_PREFIX) and name not in known:
            yield from _child_if_there(call.cgroup, name)


def _child_if_there(parent: Cgroup, name: str) -> Iterator[Cgroup]:
    try:
        yield parent.child(name)
    except CgroupGone:
        log.debug("%s/%s has just gone", parent.path, name)
