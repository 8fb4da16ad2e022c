"""The daemon: its parts, in the order in which they start and stop.

Where is it decided? What a call gets: admission.grant_for. What happens when memory runs short:
policy.engine.decide. How a call ended: ending.judge.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import resource
import signal
from pathlib import Path

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from agentcgroupd.calls.admission import Admission
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.queue import AdmissionQueue
from agentcgroupd.calls.reports import Reports
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.config import Config
from agentcgroupd.cpu.scheduling import CpuScheduling
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import (
    AgentcgroupdError,
    CgroupGone,
    ConfigError,
    FailedPrecondition,
    KnobError,
)
from agentcgroupd.gpu.service import Gpus
from agentcgroupd.guard.assembly import Control
from agentcgroupd.guard.high_mark import Tripwire
from agentcgroupd.guard.loop import Guard
from agentcgroupd.guard.policy_files import PolicyFiles
from agentcgroupd.host.systemd import notify, watchdog_interval_s
from agentcgroupd.policy.learning import Peaks
from agentcgroupd.restore import restore
from agentcgroupd.rpc.agent_calls import AgentCalls
from agentcgroupd.rpc.attach import AttachServer
from agentcgroupd.rpc.peers import Relay
from agentcgroupd.rpc.services import AdminService, AgentService, GrpcServer
from agentcgroupd.rpc.views import Answers
from agentcgroupd.sessions.pool import ALIVE_XATTR, Pool, prepare_pool
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.session import RECORD_VERSION, Session, boottime_usec, read_record
from agentcgroupd.telemetry.audit import Audit
from agentcgroupd.telemetry.feed import Feed
from agentcgroupd.telemetry.metrics import Heartbeat, Metrics, MetricsServer
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.watchers import Watchers

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 10.0
BEAT_INTERVAL_S = 0.5
FILES_WANTED = 262_144


class PartFailed(AgentcgroupdError):
    """The daemon cannot go on; systemd is to start it again."""


class Daemon:
    """All parts of one running daemon. Use: `await start()`, `await stopped()`, `await stop()`."""

    def __init__(self, config: Config) -> None:
        """Nothing is touched yet."""
        self.config = config
        self.metrics = Metrics()
        self.feed = Feed()
        self.heartbeat = Heartbeat()
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self._lock_fd = -1
        self.control: Control | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.policy_files = PolicyFiles(config.policy, self.metrics)
        self.gpus = Gpus(config.gpu, config.server.run_dir, config.bpf.objects,
                         lambda: self.sessions, lambda: self.actions,
                         config.bpf.enabled)  # fmt: skip
        self.cpu = CpuScheduling(config.cpu, config.bpf.objects, self.metrics,
                                 lambda: self.policy_files.policy.cpu)  # fmt: skip
        self.watchers = Watchers(config, lambda: self.actions, self.cpu, self.gpus)
        self.pool: Pool
        self.sessions: Sessions
        self.calls: Calls
        self.answers: Answers

    async def start(self) -> None:
        """Take the pool, take up what is there, open the sockets. Raises ConfigError, KnobError or
        OSError; then stop() undoes what was done."""
        self.policy_files.load()
        _raise_file_limit()
        run = self.config.server.run_dir
        self._lock(run)
        self.audit = Audit(self.config.audit.path, self.config.audit.max_bytes)
        self.pool = prepare_pool(self.config.pool)
        self._mark_pool()
        self.policy_files.started(self.pool.memory_max_bytes, self.audit)
        self.events = FileEvents()
        self.sessions = Sessions(self.config, self.pool)
        self.watchers.plane.open()
        self.actions = Actions(
            self.audit, self.metrics, self.feed, self.config.guard, lambda: self.watchers.memory,
            self.pool.cgroup,
        )  # fmt: skip
        self.actions.hurry = self.cpu.hurry
        notices = Notices(self.audit, self.metrics, self.feed)
        self.peaks = Peaks()
        self.queue = AdmissionQueue([self.gpus.resource], notices)
        ceiling = self.sessions.ceiling
        reports = Reports(self.pool.cgroup, notices, ceiling, self.cpu.numbers, self.peaks)
        self.calls = Calls(
            self.config.calls, self.events, self.actions, notices, reports, self.watchers, ceiling,
            self.queue.count,
        )  # fmt: skip
        self.admission = Admission(self.calls, self.queue)
        self.agent_calls = AgentCalls(self.sessions, self.calls, self.queue, self.admission)
        self.answers = Answers(
            self.pool, self.sessions, self.calls, self.queue.waiting, self.cpu.numbers
        )
        await self._start_gpus()
        before = self.pool.cgroup.get_xattr(ALIVE_XATTR)
        self._note_alive()
        self.pool.settled_ticks = int(before or self.pool.cgroup.get_xattr(ALIVE_XATTR) or 0)
        self.watchers.follow(self.pool, self.calls, self.sessions.open.values)
        restore(self.sessions, self.calls, self.audit, self._watch, self.peaks)
        self.sweep()
        await self._open_sockets(run)
        self.watchers.start(self._start_control())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.policy_files.reload_quietly)
        for coroutine in (
            self._sweep_forever(), self._beat_forever(), self.policy_files.look_forever()
        ):  # fmt: skip
            task = loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._task_ended)
        for name in self.pool.missing:
            log.warning("controller %s is not available below %s: its limits are not enforced; "
                        "see `agentcg doctor`", name, self.pool.cgroup.path)  # fmt: skip
        notify("READY=1", f"STATUS=pool {self.pool.path}, {len(self.sessions.open)} sessions")
        log.info("ready: pool %s, controllers %s, sockets in %s", self.pool.cgroup.path,
                 " ".join(self.pool.controllers) or "none", run)  # fmt: skip

    async def _start_gpus(self) -> None:
        """Before sessions are found again: their calls may have parts of GPUs."""
        gpus = self.gpus
        await gpus.start(self.pool.cgroup)
        self.sessions.gpus = lambda: gpus.ceiling
        self.sessions.place_gpu = gpus.grants.place_part
        self.answers.gpus = gpus

    def _start_control(self) -> Control | None:
        """None where the pool has no limit on memory: there is nothing to keep then."""
        if not self.config.guard.enabled or self.pool.memory_max_bytes is None:
            return None
        control = Control(
            self.config.guard, self.policy_files.policy, self.pool, self.calls, self.queue,
            self.peaks, self.sessions.open, self.watchers.abilities,
        )  # fmt: skip
        self.control = control
        self.policy_files.on_change = control.change_policy
        control.guard.start(self._tripwire(control.guard))
        control.start()
        self.answers.guard = control.guard
        return control

    def _tripwire(self, guard: Guard) -> Tripwire | None:
        """None where a program tells the mark, or where memory.high is the operator's."""
        if self.watchers.tells_marks or self.config.pool.memory_high is not None:
            return None
        mark_bytes, low_bytes = guard.mark_bytes
        return Tripwire(self.pool.cgroup, self.events, mark_bytes, low_bytes)

    def _lock(self, run: Path) -> None:
        """One daemon for each run directory; the kernel gives the lock back however it ends."""
        for name, mode in (("", 0o755), ("agent", 0o755), ("admin", 0o700), ("private", 0o700)):
            directory = run / name
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)
        self._lock_fd = os.open(run / "private/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"server.run_dir: another daemon is running in {run}") from None

    def _mark_pool(self) -> None:
        record = {"v": RECORD_VERSION, "kind": "pool", "run_dir": str(self.config.server.run_dir)}
        raw = self.pool.cgroup.get_xattr()
        before = read_record(raw, "pool")
        if raw is not None and before is None:
            raise ConfigError(f"pool.cgroup: {self.pool.path} is marked as something else: {raw!r}")
        self.pool.cgroup.set_xattr(json.dumps(record).encode())

    async def _open_sockets(self, run: Path) -> None:
        most = self.config.sessions.connections_max
        self._relays, self._servers, self._attaches = [], [], []
        for role, mode, service in (("agent", 0o666, "Agent"), ("admin", 0o600, "Admin")):
            backend = run / f"private/{role}.sock"
            find = self.sessions.of_cgroup
            relay = Relay(run / role / "grpc.sock", mode, backend, self.metrics, find, most)
            server = GrpcServer(backend, f"agentcgroup.v1.{service}")
            if role == "agent":
                pb_grpc.add_AgentServicer_to_server(AgentService(self, relay), server.server)
            else:
                pb_grpc.add_AdminServicer_to_server(AdminService(self, relay), server.server)
            attach = AttachServer(run / role / "attach.sock", mode, role == "admin", self.sessions,
                                  self.calls, self.admission, self.agent_calls,
                                  self.metrics)  # fmt: skip
            await server.start()
            await relay.start()
            attach.start()
            self._servers.append(server)
            self._relays.append(relay)
            self._attaches.append(attach)
        self.metrics_server: MetricsServer | None = None
        if self.config.server.metrics_address:
            try:
                self.metrics_server = MetricsServer(
                    self.config.server.metrics_address, self.metrics, self.heartbeat.wrong
                )
            except OSError as error:
                address, why = self.config.server.metrics_address, os.strerror(error.errno or 0)
                raise ConfigError(
                    f"server.metrics_address: {address!r} cannot be used: {why}"
                ) from None

    async def stopped(self) -> None:
        """Until SIGTERM or SIGINT. Raises PartFailed if a part of the daemon ends by itself."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await self._stop.wait()
        if self._failure is not None:
            raise PartFailed("a part of the daemon failed") from self._failure

    async def stop(self) -> None:
        """Close the sockets and let go. Sessions and calls stay for the next daemon."""
        notify("STOPPING=1")
        if self.control is not None:
            self.control.stop()
        for task in self._tasks:
            task.cancel()
        self.feed.end()
        for relay in getattr(self, "_relays", []):
            await relay.stop()
        for attach in getattr(self, "_attaches", []):
            attach.stop()
        for server in getattr(self, "_servers", []):
            await server.stop()
        if hasattr(self, "calls"):
            self.calls.let_go()
            self.events.close()
        await self.gpus.stop()
        self.watchers.close()
        if getattr(self, "metrics_server", None) is not None:
            assert self.metrics_server is not None
            await asyncio.get_running_loop().run_in_executor(None, self.metrics_server.close)
        if hasattr(self, "audit"):
            self.audit.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    # Sessions

    def open_session(self, spec: pb.SessionSpec) -> Session:
        """See Sessions.open_session."""
        return self._opened(self.sessions.open_session(spec))

    def adopt_session(self, cgroup_path: str, spec: pb.SessionSpec) -> Session:
        """See Sessions.adopt_session."""
        return self._opened(self.sessions.adopt_session(cgroup_path, spec))

    def _opened(self, session: Session) -> Session:
        self._watch(session)
        self.audit.write("session_opened", session=session.id, cgroup=session.cgroup_path,
                         adopted=session.adopted)  # fmt: skip
        self.feed.publish(
            session.id, pb.Event(session_opened=self.answers.describe(session, admin=True))
        )
        return session

    def _watch(self, session: Session) -> None:
        """An adopted cgroup belongs to its runtime: when it is empty, the session is over."""
        self.watchers.session_opened(session)
        if self.control is not None:
            self.control.session_opened(session)
        if session.adopted:
            session.watch = self.events.watch(
                session.cgroup, knobs.CGROUP_EVENTS, lambda: self._adopted_changed(session)
            )

    def _adopted_changed(self, session: Session) -> None:
        try:
            if session.closing or session.cgroup.populated():
                return
        except CgroupGone:
            log.debug("session %s: its cgroup is gone", session.id)
        self._spawn_close(session)

    def _spawn_close(self, session: Session) -> None:
        task = asyncio.get_running_loop().create_task(self._close_quietly(session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close_quietly(self, session: Session) -> None:
        try:
            await self.close_session(session)
        except AgentcgroupdError as error:
            log.warning("session %s could not be closed: %s", session.id, error)

    async def close_session(self, session: Session) -> int:
        """End a session's calls, then its agent; returns how many calls were ended.
        RequestError."""
        if session.closing:
            raise FailedPrecondition(f"session {session.id} is being closed already")
        session.closing = True
        self.queue.close_session(session)
        calls = list(session.calls.values())
        try:
            endings = [self.calls.end(c, False, None, "its session was closed") for c in calls]
            await asyncio.gather(*(e for e in endings if not isinstance(e, pb.Report)))
            last = self.answers.describe(session, admin=True) if session.cgroup.exists() else None
            # Only the kernel's part waits in a thread; the books are the loop's alone.
            await asyncio.get_running_loop().run_in_executor(None, self.sessions.remove, session)
            if session.adopted:
                self.cpu.given_back(session)
            self.sessions.forget(session)
        except BaseException:
            session.closing = False
            raise
        if session.watch is not None:
            self.events.unwatch(session.watch)
        self.watchers.session_closed(session)
        self.audit.write("session_closed", session=session.id, calls_ended=len(calls))
        self.feed.publish(session.id, pb.Event(session_closed=last or pb.Session(id=session.id)))
        self.feed.end(session.id)
        return len(calls)

    # Housekeeping

    def sweep(self) -> None:
        """Calls whose end was missed, cgroups that nobody owns, sessions whose cgroup is gone."""
        self.calls.recheck()
        self.watchers.sweep()
        for cgroup in list(self.sessions.unknown()):
            self._remove_leftover(cgroup)
        for session in list(self.sessions.open.values()):
            if not session.closing and not session.cgroup.exists():
                log.warning("session %s: its cgroup was removed by someone else", session.id)
                self._spawn_close(session)

    def _remove_leftover(self, cgroup: Cgroup) -> None:
        """Empty ones go; one with processes is not ours to kill, and is said aloud."""
        try:
            if cgroup.populated():
                log.warning("%s has processes but no record; it is left alone", cgroup.path)
                return
            cgroup.remove()
        except KnobError as error:
            log.warning("leftover %s: %s", cgroup.path, error)
            return
        self.answers.leftovers_removed += 1
        self.metrics.leftovers.inc()
        log.info("removed leftover %s", cgroup.path)

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            self.sweep()

    async def _beat_forever(self) -> None:
        """Gauges, the loop's lateness, and systemd's watchdog."""
        loop = asyncio.get_running_loop()
        watchdog_s = watchdog_interval_s()
        due = loop.time()
        while True:
            due += min(BEAT_INTERVAL_S, watchdog_s or BEAT_INTERVAL_S)
            await asyncio.sleep(max(0.0, due - loop.time()))
            self.metrics.loop_lag.observe(max(0.0, loop.time() - due))
            due = max(due, loop.time())
            self.heartbeat.beat()
            self._note_alive()
            self.cpu.check()
            if watchdog_s:
                notify("WATCHDOG=1")
            try:
                self._set_gauges()
            except KnobError as error:
                log.error("the pool cannot be read: %s", error)

    def _set_gauges(self) -> None:
        metrics = self.metrics
        current = self.pool.cgroup.read_if(knobs.MEMORY_CURRENT)
        metrics.pool_memory_current.set(float("nan") if current is None else current)
        most = self.pool.memory_max_bytes
        metrics.pool_memory_max.set(float("nan") if most is None else most)
        metrics.sessions_open.set(len(self.sessions.open))
        states = dict.fromkeys(("pending", "running", "frozen", "ending"), 0)
        for call in self.calls.open.values():
            states[pb.CallState.Name(call.state)[len("CALL_STATE_") :].lower()] += 1
        for state, count in states.items():
            metrics.calls_open.labels(state).set(count)
        metrics.audit_lost.set(self.audit.lost)
        metrics.gpu_calls.set(len(self.gpus.tenants))

    def _note_alive(self) -> None:
        ticks = boottime_usec() * os.sysconf("SC_CLK_TCK") // 1_000_000
        try:
            self.pool.cgroup.set_xattr(str(ticks).encode(), ALIVE_XATTR)
        except KnobError as error:
            log.error("the pool: %s", error)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a part of the daemon failed", exc_info=task.exception())
            self._failure = task.exception()
            self._stop.set()


def _raise_file_limit() -> None:
    """Each open call may keep a descriptor; the usual soft limit of 1,024 is for programs that use
    select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
