"""The daemon: its parts, in the order in which they start and stop.

Where is it decided? What a call gets: intents.grant.grant_for. What happens when memory runs short:
policy.engine.decide. How a call ended: calls.verdict.judge.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from functools import partial
from pathlib import Path

from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from agentcgroupd.bpf.plane import DataPlane
from agentcgroupd.calls.admission import Admission
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.queue import AdmissionQueue
from agentcgroupd.calls.reports import Reports
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.config import Config
from agentcgroupd.cpu.scheduling import CpuScheduling
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import ConfigError
from agentcgroupd.gpu.enforcement import GpuSources
from agentcgroupd.gpu.service import Gpus
from agentcgroupd.guard.assembly import PoolGuard
from agentcgroupd.guard.high_mark import HighMark, PoolMark
from agentcgroupd.guard.policy_files import PolicyFiles, read_policy
from agentcgroupd.history.history import History
from agentcgroupd.history.room import Bounds
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.host.kernel_log import OomLog
from agentcgroupd.host.listening import handed_over, listen
from agentcgroupd.host.run_dir import RunDir
from agentcgroupd.host.systemd import notify
from agentcgroupd.observers import Observers
from agentcgroupd.policy.learning import Peaks
from agentcgroupd.restore import restore
from agentcgroupd.rpc.agent_calls import AgentCalls
from agentcgroupd.rpc.attach import AttachServer
from agentcgroupd.rpc.budgets import Budgets
from agentcgroupd.rpc.callers import Callers
from agentcgroupd.rpc.gate import Gate
from agentcgroupd.rpc.grpc_server import GrpcServer
from agentcgroupd.rpc.hook_verb import HookVerb
from agentcgroupd.rpc.memory import MemoryWatch
from agentcgroupd.rpc.messages import Messages
from agentcgroupd.rpc.past import Past
from agentcgroupd.rpc.relay import Relay
from agentcgroupd.rpc.sealed import SealedDoor
from agentcgroupd.rpc.service import Parts
from agentcgroupd.rpc.services import AdminService, AgentService
from agentcgroupd.rpc.verbs import PING, AgentVerbs, OperatorVerbs, Verb, pong
from agentcgroupd.rpc.views import Views
from agentcgroupd.running import Running, note_alive
from agentcgroupd.runtime.watching import Runtimes
from agentcgroupd.sessions.cgroups import SessionCgroups
from agentcgroupd.sessions.lifecycle import SessionLifecycle
from agentcgroupd.sessions.limits import Ceilings
from agentcgroupd.sessions.pool import ALIVE_XATTR, Pool, PoolClaim
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.second_records import SecondRecords
from agentcgroupd.telemetry.audit import Audit, AuditLimits
from agentcgroupd.telemetry.feed import Feed
from agentcgroupd.telemetry.metrics import Heartbeat, Metrics
from agentcgroupd.telemetry.metrics_server import MetricsServer
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.telemetry.started import started
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

FILES_WANTED = 262_144
THREADS = 8
"""In which what blocks is done."""
STOP_MOST_S = 1.5
"""How long one part may take to stop; then the daemon goes on stopping without it."""


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
        notices = self._make_notices(undo)
        turns = Turns()
        pool = place.claim.prepare()
        policy_files = PolicyFiles(config.policy, policy, notices, pool.memory_max_bytes)
        events = FileEvents(turns)
        undo.callback(events.close)

        # What acts on sessions and calls, and what follows them.
        sessions = Sessions(pool)
        plane = DataPlane(config.bpf, config.guard, pool.cgroup.id)
        undo.callback(plane.close)
        plane.open()
        cpu = CpuScheduling(
            config.cpu,
            config.bpf.objects,
            notices.metrics,
            lambda: policy_files.policy.cpu,
            pool,
            sessions.open.values,
        )
        actions = Actions(notices, lambda: plane.memory, pool.cgroup, cpu.hurry)
        gpus = Gpus(
            config.gpu,
            run_dir,
            sessions,
            actions,
            objects=config.bpf.objects,
            programs=config.bpf.enabled,
            sources=self.gpu_sources,
        )
        undo.push_async_callback(_bounded, "GPU sharing", gpus.stop)
        await gpus.start(pool.cgroup)
        observers = Observers(config, plane, cpu, gpus, pool, sessions.open.values, notices)
        undo.callback(observers.close)

        # Calls, what lets them in, and the sessions that they are in.
        ceilings = Ceilings(config.calls, pool, lambda: gpus.ceiling)
        peaks = Peaks()
        reports = Reports(
            pool.cgroup,
            notices,
            ceilings.of,
            cpu.numbers,
            peaks,
            undo.enter_context(closing(OomLog.open())),
        )
        queue = AdmissionQueue([gpus.resource], notices)
        calls = Calls(
            config.calls,
            events,
            actions,
            notices,
            reports,
            observers,
            ceilings.of,
            queue.count,
            turns,
            SecondRecords(run_dir),
        )
        undo.callback(calls.let_go)
        admission = Admission(calls, queue)
        guard = None
        if config.guard.enabled and pool.memory_max_bytes is not None:
            guard = PoolGuard(
                config.guard,
                policy_files,
                pool,
                calls,
                queue,
                peaks,
                sessions.open,
                observers.abilities,
                _marks(config, pool, events, observers),
                events,
                plane.look,
            )
        runtimes = Runtimes(config.containers, run_dir, pool.mount, sessions, notices)
        lifecycle = SessionLifecycle(
            SessionCgroups(
                config.sessions, pool, sessions, lambda: gpus.ceiling, gpus.grants.place_part
            ),
            sessions,
            pool,
            events,
            notices,
            admission,
            cpu.numbers,
            [observers, runtimes.containers]
            if guard is None
            else [observers, guard, runtimes.containers],
        )
        undo.callback(lifecycle.stop)

        # What an earlier daemon left.
        pool.settled_ticks = _last_alive_ticks(pool)
        observers.follow(calls)
        restore(lifecycle, sessions, calls, notices, peaks)

        # Who may ask, and what goes on from now on.
        parts = Parts(
            sessions,
            lifecycle,
            calls,
            queue,
            AgentCalls(Callers(sessions, config.calls.tools_may), calls, queue, admission),
            Views(
                pool,
                sessions,
                lifecycle,
                calls,
                queue,
                policy_files,
                gpus,
                guard.loop if guard is not None else None,
            ),
            Past(notices.history, calls.open.get, queue.waits),
            policy_files,
            notices,
            turns,
        )
        running = Running(
            parts,
            pool,
            observers,
            cpu,
            gpus,
            events,
            MemoryWatch(config.limits.memory),
            config.server,
        )
        running.sweep_at_once()
        await self._open_doors(undo, parts, admission, running, place.sockets)
        # What is held is let go of first: no part that is slow to stop can keep it.
        undo.callback(calls.release)
        undo.callback(gpus.let_go)
        if guard is not None:
            undo.callback(guard.stop)
            guard.start()
        observers.start(guard)
        runtimes.start(lifecycle, undo)
        place.keep()
        return _ready(running, pool, sessions, observers, run_dir)

    def _make_notices(self, undo: AsyncExitStack) -> Notices:
        config, kept = self._config.audit, self._config.history
        history = History(kept.path, Bounds(kept.max_bytes, kept.session_percent, kept.max_age))
        undo.push_async_callback(_bounded, "the history", history.close)
        limits = AuditLimits(
            config.max_bytes, config.files, config.session_percent, config.session_rate
        )
        audit = Audit(config.path, config.max_bytes, limits, history.note)
        undo.callback(audit.close)
        return Notices(audit, Metrics(), Feed(), history)

    async def _open_doors(
        self,
        undo: AsyncExitStack,
        parts: Parts,
        admission: Admission,
        running: Running,
        given: Mapping[str, socket.socket],
    ) -> None:
        """Let agents, the operator and the metrics' reader in. `given`: the sockets that systemd
        handed over. Raises OSError or ConfigError."""
        for role in ("agent", "admin"):
            budgets = await self._open_sockets(
                undo, parts, admission, running.observers, role, given
            )
            running.memory.add(budgets)
        await self._serve_metrics(undo, parts.notices.metrics, running.heartbeat)
        undo.callback(parts.notices.feed.end)

    async def _open_sockets(
        self,
        undo: AsyncExitStack,
        parts: Parts,
        admission: Admission,
        observers: Observers,
        role: str,
        given: Mapping[str, socket.socket],
    ) -> Budgets:
        run_dir, metrics = self._config.server.run_dir, parts.notices.metrics
        mode = 0o666 if role == "agent" else 0o600
        stream, packets = socket.SOCK_STREAM, socket.SOCK_SEQPACKET
        listener = listen(run_dir / role / "grpc.sock", stream, mode, f"{role}-grpc", given)
        undo.callback(listener.close)
        attach_listener = listen(
            run_dir / role / "attach.sock", packets, mode, f"{role}-attach", given
        )
        undo.callback(attach_listener.close)
        find = parts.sessions.of_cgroup
        budgets = Budgets(self._config.limits, self._config.sessions.connections_max, metrics)
        gate = Gate(metrics, parts.turns)
        private = run_dir / f"private/{role}.sock"
        server = GrpcServer(private, f"agentcgroup.v1.{role.capitalize()}", gate)
        relay = Relay(listener, server.address, metrics, find, budgets, parts.turns)
        gate.relay = relay
        verbs: dict[str, Verb] = {PING: pong}
        if role == "agent":
            for_agents = AgentService(parts, relay)
            pb_grpc.add_AgentServicer_to_server(for_agents, server.server)
            messages = Messages("Agent", for_agents, parts.agent_calls, metrics, parts.turns)
            callers = Callers(parts.sessions, self._config.calls.tools_may)
            agent = AgentVerbs(callers, parts.calls, admission, self._config.calls.rightsize)
            verbs |= {"attach": agent.attach, "begin": agent.begin}
            sealed = SealedDoor(dict(verbs), find, budgets, parts.turns, parts.notices)
            undo.callback(sealed.stop)
            observers.declared = sealed.declared
            verbs["report"] = agent.report
            verbs["told"] = HookVerb(callers, parts.calls).told
        else:
            for_operator = AdminService(parts, relay)
            pb_grpc.add_AdminServicer_to_server(for_operator, server.server)
            messages = Messages("Admin", for_operator, None, metrics, parts.turns)
            verbs["enter"] = OperatorVerbs(parts.sessions, parts.calls).enter
        attach = AttachServer(attach_listener, verbs, messages, metrics, find, budgets, parts.turns)
        # Undone from the last: nobody new is let in, requests under way get a moment to end, and
        # then connections are closed.
        undo.push_async_callback(_bounded, f"the {role} relay", relay.stop)
        undo.push_async_callback(_bounded, f"the {role} gRPC server", server.stop)
        undo.callback(relay.close_door)
        undo.callback(attach.stop)
        await server.start()
        await relay.start()
        attach.start()
        return budgets

    async def _serve_metrics(
        self, undo: AsyncExitStack, metrics: Metrics, heartbeat: Heartbeat
    ) -> None:
        address = self._config.server.metrics_address
        if not address:
            return
        metrics.tell_health(heartbeat)
        try:
            server = MetricsServer(address, metrics, heartbeat.wrong, heartbeat.unready)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            message = f"server.metrics_address: {address!r} cannot be used: {why}"
            raise ConfigError(message) from None
        close = partial(asyncio.to_thread, server.close)
        undo.push_async_callback(_bounded, "the metrics server", close)


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


async def _bounded(what: str, stop: Callable[[], Awaitable[None]]) -> None:
    """Stop a part, but wait no longer than STOP_MOST_S for it."""
    task = asyncio.ensure_future(stop())
    done, _ = await asyncio.wait({task}, timeout=STOP_MOST_S)
    if done:
        task.result()
        return
    task.cancel()
    log.error("%s did not stop within %g s: the daemon ends without it", what, STOP_MOST_S)
