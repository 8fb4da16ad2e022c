"""The daemon: its parts, in the order in which they start and stop.

Where is it decided? What a call gets: intents.grant.grant_for. What happens when memory runs short:
policy.engine.decide. How a call ended: calls.verdict.judge.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from agentcgroupd.bpf.plane import DataPlane
from agentcgroupd.calls.admission import Admission
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.queue import AdmissionQueue
from agentcgroupd.calls.reports import Reports
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.config import Config
from agentcgroupd.cpu.scheduling import CpuScheduling
from agentcgroupd.doors import Doors
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.gpu.enforcement import GpuSources
from agentcgroupd.gpu.service import Gpus
from agentcgroupd.guard.assembly import PoolGuard
from agentcgroupd.guard.disks import DiskGuard
from agentcgroupd.guard.high_mark import HighMark, PoolMark
from agentcgroupd.guard.policy_files import PolicyFiles, ReadPolicy, read_policy
from agentcgroupd.history.history import History
from agentcgroupd.history.room import Bounds
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.host.kernel_log import OomLog
from agentcgroupd.host.listening import handed_over
from agentcgroupd.host.run_dir import RunDir
from agentcgroupd.host.systemd import notify
from agentcgroupd.observers import Observers
from agentcgroupd.policy.learning import Peaks
from agentcgroupd.restore import restore
from agentcgroupd.rpc.agent_calls import AgentCalls
from agentcgroupd.rpc.callers import Callers
from agentcgroupd.rpc.memory import MemoryWatch
from agentcgroupd.rpc.past import Past
from agentcgroupd.rpc.service import Parts
from agentcgroupd.rpc.views import Views
from agentcgroupd.running import Running, note_alive
from agentcgroupd.runtime.watching import Runtimes
from agentcgroupd.sessions.cgroups import SessionCgroups
from agentcgroupd.sessions.holding import look_at_adopted
from agentcgroupd.sessions.lifecycle import SessionLifecycle, SessionObserver
from agentcgroupd.sessions.limits import Ceilings
from agentcgroupd.sessions.pool import ALIVE_XATTR, Pool, PoolClaim
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.second_records import SecondRecords
from agentcgroupd.stopping import bounded
from agentcgroupd.telemetry.audit import Audit, AuditLimits
from agentcgroupd.telemetry.feed import Feed
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.telemetry.started import started
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

FILES_WANTED = 262_144
THREADS = 8
"""In which what blocks is done."""


@dataclass(frozen=True, slots=True)
class _Base:
    """What all other parts are made with."""

    pool: Pool
    sessions: Sessions
    policy_files: PolicyFiles
    notices: Notices
    turns: Turns
    events: FileEvents


@dataclass(frozen=True, slots=True)
class _Acting:
    """What acts on sessions and calls, and what follows them."""

    plane: DataPlane
    cpu: CpuScheduling
    actions: Actions
    gpus: Gpus
    observers: Observers


@dataclass(frozen=True, slots=True)
class _Entry:
    """The calls, and what lets them in."""

    calls: Calls
    queue: AdmissionQueue
    admission: Admission
    peaks: Peaks


class Daemon:
    """The daemon, from its start to its end. Use: `await Daemon(config).run()`."""

    gpu_sources = GpuSources()
    """Where the GPU driver and MPS are reached; tests put stand-ins here."""

    def __init__(self, config: Config, on_stop: Callable[[], None] = lambda: None) -> None:
        """`on_stop` is called when the daemon begins to stop."""
        self._config, self._on_stop = config, on_stop

    async def run(self) -> None:
        """Take the pool, take up what is there, serve until SIGTERM or SIGINT, and let go. Sessions
        and calls stay for the next daemon.

        Raises ConfigError, KnobError or OSError where the daemon cannot start, PartFailed where a
        part of it ends by itself; what was begun is undone either way.
        """
        async with AsyncExitStack() as undo:
            # What is registered here is undone in the opposite order.
            running = await self._start(undo)
            running.garbage.start()
            undo.callback(running.garbage.stop)
            undo.callback(notify, "STOPPING=1")
            undo.callback(running.heartbeat.stopping)
            undo.callback(self._on_stop)
            await running.until_stopped()

    async def _start(self, undo: AsyncExitStack) -> Running:
        config, run_dir = self._config, self._config.server.run_dir
        policy = read_policy(config.policy)
        await _start_threads()
        place = Place(config, undo)
        _raise_file_limit()
        base = self._begin(undo, policy, place.claim)
        acting = await self._make_enforcers(undo, base)
        entry = self._make_calls(undo, base, acting)
        guard = self._make_guard(base, acting, entry)
        runtimes = Runtimes(
            config.containers, run_dir, base.pool.mount, base.sessions, base.notices
        )
        followers = [acting.observers, guard, runtimes.containers]
        lifecycle = self._make_lifecycle(undo, base, acting, entry, [f for f in followers if f])

        # What an earlier daemon left.
        base.pool.settled_ticks = _last_alive_ticks(base.pool)
        acting.observers.follow(entry.calls)
        restore(lifecycle, base.sessions, entry.calls, base.notices, entry.peaks)
        deque(look_at_adopted(base.pool, base.sessions.open.values()), maxlen=0)

        # Who may ask, and what goes on from now on.
        parts = self._make_parts(base, acting, entry, guard, lifecycle)
        running = Running(
            parts,
            base.pool,
            acting.observers,
            acting.cpu,
            acting.gpus,
            base.events,
            MemoryWatch(config.limits.memory),
            DiskGuard(config.guard, entry.calls.open, entry.calls.disk_limited, acting.actions),
            config.server,
        )
        running.sweep_at_once()
        await Doors(config, undo, parts, entry.admission, running, place.sockets).open()
        # What is held is let go of first: no part that is slow to stop can keep it.
        undo.callback(entry.calls.release)
        undo.callback(acting.gpus.let_go)
        if guard is not None:
            undo.callback(guard.stop)
            guard.start()
        acting.observers.start(guard)
        runtimes.start(lifecycle, undo)
        place.keep()
        return _ready(running, base.pool, base.sessions, acting.observers, run_dir)

    # The parts, each made of those before it

    def _begin(self, undo: AsyncExitStack, policy: ReadPolicy, claim: PoolClaim) -> _Base:
        notices = self._make_notices(undo)
        turns = Turns()
        pool = claim.prepare()
        policy_files = PolicyFiles(self._config.policy, policy, notices, pool.memory_max_bytes)
        events = FileEvents(turns)
        undo.callback(events.close)
        return _Base(pool, Sessions(pool), policy_files, notices, turns, events)

    async def _make_enforcers(self, undo: AsyncExitStack, base: _Base) -> _Acting:
        """Make what acts on sessions and calls, and what follows them."""
        config, pool, notices = self._config, base.pool, base.notices
        plane = DataPlane(config.bpf, config.guard, pool.cgroup.id)
        undo.callback(plane.close)
        plane.open()
        cpu = CpuScheduling(
            config.cpu,
            config.bpf.objects,
            notices.metrics,
            lambda: base.policy_files.policy.cpu,
            pool,
            base.sessions.open.values,
        )
        actions = Actions(notices, lambda: plane.memory, cpu.hurry)
        gpus = Gpus(
            config.gpu,
            config.server.run_dir,
            base.sessions,
            actions,
            objects=config.bpf.objects,
            programs=config.bpf.enabled,
            sources=self.gpu_sources,
        )
        undo.push_async_callback(bounded, "GPU sharing", gpus.stop)
        await gpus.start(pool.cgroup)
        observers = Observers(config, plane, cpu, gpus, pool, base.sessions.open.values, notices)
        undo.callback(observers.close)
        return _Acting(plane, cpu, actions, gpus, observers)

    def _make_calls(self, undo: AsyncExitStack, base: _Base, acting: _Acting) -> _Entry:
        """Make the calls, and what lets them in."""
        config, gpus = self._config, acting.gpus
        ceilings = Ceilings(config.calls, base.pool, lambda: gpus.ceiling)
        peaks = Peaks()
        reports = Reports(
            base.pool,
            base.notices,
            ceilings.of,
            acting.cpu.numbers,
            peaks,
            undo.enter_context(closing(OomLog.open())),
        )
        queue = AdmissionQueue([gpus.resource], base.notices)
        calls = Calls(
            config.calls,
            base.events,
            acting.actions,
            base.notices,
            reports,
            acting.observers,
            ceilings.of,
            queue.count,
            base.turns,
            SecondRecords(config.server.run_dir),
        )
        undo.callback(calls.let_go)
        return _Entry(calls, queue, Admission(calls, queue), peaks)

    def _make_guard(self, base: _Base, acting: _Acting, entry: _Entry) -> PoolGuard | None:
        """Make the pool's guard; None where there is nothing to guard."""
        config, pool = self._config, base.pool
        if not config.guard.enabled or pool.memory_max_bytes is None:
            return None
        return PoolGuard(
            config.guard,
            base.policy_files,
            pool,
            entry.calls,
            entry.queue,
            entry.peaks,
            base.sessions.open,
            acting.observers.abilities,
            _marks(config, pool, base.events, acting.observers),
            base.events,
            acting.plane.look,
        )

    def _make_lifecycle(
        self,
        undo: AsyncExitStack,
        base: _Base,
        acting: _Acting,
        entry: _Entry,
        followers: Sequence[SessionObserver],
    ) -> SessionLifecycle:
        """Make what opens and closes sessions. `followers`: are told of each."""
        gpus = acting.gpus
        cgroups = SessionCgroups(
            self._config.sessions,
            base.pool,
            base.sessions,
            lambda: gpus.ceiling,
            gpus.grants.place_part,
        )
        lifecycle = SessionLifecycle(
            cgroups,
            base.sessions,
            base.pool,
            base.events,
            base.notices,
            entry.admission,
            acting.cpu.numbers,
            followers,
        )
        undo.callback(lifecycle.stop)
        return lifecycle

    def _make_parts(
        self,
        base: _Base,
        acting: _Acting,
        entry: _Entry,
        guard: PoolGuard | None,
        lifecycle: SessionLifecycle,
    ) -> Parts:
        """Make what answers requests."""
        sessions, calls, queue = base.sessions, entry.calls, entry.queue
        callers = Callers(sessions, self._config.calls.tools_may)
        views = Views(
            base.pool,
            sessions,
            lifecycle,
            calls,
            queue,
            base.policy_files,
            acting.gpus,
            guard.loop if guard is not None else None,
        )
        return Parts(
            sessions,
            lifecycle,
            calls,
            queue,
            AgentCalls(callers, calls, queue, entry.admission),
            views,
            Past(base.notices.history, calls.open.get, queue.waits),
            base.policy_files,
            base.notices,
            base.turns,
        )

    def _make_notices(self, undo: AsyncExitStack) -> Notices:
        config, kept = self._config.audit, self._config.history
        history = History(kept.path, Bounds(kept.max_bytes, kept.session_percent, kept.max_age))
        undo.push_async_callback(bounded, "the history", history.close)
        limits = AuditLimits(
            config.max_bytes, config.files, config.session_percent, config.session_rate
        )
        audit = Audit(config.path, config.max_bytes, limits, history.note)
        undo.callback(audit.close)
        return Notices(audit, Metrics(), Feed(), history)


