"""Opening, adopting, closing and finding again of sessions."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob, T
from agentcgroupd.cgroup.tree import Cgroup, move_all
from agentcgroupd.config import Config
from agentcgroupd.errors import (
    AlreadyExists,
    CgroupGone,
    FailedPrecondition,
    InvalidField,
    KnobError,
    NotFound,
    Unavailable,
)
from agentcgroupd.host.proc import CgroupUnknown, cgroup_of
from agentcgroupd.intents.gpu import GpuCeiling
from agentcgroupd.intents.gpu_part import Part, gpu_part
from agentcgroupd.intents.grant import Ceiling, weight_of_priority
from agentcgroupd.intents.parse import parse_intent
from agentcgroupd.sessions.pool import Pool, offered_controllers
from agentcgroupd.state.session import (
    AGENT_LEAF,
    CALL_PREFIX,
    Session,
    SessionLimits,
    read_record,
    unix_usec,
)
from agentcgroupd.units import (
    parse_bytes,
    parse_cores,
    parse_count,
    parse_priority,
    show_bytes,
)

log = logging.getLogger(__name__)

ID_ALLOWED = "1 to 63 characters of a-z, 0-9, '_', '.' and '-', starting with a letter or digit"
_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
AGENT_MEMORY_INTERVAL_S = 1.0
ADOPTED_XATTR = "trusted.agentcgroup.adopted."
"""On the pool, one for each adopted cgroup: its id in the name, its path as the value."""


class Sessions:
    """All open sessions, by id and by where they are."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self._config = config
        self._pool = pool
        self.open: dict[str, Session] = {}
        self._by_path: dict[str, Session] = {}
        self.gpus: Callable[[], GpuCeiling] = GpuCeiling
        """What there is of GPUs."""
        self.place_gpu: Callable[[Part], tuple[str, ...]] = lambda part: ()
        """Finds the devices for a part. Raises ResourceExhausted."""

    # Looking up

    def get(self, session_id: str) -> Session:
        """The open session of that id. Raises NotFound."""
        session = self.open.get(session_id)
        if session is None:
            raise NotFound(f"no session {session_id[:64]!r} is open", "session_id", session_id)
        return session

    def of_cgroup(self, path: str) -> Session | None:
        """The session that a process in the cgroup `path` (as in /proc/<pid>/cgroup) belongs to."""
        for above in (path, *map(str, PurePosixPath(path).parents)):
            session = self._by_path.get(above)
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

    def ceiling(self, session: Session) -> Ceiling:
        """The limits above a new call of this session."""
        limits, calls = session.limits, self._config.calls
        tops = [top for top in (limits.memory_max_bytes, self._pool.memory_max_bytes) if top]
        return Ceiling(
            memory_max_bytes=min(tops) if tops else None,
            agent_memory_bytes=self._agent_memory(session) if tops else 0,
            cpu_millicores=min(limits.cpu_max_millicores or self._pool.cpu_millicores,
                               self._pool.cpu_millicores),
            pids_max=limits.pids_max,
            priority=limits.priority,
            default_pids_max=calls.pids_max,
            default_timeout_usec=calls.timeout,
            timeout_max_usec=calls.timeout_max,
            gpu=self.gpus(),
        )  # fmt: skip

    def _agent_memory(self, session: Session) -> int:
        """What the agent leaf holds and cannot give back: page cache does not count, because the
        kernel drops it before it kills. Read at most once a second: memory.stat makes the kernel
        gather its per-CPU counters, and this is on every call's way."""
        now = time.monotonic()
        if now - session.agent_memory_at >= AGENT_MEMORY_INTERVAL_S:
            stat = session.agent.read_if(knobs.MEMORY_STAT)
            session.agent_memory_at = now
            session.agent_memory_bytes = stat["anon"] + stat.get("kernel", 0) if stat else 0
        return session.agent_memory_bytes

    def not_enforced(self) -> list[str]:
        """Limits of a session that cannot be kept here, by interface file."""
        files = {
            "memory": ["memory.low", "memory.high", "memory.max"],
            "cpu": ["cpu.weight", "cpu.max"],
            "pids": ["pids.max"],
            "io": ["io.stat"],
        }
        return [file for name in self._pool.missing for file in files.get(name, [])]

    # Opening

    def limits_of(self, spec: pb.SessionSpec) -> SessionLimits:
        """Limits from text, defaults filled in. Raises InvalidField."""

        def size(field: str) -> int | None:
            text = getattr(spec, field)
            return parse_bytes(field, text) if text else None

        defaults, most = self._config.sessions, self._pool.memory_max_bytes
        priority = parse_priority("priority", spec.priority) if spec.priority else defaults.priority
        limits = SessionLimits(
            memory_low_bytes=size("memory_low"),
            memory_high_bytes=size("memory_high"),
            memory_max_bytes=size("memory_max"),
            cpu_weight=parse_count("cpu_weight", spec.cpu_weight, 1, 10_000)
            if spec.cpu_weight
            else weight_of_priority(priority),
            cpu_max_millicores=parse_cores("cpu_max", spec.cpu_max) if spec.cpu_max else None,
            pids_max=parse_count("pids_max", spec.pids_max, 1, 4_194_304)
            if spec.pids_max
            else defaults.pids_max,
            priority=priority,
            calls_max=parse_count("calls_max", spec.calls_max, 1, 100_000)
            if spec.calls_max
            else defaults.calls_max,
        )
        if most is not None:
            for field in ("memory_low", "memory_max"):
                value = getattr(limits, f"{field}_bytes")
                if value is not None and value > most:
                    raise InvalidField(field, getattr(spec, field), f"at most {show_bytes(most)}",
                                       "it is more than the whole pool")  # fmt: skip
        low, high, top = limits.memory_low_bytes, limits.memory_high_bytes, limits.memory_max_bytes
        if top is not None and ((low or 0) > top or (high or 0) > top):
            field = "memory_low" if (low or 0) > top else "memory_high"
            raise InvalidField(
                field, getattr(spec, field), f"at most memory_max ({show_bytes(top)})"
            )
        return limits

    def _gpu_limits(self, spec: pb.SessionSpec, limits: SessionLimits) -> SessionLimits:
        """With a part of GPUs for the agent itself, where one is asked for. Raises InvalidField or
        ResourceExhausted."""
        fields = ("gpu", "gpu_memory", "gpu_priority", "gpu_device")
        intent = parse_intent({name: getattr(spec, name) for name in fields})
        part = gpu_part(intent, self.gpus(), limits.priority, 100, [])
        if part is None:
            return limits
        return replace(
            limits, gpu_percent=part.percent, gpu_memory_bytes=part.memory_bytes,
            gpu_priority=part.priority, gpu_devices=self.place_gpu(part),
        )  # fmt: skip

    def _check_guarantee(self, spec: pb.SessionSpec, limits: SessionLimits) -> None:
        """What is guaranteed to all sessions together must be there. Raises InvalidField."""
        low, most = limits.memory_low_bytes, self._pool.memory_max_bytes
        if low is None or most is None:
            return
        others = [s.limits.memory_low_bytes or 0 for s in self.open.values()]
        if low + sum(others) > most:
            raise InvalidField(
                "memory_low", spec.memory_low, f"at most {show_bytes(most - sum(others))}",
                f"the pool has {show_bytes(most)}, of which {show_bytes(sum(others))} are "
                "guaranteed to other sessions",
            )  # fmt: skip

    def _check_id(self, session_id: str) -> None:
        if not _ID.fullmatch(session_id):
            raise InvalidField("id", session_id, ID_ALLOWED)
        if session_id in self.open:
            raise AlreadyExists(f"session {session_id!r} is open already", "id", session_id,
                                "a name that no open session has")  # fmt: skip

    def open_session(self, spec: pb.SessionSpec) -> Session:
        """Make a session's cgroup and agent leaf. Raises RequestError; then nothing is left."""
        limits = self.limits_of(spec)
        self._check_id(spec.id)
        self._check_guarantee(spec, limits)
        limits = self._gpu_limits(spec, limits)
        try:
            made = self._pool.cgroup.make_child(spec.id)
        except KnobError as error:
            raise AlreadyExists(f"cgroup {self._pool.path}/{spec.id} is there already and is not a "
                                f"session: {error}", "id", spec.id) from None  # fmt: skip
        path = f"{self._pool.path}/{spec.id}"
        try:
            return self._set_up(Cgroup.open(made.path), path, spec.id, limits, {})
        except (KnobError, OSError) as error:
            made.remove()
            raise Unavailable(f"the session's limits could not be set: {error}") from None

    def _set_up(
        self,
        cgroup: Cgroup,
        path: str,
        session_id: str,
        limits: SessionLimits,
        found: dict[str, str],
    ) -> Session:
        """Limits, agent leaf and record on a cgroup that holds no processes of its own."""
        adopted = path.rpartition("/")[0] != self._pool.path
        try:
            _write_limits(cgroup, limits)
            cgroup.enable(offered_controllers(cgroup))
            names = set(cgroup.children())
            agent = (
                cgroup.child(AGENT_LEAF) if AGENT_LEAF in names else cgroup.make_child(AGENT_LEAF)
            )
            session = Session(
                id=session_id, cgroup=cgroup, agent=agent, cgroup_path=path, limits=limits,
                opened_unix_usec=unix_usec(), adopted=adopted, found=found,
                offered=agent.files(),
            )  # fmt: skip
            cgroup.set_xattr(session.record())
        except BaseException:
            cgroup.close()
            raise
        self._add(session)
        return session

    def _add(self, session: Session) -> None:
        session.reports = type(session.reports)(maxlen=self._config.sessions.reports_kept)
        self.open[session.id] = session
        self._by_path[session.cgroup_path] = session

    def adopt_session(self, cgroup_path: str, spec: pb.SessionSpec) -> Session:
        """Split an existing cgroup in place: its processes go to agent/, its controllers to the
        calls beside it. Raises RequestError, with the cgroup as it was."""
        limits = self.limits_of(spec)
        self._check_id(spec.id)
        self._check_guarantee(spec, limits)
        limits = self._gpu_limits(spec, limits)
        path = str(PurePosixPath("/") / cgroup_path.strip("/"))
        self._check_adoptable(path)
        try:
            cgroup = Cgroup.open(self._pool.mount / path.strip("/"))
        except OSError:
            raise NotFound(f"there is no cgroup {path} below {self._pool.mount}",
                           "cgroup_path", cgroup_path) from None  # fmt: skip
        busy = [name for name in cgroup.children() if cgroup.child(name).populated()]
        if busy:
            cgroup.close()
            raise FailedPrecondition(
                f"cgroup {path} is split already: {busy[0]}/ below it has processes; "
                "only a cgroup whose processes are all its own can be adopted"
            )
        found = _readable_limits(cgroup, limits)
        try:
            agent = cgroup.make_child(AGENT_LEAF)
        except KnobError as error:
            cgroup.close()
            raise FailedPrecondition(f"cgroup {path} cannot be split: {error}") from None
        try:
            move_all(cgroup, agent)
            self._pool.cgroup.set_xattr(path.encode(), f"{ADOPTED_XATTR}{cgroup.id}")
            return self._set_up(cgroup, path, spec.id, _tightest(cgroup, limits), found)
        except (KnobError, OSError) as error:
            again = Cgroup.open(self._pool.mount / path.strip("/"))
            self._give_back(again, found)
            again.close()
            raise Unavailable(f"cgroup {path} could not be adopted: {error}") from None

    def _check_adoptable(self, path: str) -> None:
        inside = path == self._pool.path or path.startswith(f"{self._pool.path}/")
        above = self._pool.path.startswith(f"{path.rstrip('/')}/") or path == "/"
        if inside or above or ".." in path or self.of_cgroup(path) is not None:
            raise InvalidField("cgroup_path", path, "a cgroup beside the pool, of no other session")

    # Closing

    def remove(self, session: Session) -> None:
        """Remove the cgroup of a session whose calls have ended: its agent is killed, or, for an
        adopted cgroup, put back to where it was found. May block: for a thread of its own.

        Raises KnobError, and the session is then still there.
        """
        try:
            if session.adopted:
                self._give_back(session.cgroup, session.found)
            else:
                session.cgroup.kill_and_remove()
        except CgroupGone:
            log.info("session %s: its cgroup is gone already", session.id)

    def forget(self, session: Session) -> None:
        """Drop a session from the books and give up its directory; its cgroup is not touched."""
        self.open.pop(session.id, None)
        self._by_path.pop(session.cgroup_path, None)
        if session.adopted:
            self._pool.cgroup.remove_xattr(f"{ADOPTED_XATTR}{session.cgroup.id}")
        session.cgroup.close()

    def _give_back(self, cgroup: Cgroup, found: dict[str, str]) -> None:
        """Undo a split: controllers off, processes back, agent leaf gone, limits as they were."""
        for name in cgroup.read(knobs.CGROUP_SUBTREE_CONTROL):
            cgroup.write_text(knobs.CGROUP_SUBTREE_CONTROL.file, f"-{name}")
        if AGENT_LEAF in set(cgroup.children()):
            agent = cgroup.child(AGENT_LEAF)
            move_all(agent, cgroup)
            agent.remove()
        for file, text in found.items():
            cgroup.write_text(file, text)
        cgroup.remove_xattr()
        self._pool.cgroup.remove_xattr(f"{ADOPTED_XATTR}{cgroup.id}")

    # Finding again

    def restore(self) -> Iterator[Session]:
        """Sessions that an earlier daemon left, found by their records."""
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
                self._pool.cgroup.remove_xattr(xattr)

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
                id=str(data["id"]), cgroup=cgroup, agent=agent, cgroup_path=path,
                limits=_limits_found(data["limits"]),
                opened_unix_usec=int(data["opened_unix_usec"]), adopted=bool(data["adopted"]),
                found=dict(data["found"]), offered=agent.files(),
            )  # fmt: skip
            if cgroup.has(knobs.CPU_WEIGHT):
                # An earlier daemon may have been killed while it had lowered it.
                cgroup.write(knobs.CPU_WEIGHT, session.limits.cpu_weight)
        except (KeyError, TypeError, ValueError, KnobError) as error:
            log.warning("%s is not a session that can be taken up: %s", directory, error)
            cgroup.close()
            return None
        self._add(session)
        return session

    def unknown(self) -> Iterator[Cgroup]:
        """Cgroups in the pool that are no session, and those in sessions that are no open call."""
        for name in self._pool.cgroup.children():
            if name not in self.open:
                yield from _child_if_there(self._pool.cgroup, name)
        for session in list(self.open.values()):
            known = {call.cgroup.path.name for call in session.calls.values()}
            try:
                names = [] if session.closing else list(session.cgroup.children())
            except CgroupGone:
                continue  # the sweep closes it
            for name in names:
                if name.startswith(CALL_PREFIX) and name not in known:
                    yield from _child_if_there(session.cgroup, name)


