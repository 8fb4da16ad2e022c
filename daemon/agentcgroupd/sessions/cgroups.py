"""Cgroups of sessions: made, split from a container's, removed, given back, found again."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import XATTR_NAME, Cgroup, move_all
from agentcgroupd.config import SessionDefaults
from agentcgroupd.errors import (
    AlreadyExists,
    CgroupGone,
    FailedPrecondition,
    InvalidField,
    KnobError,
    NotFound,
    Unavailable,
)
from agentcgroupd.intents.gpu import GpuCeiling
from agentcgroupd.intents.gpu_part import Part, gpu_part
from agentcgroupd.intents.grant import weight_of_priority
from agentcgroupd.intents.parse import parse_intent
from agentcgroupd.sessions.containers import (
    DISK_WEIGHTS,
    agent_leaf,
    as_written,
    changed_by_runtime,
    check_processes,
    runtimes_disk_weights,
    runtimes_weights,
    weights_left_to_runtime,
    with_changed,
    with_weights,
)
from agentcgroupd.sessions.holding import used_for_good
from agentcgroupd.sessions.limits import (
    as_found,
    change_limits,
    clear_oom_group,
    drop_latency,
    parse_limits,
    read_limits,
    tighten,
    write_disk_limits,
    write_found,
    write_limits,
)
from agentcgroupd.sessions.merging import merge
from agentcgroupd.sessions.pool import Pool, offered_controllers
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.process import Process
from agentcgroupd.state.records import RECORD_VERSION, read_record
from agentcgroupd.state.session import AGENT_LEAF, Session, SessionLimits, unix_usec
from agentcgroupd.units import parse_labels, show_bytes

log = logging.getLogger(__name__)

ID_ALLOWED = "1 to 63 characters of a-z, 0-9, '_', '.' and '-', starting with a letter or digit"
_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
ADOPTED_XATTR = "trusted.agentcgroup.adopted."
"""On the pool, one for each adopted cgroup: its id in the name, its path as the value."""
GPU_FIELDS = ("gpu", "gpu_memory", "gpu_priority", "gpu_device")


class SessionCgroups:
    """Makes the cgroups of sessions and enters them into the books."""

    def __init__(
        self,
        defaults: SessionDefaults,
        pool: Pool,
        sessions: Sessions,
        gpus: Callable[[], GpuCeiling],
        place_gpu: Callable[[Part], tuple[str, ...]],
    ) -> None:
        """`gpus`: what there is of GPUs now; `place_gpu`: finds the devices for a part of GPUs, and
        raises ResourceExhausted."""
        self._defaults = defaults
        self._pool = pool
        self._sessions = sessions
        self._gpus = gpus
        self._place_gpu = place_gpu

    def _limits_for(self, spec: pb.SessionSpec) -> SessionLimits:
        """Limits of a session that may be opened. Raises RequestError."""
        limits = parse_limits(spec, self._defaults, self._pool.memory_max_bytes)
        self._check_id(spec.id)
        self._check_guarantee(spec, limits)
        return self._with_gpus(spec, limits)

    def _check_id(self, session_id: str) -> None:
        if not _ID.fullmatch(session_id):
            raise InvalidField("id", session_id, ID_ALLOWED)
        if session_id in self._sessions.open:
            sentence = f"session {session_id!r} is open already"
            raise AlreadyExists(sentence, "id", session_id, "a name that no open session has")

    def _check_guarantee(self, spec: pb.SessionSpec, limits: SessionLimits) -> None:
        """Refuse a guarantee that the pool could not keep beside those of the other sessions.
        Raises InvalidField."""
        low, most = limits.memory_low_bytes, self._pool.memory_max_bytes
        if low is None or most is None:
            return
        sessions = [s for s in self._sessions.open.values() if s.id != spec.id]
        others = sum(s.limits.memory_low_bytes or 0 for s in sessions)
        if low + others > most:
            why = (
                f"the pool has {show_bytes(most)}, of which {show_bytes(others)} are guaranteed to "
                "other sessions"
            )
            allowed = f"at most {show_bytes(most - others)}"
            raise InvalidField("memory_low", spec.memory_low, allowed, why)

    def _with_gpus(self, spec: pb.SessionSpec, limits: SessionLimits) -> SessionLimits:
        """The limits with a part of GPUs for the agent itself, where one is asked for. Raises
        InvalidField or ResourceExhausted."""
        intent = parse_intent({name: getattr(spec, name) for name in GPU_FIELDS})
        part = gpu_part(intent, self._gpus(), limits.priority, 100, [])
        if part is None:
            return limits
        return replace(
            limits,
            gpu_percent=part.percent,
            gpu_memory_bytes=part.memory_bytes,
            gpu_priority=part.priority,
            gpu_devices=self._place_gpu(part),
        )

    # Making

    def make(self, spec: pb.SessionSpec, owner: Process | None = None) -> Session:
        """Make a session's cgroup and agent leaf. `owner`: the process that it ends with, which is
        copied. Raises RequestError; then nothing is left."""
        limits, labels = self._limits_for(spec), parse_labels("labels", spec.labels)
        path = f"{self._pool.path}/{spec.id}"
        try:
            made = self._pool.cgroup.make_child(spec.id)
        except KnobError as error:
            if isinstance(error, CgroupGone):
                sentence = (
                    f"the pool's cgroup {self._pool.path} was removed; the daemon starts anew"
                )
                raise Unavailable(sentence) from None
            if error.errno != errno.EEXIST:
                raise Unavailable(f"cgroup {path} cannot be made: {error}") from None
            sentence = f"cgroup {path} is there already and is not a session: {error}"
            raise AlreadyExists(sentence, "id", spec.id) from None
        try:
            return self._set_up(
                Cgroup.open(made.path), path, spec.id, limits, labels, {}, owner=owner
            )
        except (KnobError, OSError) as error:
            made.remove()
            raise Unavailable(f"the session's limits could not be set: {error}") from None

    def _set_up(
        self,
        cgroup: Cgroup,
        path: str,
        session_id: str,
        limits: SessionLimits,
        labels: dict[str, str],
        found: dict[str, str],
        weights: frozenset[str] = frozenset(),
        owner: Process | None = None,
    ) -> Session:
        """Put limits, agent leaf and record on a cgroup that holds no processes of its own.
        `weights`: files of those that stay as a runtime has set them."""
        owner = owner.copy() if owner is not None else None
        try:
            disks = {knob.file for knob in DISK_WEIGHTS} & weights & found.keys()
            write_limits(cgroup, limits, {file: found[file] for file in disks})
            cgroup.enable(offered_controllers(cgroup))
            agent = agent_leaf(cgroup)
            session = Session(
                id=session_id,
                cgroup=cgroup,
                agent=agent,
                cgroup_path=path,
                limits=limits,
                opened_unix_usec=unix_usec(),
                labels=labels,
                adopted=path.rpartition("/")[0] != self._pool.path,
                found=found,
                offered=agent.files(),
                owner=owner,
                written=as_written(cgroup, weights) if found else {},
            )
            cgroup.set_xattr(session.record())
        except BaseException:
            cgroup.close()
            if owner is not None:
                owner.close()
            raise
        self._add(session)
        return session

    def _add(self, session: Session) -> None:
        session.reports = type(session.reports)(maxlen=self._defaults.reports_kept)
        self._sessions.add(session)

    def adopt(self, cgroup_path: str, spec: pb.SessionSpec) -> Session:
        """Split an existing cgroup in place: its processes go to agent/, its controllers to the
        calls beside it. Raises RequestError, with the cgroup as it was."""
        limits, labels = self._limits_for(spec), parse_labels("labels", spec.labels)
        path = str(PurePosixPath("/") / cgroup_path.strip("/"))
        self._check_adoptable(path)
        try:
            cgroup = Cgroup.open(self._pool.mount / path.strip("/"))
        except OSError:
            sentence = f"there is no cgroup {path} below {self._pool.mount}"
            raise NotFound(sentence, "cgroup_path", cgroup_path) from None
        check_processes(cgroup, path)
        found = read_limits(cgroup)
        adopted = f"{ADOPTED_XATTR}{cgroup.id}"
        try:
            # Before anything is changed: a daemon that is killed meanwhile has its successor undo
            # what was done.
            self._pool.cgroup.set_xattr(path.encode(), adopted)
            cgroup.set_xattr(_split_record(found))
            agent = agent_leaf(cgroup)
        except KnobError as error:
            for marked, name in ((cgroup, XATTR_NAME), (self._pool.cgroup, adopted)):
                marked.remove_xattr(name)
            cgroup.close()
            raise FailedPrecondition(f"cgroup {path} cannot be split: {error}") from None
        try:
            move_all(cgroup, agent)
            weights = weights_left_to_runtime(spec)
            limits = with_weights(tighten(cgroup.read_if, limits), cgroup.read_if, weights)
            clear_oom_group(cgroup)
            return self._set_up(cgroup, path, spec.id, limits, labels, found, weights)
        except (KnobError, OSError) as error:
            again = Cgroup.open(self._pool.mount / path.strip("/"))
            self._give_back(again, found)
            again.close()
            raise Unavailable(f"cgroup {path} could not be adopted: {error}") from None

    def _check_adoptable(self, path: str) -> None:
        inside = path == self._pool.path or path.startswith(f"{self._pool.path}/")
        above = self._pool.path.startswith(f"{path.rstrip('/')}/") or path == "/"
        of_session = self._sessions.of_cgroup(path)
        why = ""
        if of_session is not None:
            why = f"it belongs to session {of_session.id}"
        elif inside:
            why = "it is in the pool"
        elif above:
            why = "the pool is in it"
        elif ".." in path:
            why = "'..' leads out of it"
        if why:
            allowed = "a cgroup beside the pool, of no other session"
            raise InvalidField("cgroup_path", path, allowed, why)

    # Changing

    def changed(self, session: Session, spec: pb.SessionSpec) -> SessionLimits:
        """Limits of an open session as a request wants them. Raises RequestError."""
        for field in GPU_FIELDS:
            if text := getattr(spec, field):
                why = "the part of GPUs of a session's agent is set when it is opened"
                raise InvalidField(field, text, "nothing here", why)
        if spec.labels:
            why = "labels of a session are set when it is opened"
            shown = ",".join(f"{key}={value}" for key, value in sorted(spec.labels.items()))
            raise InvalidField("labels", shown, "nothing here", why)
        limits = change_limits(spec, session.limits, self._pool.memory_max_bytes)
        if spec.memory_low:
            self._check_guarantee(spec, limits)
        if session.adopted:
            limits = tighten(as_found(session.found), limits)
            limits = self._with_own_weights(session, spec, limits)
        top = limits.memory_max_bytes
        held = used_for_good(session.cgroup) if spec.memory_max and top is not None else None
        if held is not None and top is not None and top < held:
            why = "the kernel would kill processes of the session"
            allowed = f"at least what it holds now ({show_bytes(held)})"
            raise InvalidField("memory_max", spec.memory_max, allowed, why)
        return limits

    @staticmethod
    def _with_own_weights(
        session: Session, spec: pb.SessionSpec, limits: SessionLimits
    ) -> SessionLimits:
        """The new limits of an adopted session, where a priority takes the place of the weights
        that it had from its runtime."""
        if not spec.priority:
            return limits
        weight, theirs = weight_of_priority(limits.priority), runtimes_weights(session)
        if not spec.cpu_weight and knobs.CPU_WEIGHT.file in theirs:
            limits = replace(limits, cpu_weight=weight)
        if not spec.io_weight and any(knob.file in theirs for knob in DISK_WEIGHTS):
            limits = replace(limits, io_weight=weight)
        return limits

    def write_changed(self, session: Session, limits: SessionLimits) -> None:
        """Write new limits, or all of the old ones again where one cannot be. May block, while the
        kernel reclaims what is above them: for a thread of its own. Raises KnobError."""
        if session.slowed:
            # Its lower weight stays until the guard lets go of it.
            limits = replace(limits, cpu_weight=session.cgroup.read(knobs.CPU_WEIGHT))
        theirs = runtimes_disk_weights(session)
        kept = theirs if limits.io_weight == session.limits.io_weight else {}
        try:
            write_limits(session.cgroup, limits, kept)
            if limits.io_latency_usec is None and session.limits.io_latency_usec is not None:
                drop_latency(session.cgroup, session.found)
        except CgroupGone:
            raise
        except KnobError:
            write_limits(session.cgroup, session.limits, theirs)
            raise

    def keep_changed(self, session: Session, limits: SessionLimits) -> None:
        """Keep new limits that have been written. Raises KnobError."""
        theirs, before, session.limits = runtimes_weights(session), session.limits, limits
        if session.adopted:
            if limits.cpu_weight != before.cpu_weight:
                theirs -= {knobs.CPU_WEIGHT.file}
            if limits.io_weight != before.io_weight:
                theirs -= {knob.file for knob in DISK_WEIGHTS}
            session.written = as_written(session.cgroup, theirs)
        session.cgroup.set_xattr(session.record())

    @staticmethod
    def reread(session: Session) -> bool:
        """Take over limits that a runtime has changed on its container; what it has set stays, but
        for memory.oom.group, and for a CPU weight where the session has one of its own. Returns
        whether its limits are others now. Raises KnobError."""
        changed = changed_by_runtime(session)
        if not changed:
            return False
        before, theirs = session.limits, runtimes_weights(session)
        session.found |= changed
        session.written |= {f: text for f, text in changed.items() if f in session.written}
        limits = with_changed(session.limits, changed)
        session.limits = with_weights(limits, as_found(session.found), theirs)
        session.cgroup.set_xattr(session.record())
        clear_oom_group(session.cgroup)
        if knobs.CPU_WEIGHT.file in changed.keys() - theirs:
            session.cgroup.write(knobs.CPU_WEIGHT, session.limits.cpu_weight)
        return session.limits != before

    # Closing

    def remove(self, session: Session) -> None:
        """Remove the cgroup of a session whose calls have ended: its agent is killed, or, for an
        adopted cgroup, put back to where it was found. May block: for a thread of its own.

        Raises KnobError, and the session is then still there.
        """
        try:
            if session.adopted:
                kept = changed_by_runtime(session)
                self._give_back(session.cgroup, {**session.found, **kept})
            else:
                session.cgroup.kill_and_remove()
        except CgroupGone:
            log.info("session %s: its cgroup is gone already", session.id)
        except KnobError:
            if session.adopted:
                self._split_again(session)
            raise

    @staticmethod
    def _split_again(session: Session) -> None:
        """Have an adopted session go on that could not be given back: what was undone of its split
        is done again, as far as that is possible."""
        cgroup = session.cgroup
        try:
            if AGENT_LEAF not in set(cgroup.children()):
                session.agent = cgroup.make_child(AGENT_LEAF)
            move_all(cgroup, session.agent)
            write_limits(cgroup, session.limits, runtimes_disk_weights(session))
            clear_oom_group(cgroup)
            cgroup.enable(offered_controllers(cgroup))
        except KnobError as error:
            log.error("session %s: its cgroup is no longer split: %s", session.id, error)
        cgroup.set_xattr(session.record())

    def forget(self, session: Session) -> None:
        """Drop a session from the books and give up its directory; its cgroup is not touched."""
        self._sessions.drop(session)
        if session.adopted:
            self._pool.cgroup.remove_xattr(f"{ADOPTED_XATTR}{session.cgroup.id}")
        session.cgroup.close()
        if session.owner is not None:
            session.owner.close()
            session.owner = None

    def _give_back(self, cgroup: Cgroup, found: dict[str, str]) -> None:
        """Undo a split: controllers off, processes back, agent leaf gone, limits as they were. It
        may have been undone in part. Raises KnobError."""
        # Killed from here on, the daemon has its successor do the rest.
        cgroup.set_xattr(_split_record(found))
        merge(cgroup, AGENT_LEAF)
        write_found(cgroup, found)
        cgroup.remove_xattr()
        self._pool.cgroup.remove_xattr(f"{ADOPTED_XATTR}{cgroup.id}")

    # Finding again

    def restore(self) -> Iterator[Session]:
        """Find the sessions that an earlier daemon left by their records, and enter them into the
        books."""
        for name in self._pool.cgroup.children():
            path = f"{self._pool.path}/{name}"
            session = self._restore_one(self._pool.cgroup.path / name, path)
            if session is not None:
                yield session
        for xattr in self._pool.cgroup.list_xattrs():
            if not xattr.startswith(ADOPTED_XATTR):
                continue
            path = (self._pool.cgroup.get_xattr(xattr) or b"").decode("utf-8", "replace")
            session = self._restore_one(self._pool.mount / path.strip("/"), path)
            if session is not None and f"{ADOPTED_XATTR}{session.cgroup.id}" == xattr:
                yield session
            else:
                self._undo_split(self._pool.mount / path.strip("/"), xattr)

    def _undo_split(self, directory: Path, xattr: str) -> None:
        """Give back a cgroup that was being adopted or given back when an earlier daemon was
        killed, and forget what is gone or was made by others since. `xattr`: its mark on the
        pool."""
        try:
            cgroup = Cgroup.open(directory)
        except OSError:
            self._pool.cgroup.remove_xattr(xattr)
            return
        try:
            data = read_record(cgroup.get_xattr(), "split")
            if data is None or f"{ADOPTED_XATTR}{cgroup.id}" != xattr:
                self._pool.cgroup.remove_xattr(xattr)
                return
            self._give_back(cgroup, dict(data["found"]))
            log.info("%s was half adopted or given back; it is as it was found", directory)
        except (KeyError, TypeError, ValueError, KnobError) as error:
            log.error("%s cannot be given back: %s", directory, error)
        finally:
            cgroup.close()

    def _restore_one(self, directory: Path, path: str) -> Session | None:
        try:
            cgroup = Cgroup.open(directory)
        except OSError:
            return None
        try:
            data = read_record(cgroup.get_xattr(), "session")
            if data is None:
                raise ValueError("no record of ours")
            agent = cgroup.child(AGENT_LEAF)
            session = Session(
                id=str(data["id"]),
                cgroup=cgroup,
                agent=agent,
                cgroup_path=path,
                limits=_limits_of_record(data["limits"]),
                opened_unix_usec=int(data["opened_unix_usec"]),
                # A record of an earlier daemon has none.
                labels=parse_labels("labels", dict(data.get("labels", {}))),
                adopted=bool(data["adopted"]),
                found=dict(data["found"]),
                written=dict(data.get("written", {})),
                offered=agent.files(),
            )
            if data.get("owner") is not None:
                session.owner = Process.find(*data["owner"])
                session.is_orphan = session.owner is None
            if cgroup.has(knobs.CPU_WEIGHT):
                # An earlier daemon may have been killed while it had lowered the weight.
                cgroup.write(knobs.CPU_WEIGHT, session.limits.cpu_weight)
            if session.adopted and self.reread(session):
                log.info("session %s: its runtime has changed its container's limits", session.id)
            # It may have known nothing of these, or bfq has come since.
            write_disk_limits(cgroup, session.limits, runtimes_disk_weights(session))
        except (KeyError, TypeError, ValueError, KnobError) as error:
            log.warning("%s is not a session that can be taken up: %s", directory, error)
            cgroup.close()
            return None
        self._add(session)
        return session


def _split_record(found: dict[str, str]) -> bytes:
    """What is kept on a cgroup while it is being adopted or given back: what its interface files
    held before."""
    return json.dumps({"v": RECORD_VERSION, "kind": "split", "found": found}).encode()


def _limits_of_record(data: dict[str, Any]) -> SessionLimits:
    """Limits from a record, where lists stand for tuples."""
    # A record of an earlier daemon has no weight for disks.
    since = {"io_weight": weight_of_priority(data["priority"]), **data}
    return SessionLimits(**{**since, "gpu_devices": tuple(data.get("gpu_devices", ()))})