class Place:
    """What one daemon alone may have: its pool, its directory, and sockets from systemd."""

    def __init__(self, config: Config, undo: AsyncExitStack) -> None:
        """Take them. What was made here is removed by `undo`, unless `keep` is called. Raises
        ConfigError or KnobError."""
        # The pool first: another daemon may have it, and then nothing is written anywhere.
        self.claim = PoolClaim(config.pool)
        undo.callback(self.claim.release)
        undo.callback(self.claim.undo)
        run_dir = config.server.run_dir
        self._directory = RunDir(run_dir)
        undo.callback(self._directory.undo)
        undo.callback(os.close, self._directory.lock())
        self.claim.mark(run_dir)
        self._directory.tell_pool(self.claim.mount, self.claim.path)
        self.sockets = handed_over()
        for sock in self.sockets.values():
            undo.callback(sock.close)

    def keep(self) -> None:
        """Let what was made here stay: the daemon has started."""
        self.claim.keep()
        self._directory.keep()


def _raise_file_limit() -> None:
    """Allow more open files: each open call may keep a descriptor, and the usual soft limit of
    1,024 is for programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES_WANTED, hard))
        return
    try:
        # Needs CAP_SYS_RESOURCE (getrlimit(2)).
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES_WANTED, FILES_WANTED))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        log.warning(
            "at most %d files may be open (LimitNOFILE=%d is wanted)",
            hard,
            FILES_WANTED,
            extra=DETAIL,
        )


async def _start_threads() -> None:
    """Start the threads in which blocking work is done, all of them now: where processes and
    threads are used up later, none could be started."""
    loop = asyncio.get_running_loop()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="blocking")
    loop.set_default_executor(pool)
    together = threading.Barrier(THREADS)
    await asyncio.gather(*(loop.run_in_executor(None, together.wait) for _ in range(THREADS)))


def _marks(config: Config, pool: Pool, events: FileEvents, observers: Observers) -> list[PoolMark]:
    """What tells that use of the pool has passed its mark: the memory programs, and memory.high
    where they do not and the operator has not set it."""
    marks: list[PoolMark] = []
    program_mark = observers.program_mark()
    if program_mark is not None:
        marks.append(program_mark)
    if not observers.tells_marks and config.pool.memory_high is None:
        marks.append(HighMark(pool.cgroup, events))
    return marks


def _last_alive_ticks(pool: Pool) -> int:
    """When a daemon was last alive here, in clock ticks since boot; now, if this is the first."""
    before = pool.cgroup.get_xattr(ALIVE_XATTR)
    note_alive(pool)
    return int(before or pool.cgroup.get_xattr(ALIVE_XATTR) or 0)


def _ready(
    running: Running, pool: Pool, sessions: Sessions, observers: Observers, run_dir: Path
) -> Running:
    for name in pool.missing:
        log.warning(
            "controller %s is not available below %s: its limits are not enforced; "
            "see `agentcg doctor`",
            name,
            pool.cgroup.path,
            extra=DETAIL,
        )
    # Before systemd is told that all is ready: from then on it may send any of the signals.
    running.listen_to_signals()
    notify("READY=1", f"STATUS=pool {pool.path}, {len(sessions.open)} sessions")
    lines = started(
        pool.cgroup.path,
        pool.memory_max_bytes,
        pool.cpu_millicores,
        pool.controllers,
        observers.features(),
        run_dir,
    )
    for line in lines:
        log.info("%s", line)
    return running