def _limits_found(data: dict[str, Any]) -> SessionLimits:
    """From a record, where lists stand for tuples."""
    return SessionLimits(**{**data, "gpu_devices": tuple(data.get("gpu_devices", ()))})


def _child_if_there(parent: Cgroup, name: str) -> Iterator[Cgroup]:
    try:
        yield parent.child(name)
    except CgroupGone:
        log.debug("%s/%s has just gone", parent.path, name)


def _write_limits(cgroup: Cgroup, limits: SessionLimits) -> None:
    def put(knob: Knob[T], value: T) -> None:
        if cgroup.has(knob):
            cgroup.write(knob, value)

    put(knobs.MEMORY_LOW, limits.memory_low_bytes or 0)
    put(knobs.MEMORY_HIGH, limits.memory_high_bytes)
    put(knobs.MEMORY_MAX, limits.memory_max_bytes)
    put(knobs.CPU_WEIGHT, limits.cpu_weight)
    quota = limits.cpu_max_millicores
    put(knobs.CPU_MAX, knobs.CpuMax(quota * 100 if quota is not None else None))
    put(knobs.PIDS_MAX, limits.pids_max)


_ADOPTED_KNOBS = (knobs.MEMORY_LOW.file, knobs.MEMORY_HIGH.file, knobs.MEMORY_MAX.file,
                  knobs.CPU_WEIGHT.file, knobs.CPU_MAX.file, knobs.PIDS_MAX.file)  # fmt: skip


