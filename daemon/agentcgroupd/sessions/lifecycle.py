"""The life of a session: opened, adopted or found again; followed; closed, by whoever ends it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.sched import CpuNumbers
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import AgentcgroupdError, CgroupGone, FailedPrecondition, KnobError
from agentcgroupd.sessions.cgroups import SessionCgroups
from agentcgroupd.sessions.holding import agent_kills, killed_in_words
from agentcgroupd.sessions.limits import lacking_files
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.process import Process
from agentcgroupd.state.records import foreign_version
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.telemetry.wire import session_to_proto
from agentcgroupd.units import CgroupId, show_bytes

log = logging.getLogger(__name__)

ORPHANED = "the process that it ends with is gone"
CLOSED = "the operator closed it"
DONE = "its command ended"
"""Why a session was closed by the process that it ends with, which is `agentcg session run`."""


def _change(name: str, old: object, new: object) -> str:
    """Write a change of a limit as people read it: "memory_max from none to 1 GiB"."""
    field, _, unit = name.rpartition("_")
    if unit not in ("bytes", "millicores"):
        field, unit = name, ""

    def shown(value: object) -> str:
        if value is None:
            return "none"
        if not isinstance(value, int) or not unit:
            return str(value)
        return show_bytes(value) if unit == "bytes" else f"{value / 1000:g}"

    return f"{field} from {shown(old)} to {shown(new)}"


class SessionObserver(Protocol):
    """Whoever has to know which sessions there are."""

    def session_opened(self, session: Session) -> None:
        """The session's cgroup is there, with its agent leaf."""

    def session_changed(self, session: Session) -> None:
        """The session has other limits, or another priority."""

    def session_given_back(self, session: Session) -> None:
        """The processes of an adopted session are in their own cgroup again; it is still open."""

    def session_closed(self, session: Session) -> None:
        """The session's cgroup is gone, or given back to its runtime."""


class SessionCalls(Protocol):
    """The calls of sessions, as far as the end of a session concerns them."""

    async def end_calls(self, session: Session) -> int:
        """End all calls of a session that is closing, open or waiting; returns how many were open.
        Raises RequestError."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A session that has been closed."""

    calls_ended: int
    agent_kills: int | None
    """Processes of the agent itself that the kernel killed for want of memory; None: it does not
    count them here."""
    sentence: str
    """Why, where there were any."""


