"""Sessions of containers: made when a container runs, found again, and given its new limits.

All runtimes tell of their containers here, on the daemon's loop. A container is known by its cgroup
alone, so that it does not matter who tells of it, how often, or whether this daemon or an earlier
one has adopted it: a container that was restarted has a new cgroup at the old path. A session ends
with its cgroup, whoever removes that (sessions.lifecycle).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.config_containers import ContainerRule
from agentcgroupd.errors import CgroupGone, InvalidField, KnobError, RequestError
from agentcgroupd.runtime.engine import Change, Told
from agentcgroupd.runtime.labels import SHORT_ID, Container, other_id, wish_of
from agentcgroupd.runtime.place import HasEnded, NoPlace, cgroup_of_container
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)

WAITING_MOST = 4096
"""Containers that wait for another session to end; the oldest gives way."""


class Lifecycle(Protocol):
    """What is done to sessions."""

    def adopt(self, cgroup_path: str, spec: pb.SessionSpec) -> Session:
        """Make a session of a cgroup. Raises RequestError."""

    def reread(self, session: Session) -> None:
        """Take over limits that a runtime has changed on its container. Raises KnobError."""

    def look_at(self, session: Session) -> None:
        """Close an adopted session whose last process has ended."""


class Containers:
    """Makes sessions of containers. An observer of sessions, too (sessions.lifecycle)."""

    def __init__(
        self, rules: Sequence[ContainerRule], sessions: Sessions, notices: Notices
    ) -> None:
        """`rules`: which containers are sessions without labels."""
        self._rules, self._sessions, self._notices = rules, sessions, notices
        self._lifecycle: Lifecycle | None = None
        self._waiting: OrderedDict[str, tuple[str, Container]] = OrderedDict()
        """Containers whose session has to wait for the end of another one: its id, by theirs."""

    def begin(self, lifecycle: Lifecycle) -> None:
        """Make sessions from now on."""
        self._lifecycle = lifecycle

    def told(self, told: Told) -> None:
        """Deal with what a runtime tells. What cannot be done is said in the log, the audit log
        and the metrics, and never raised: the container runs on as it is."""
        container = told.container
        try:
            path = cgroup_of_container(container)
        except HasEnded:
            return
        except NoPlace as error:
            self._refused(container, str(error))
            return
        session = self._open_at(path)
        if session is None:
            # One that the operator has closed stays so when limits change.
            if told.change is Change.RUNS:
                self._adopt(container, path)
            return
        if container.id not in session.container:  # a runtime may be asked in two ways
            session.container = f"{container.runtime}:{container.id}"
        if told.change is Change.CHANGED:
            self._reread(session)

    def _open_at(self, path: str) -> Session | None:
        """The session of a cgroup, if it is of the one that is there now."""
        session = self._sessions.of_cgroup(path)
        if session is None or session.closing or session.cgroup_path != path:
            return None
        return session if session.cgroup.exists() else None

    def _adopt(self, container: Container, path: str) -> None:
        lifecycle, wish = self._lifecycle, wish_of(container, self._rules)
        if wish is None or lifecycle is None:
            return
        for clause in wish.ignored:
            self._tell("container_label_ignored", container, clause)
        before = self._sessions.of_cgroup(path) or self._sessions.open.get(wish.spec.id)
        if before is not None and self._is_over(before):
            # The container was restarted, and its old session is about to end.
            self._wait_for(before, container)
            lifecycle.look_at(before)
            return
        if wish.spec.id in self._sessions.open:
            wish.spec.id = other_id(wish.spec.id, container.id)
        try:
            session = self._adopted(lifecycle, container, path, wish.spec)
        except RequestError as error:
            if not _has_ended(container, path):
                self._refused(container, error.sentence)
            return
        session.container = f"{container.runtime}:{container.id}"
        self._notices.metrics.containers.labels(container.runtime, "session").inc()

    def _adopted(
        self, lifecycle: Lifecycle, container: Container, path: str, spec: pb.SessionSpec
    ) -> Session:
        """Adopt a container as its labels ask; where they cannot be used, with defaults. Raises
        RequestError."""
        try:
            return lifecycle.adopt(path, spec)
        except InvalidField as error:
            if error.field in ("id", "cgroup_path"):
                raise
            self._tell("container_label_ignored", container, error.sentence)
            return lifecycle.adopt(path, pb.SessionSpec(id=spec.id, labels=spec.labels))

    @staticmethod
    def _is_over(session: Session) -> bool:
        """Whether an adopted session has no process any more."""
        if session.closing:
            return True
        if not session.adopted:
            return False
        try:
            return not session.cgroup.populated()
        except CgroupGone:
            return True

    def _reread(self, session: Session) -> None:
        assert self._lifecycle is not None
        try:
            self._lifecycle.reread(session)
        except KnobError as error:
            log.warning("session %s: its container's limits: %s", session.id, error)

    def _wait_for(self, before: Session, container: Container) -> None:
        self._waiting[container.id] = (before.id, container)
        self._waiting.move_to_end(container.id)
        if len(self._waiting) > WAITING_MOST:
            _, (_, forgotten) = self._waiting.popitem(last=False)
            self._refused(forgotten, f"more than {WAITING_MOST} containers wait for a session")

    # Telling

    def _refused(self, container: Container, why: str) -> None:
        self._notices.metrics.containers.labels(container.runtime, "refused").inc()
        self._tell("container_refused", container, why)

    def _tell(self, event: str, container: Container, why: str) -> None:
        name, short = container.name[:64], container.id[:SHORT_ID]
        self._notices.audit.write(
            event, runtime=container.runtime, container=container.id[:64], name=name, why=why
        )
        log.warning("%s container %s (%s): %s", container.runtime, short, name, why)

    # As an observer of sessions

    def session_opened(self, session: Session) -> None:
        """Do nothing: no container waits for this."""

    def session_changed(self, session: Session) -> None:
        """Do nothing, likewise."""

    def session_given_back(self, session: Session) -> None:
        """Do nothing, likewise."""

    def session_closed(self, session: Session) -> None:
        """Let in the containers that have waited for the end of this session."""
        ready = [key for key, (before, _) in self._waiting.items() if before == session.id]
        for key in ready:
            _, container = self._waiting.pop(key)
            asyncio.get_running_loop().call_soon(self.told, Told(Change.RUNS, container))


def _has_ended(container: Container, path: str) -> bool:
    """Whether a container that could not be adopted has ended meanwhile, or is elsewhere by now."""
    try:
        return cgroup_of_container(container) != path
    except (HasEnded, NoPlace):
        return True