def _readable_limits(cgroup: Cgroup, limits: SessionLimits) -> dict[str, str]:
    """What the runtime had set, as text, to be put back when the session is closed."""
    found = {}
    for file in _ADOPTED_KNOBS:
        text = cgroup.read_if(Knob(file, str.strip))
        if text is not None:
            found[file] = text
    return found


def _tightest(cgroup: Cgroup, ours: SessionLimits) -> SessionLimits:
    """Our limits, never looser than those the runtime has set on its container."""

    def least(a: int | None, b: int | None) -> int | None:
        return min((v for v in (a, b) if v is not None), default=None)

    cpu = cgroup.read_if(knobs.CPU_MAX)
    theirs = None
    if cpu is not None and cpu.quota_usec is not None:
        theirs = cpu.quota_usec * 1000 // cpu.period_usec
    return replace(
        ours,
        memory_low_bytes=ours.memory_low_bytes or cgroup.read_if(knobs.MEMORY_LOW) or None,
        memory_high_bytes=least(ours.memory_high_bytes, cgroup.read_if(knobs.MEMORY_HIGH)),
        memory_max_bytes=least(ours.memory_max_bytes, cgroup.read_if(knobs.MEMORY_MAX)),
        cpu_max_millicores=least(ours.cpu_max_millicores, theirs),
        pids_max=least(ours.pids_max, cgroup.read_if(knobs.PIDS_MAX)),
    )