class SessionLifecycle:
    """Opens and closes sessions, tells observers, and notices what others do to their cgroups."""

    def __init__(
        self,
        cgroups: SessionCgroups,
        sessions: Sessions,
        pool: Pool,
        events: FileEvents,
        notices: Notices,
        calls: SessionCalls,
        cpu_numbers: Callable[[CgroupId], CpuNumbers | None],
        observers: Sequence[SessionObserver],
    ) -> None:
        """`cpu_numbers`: what the CPU scheduler counted of a cgroup; None: nothing. `observers`
        are told in their order."""
        self._cgroups = cgroups
        self._sessions = sessions
        self._pool = pool
        self._events = events
        self._notices = notices
        self._calls = calls
        self._cpu_numbers = cpu_numbers
        self._observers = observers
        self._closing: set[asyncio.Task[None]] = set()
        self.leftovers_removed = 0
        """Cgroups without an owner that were removed so far."""

    def describe(self, session: Session, admin: bool) -> pb.Session:
        """A session as sent, for the operator or for its own agent. Raises CgroupGone."""
        numbers = self._cpu_numbers(session.cgroup.id)
        lacking = self._pool.not_enforced() + lacking_files(session.cgroup, session.limits)
        return session_to_proto(session, admin, lacking, numbers)

    # Opening

    def open(self, spec: pb.SessionSpec, owner: Process | None = None) -> Session:
        """Make a session, which ends with its `owner`, if there is one. Raises RequestError; then
        nothing is left."""
        return self._opened(self._cgroups.make(spec, owner))

    def adopt(self, cgroup_path: str, spec: pb.SessionSpec) -> Session:
        """Make a session of an existing cgroup, split in place. Raises RequestError, with the
        cgroup as it was."""
        return self._opened(self._cgroups.adopt(cgroup_path, spec))

    def restore(self) -> Iterator[Session]:
        """Take up the sessions that an earlier daemon left, one after the other."""
        for session in self._cgroups.restore():
            self._remember(session)
            self._follow(session)
            yield session

    def _remember(self, session: Session) -> None:
        """Have a session kept in history, as it is now or, where that cannot be read, by its
        name."""
        try:
            described = self.describe(session, admin=True)
        except CgroupGone:
            described = pb.Session(id=session.id, opened_unix_usec=session.opened_unix_usec)
        self._notices.history.session_opened(described)

    def _opened(self, session: Session) -> Session:
        self._remember(session)
        self._follow(session)
        path, adopted = session.cgroup_path, session.adopted
        self._notices.audit.write(
            "session_opened", session=session.id, cgroup=path, adopted=adopted
        )
        log.info("session %s: %s (%s)", session.id, "adopted" if adopted else "opened", path)
        event = pb.Event(session_opened=self.describe(session, admin=True))
        self._notices.feed.publish(session.id, event)
        return session

    def _follow(self, session: Session) -> None:
        for observer in self._observers:
            observer.session_opened(session)
        if session.owner is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(session.owner.pidfd, self._owner_ended, session)
        if session.adopted:
            # Its cgroup belongs to a runtime: when it is empty, the session is over.
            session.watch = self._events.watch(
                session.cgroup,
                knobs.CGROUP_EVENTS,
                lambda: self._adopted_changed(session),
                session.turns_key,
            )

    def _owner_ended(self, session: Session) -> None:
        self._unwatch_owner(session)
        session.is_orphan = True
        log.info("session %s: %s", session.id, ORPHANED)
        self._close_soon(session, ORPHANED)

    @staticmethod
    def _unwatch_owner(session: Session) -> None:
        if session.owner is not None:
            asyncio.get_running_loop().remove_reader(session.owner.pidfd)

    def _adopted_changed(self, session: Session) -> None:
        try:
            if session.closing or session.cgroup.populated():
                return
        except CgroupGone:
            log.debug("session %s: its cgroup is gone", session.id)
        self._close_soon(session, "the last process of its container ended")

    # Changing

    async def change(self, session: Session, spec: pb.SessionSpec) -> Session:
        """Change limits of an open session. Raises RequestError, with nothing changed."""
        if session.closing or session.changing:
            what = "being closed" if session.closing else "being changed by another request"
            raise FailedPrecondition(f"session {session.id} is {what}")
        before, limits = session.limits, self._cgroups.changed(session, spec)
        session.changing = True
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, self._cgroups.write_changed, session, limits)
        finally:
            session.changing = False
        self._cgroups.keep_changed(session, limits)
        for observer in self._observers:
            observer.session_changed(session)
        changed = {
            name: [getattr(before, name), getattr(limits, name)]
            for name in (field.name for field in fields(limits))
            if getattr(before, name) != getattr(limits, name)
        }
        self._notices.audit.write("session_changed", session=session.id, limits=changed)
        words = (_change(name, *values) for name, values in changed.items())
        log.info("session %s: %s", session.id, ", ".join(words) or "its limits stay as they are")
        described = self.describe(session, admin=True)
        self._notices.history.session_opened(described)
        self._notices.feed.publish(session.id, pb.Event(session_changed=described))
        return session

    def reread(self, session: Session) -> None:
        """Take over the limits that a runtime has changed on its container, an adopted session,
        since they were read. Raises KnobError."""
        if session.closing or session.changing or not self._cgroups.reread(session):
            return
        for observer in self._observers:
            observer.session_changed(session)
        log.info("session %s: its runtime has changed its container's limits", session.id)
        described = self.describe(session, admin=True)
        self._notices.history.session_opened(described)
        self._notices.feed.publish(session.id, pb.Event(session_changed=described))

    # Closing

    def look_at(self, session: Session) -> None:
        """Close an adopted session whose last process has ended, if nobody closes it yet."""
        if session.adopted:
            self._adopted_changed(session)

    async def close(self, session: Session, why: str = CLOSED) -> Closed:
        """End a session's calls, then its agent. `why`: a clause. Raises RequestError or KnobError,
        and the session is then still open."""
        if session.closing:
            raise FailedPrecondition(f"session {session.id} is being closed already")
        session.closing = True
        try:
            ended = await self._calls.end_calls(session)
            last = self.describe(session, admin=True) if session.cgroup.exists() else None
            killed = agent_kills(session) if last is not None else None
            # Only the kernel's part waits in a thread; the books are the loop's alone.
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, self._cgroups.remove, session)
            if session.adopted:
                for observer in self._observers:
                    observer.session_given_back(session)
        except BaseException:
            session.closing = False
            raise
        self._unwatch_owner(session)
        self._cgroups.forget(session)
        if session.watch is not None:
            self._events.unwatch(session.watch)
        for observer in self._observers:
            observer.session_closed(session)
        self._notices.audit.write("session_closed", session=session.id, calls_ended=ended, why=why)
        self._notices.history.session_closed(session.id, last, why)
        log.info("session %s: closed, and %d calls with it", session.id, ended)
        event = pb.Event(session_closed=last or pb.Session(id=session.id))
        self._notices.feed.publish(session.id, event)
        self._notices.feed.end(session.id)
        return Closed(ended, killed, killed_in_words(session, killed))

    def _close_soon(self, session: Session, why: str) -> None:
        task = asyncio.get_running_loop().create_task(self._close_quietly(session, why))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_quietly(self, session: Session, why: str) -> None:
        try:
            await self.close(session, why)
        except AgentcgroupdError as error:
            log.warning("session %s could not be closed: %s", session.id, error)

    def stop(self) -> None:
        """Give up closing sessions that nobody asked to be closed; the next daemon does it."""
        for task in self._closing:
            task.cancel()

    # Housekeeping

    def sweep(self) -> Iterator[None]:
        """Remove cgroups that nobody owns, and close sessions whose cgroup was removed, one a
        step."""
        for cgroup in self._sessions.unknown():
            if cgroup is not None:
                self._remove_leftover(cgroup)
            yield
        for session in list(self._sessions.open.values()):
            if session.closing:
                continue
            if not session.cgroup.exists():
                log.warning("session %s: its cgroup was removed by someone else", session.id)
                self._close_soon(session, "its cgroup was removed by someone else")
            elif session.is_orphan:
                self._close_soon(session, ORPHANED)
            yield

    @staticmethod
    def _foreign_version(cgroup: Cgroup) -> object:
        """The version of a record that this daemon cannot read; None: there is no such record.
        Raises KnobError."""
        raw = cgroup.get_xattr()
        return foreign_version(raw, "session") or foreign_version(raw, "call")

    def _remove_leftover(self, cgroup: Cgroup) -> None:
        """Remove an empty cgroup. One with processes is not ours to kill, and is named in the
        log."""
        try:
            if (version := self._foreign_version(cgroup)) is not None:
                log.warning(
                    "%s has a record of version %s, of another agentcgroupd; it is left alone",
                    cgroup.path,
                    version,
                )
                return
            if cgroup.populated():
                log.warning("%s has processes but no record; it is left alone", cgroup.path)
                return
            cgroup.remove()
        except KnobError as error:
            log.warning("leftover %s: %s", cgroup.path, error)
            return
        self.leftovers_removed += 1
        self._notices.metrics.leftovers.inc()
        log.info("removed leftover %s", cgroup.path)
