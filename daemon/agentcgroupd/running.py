"""A daemon that has started: what it does again and again until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.config import ServerConfig
from agentcgroupd.cpu.scheduling import CpuScheduling
from agentcgroupd.errors import AgentcgroupdError, KnobError
from agentcgroupd.garbage import Garbage
from agentcgroupd.gpu.service import Gpus
from agentcgroupd.guard.disks import DiskGuard
from agentcgroupd.host.systemd import notify, watchdog_interval_s
from agentcgroupd.observers import Observers
from agentcgroupd.rpc.canary import EVERY_S, Canary
from agentcgroupd.rpc.memory import MemoryWatch
from agentcgroupd.rpc.service import Parts
from agentcgroupd.sessions.holding import look_at_adopted, used_of_pool
from agentcgroupd.sessions.pool import ALIVE_XATTR, Pool
from agentcgroupd.state.session import boottime_usec
from agentcgroupd.telemetry.labels import CALL_STATES
from agentcgroupd.telemetry.metrics import Heartbeat
from agentcgroupd.telemetry.session_metrics import SessionMetrics
from agentcgroupd.turns import in_slices

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S, SWEEP_MOST_S = 10.0, 60.0
SWEEP_SHARE = 0.005
"""Most of a CPU that sweeps take, which find only what nobody has told of, and looks at all
sessions for metrics: with thousands of calls they are further apart, up to the larger number."""
BEAT_INTERVAL_S = 0.5
SHOW_INTERVAL_S, SHOW_MOST_S = 2.0, 10.0
"""Between looks at all sessions for the metrics, and at what adopted ones hold."""


class PartFailed(AgentcgroupdError):
    """The daemon cannot go on; systemd is to start it again."""


class Running:
    """Sweeps, beats, asks itself and compares the policy's files until it is told to stop."""

    def __init__(
        self,
        parts: Parts,
        pool: Pool,
        observers: Observers,
        cpu: CpuScheduling,
        gpus: Gpus,
        events: FileEvents,
        memory: MemoryWatch,
        disks: DiskGuard,
        server: ServerConfig,
    ) -> None:
        self._run_dir, self._is_watched = server.run_dir, bool(server.metrics_address)
        self._parts = parts
        self.memory = memory
        self.garbage = Garbage(lambda: len(parts.calls.open) + len(parts.sessions.open))
        self._events = events
        self._pool = pool
        self.observers = observers
        self._cpu = cpu
        self._gpus = gpus
        self._disks = disks
        self._calls = parts.calls
        self._metrics = parts.notices.metrics
        self._sessions_shown = server.metrics_sessions
        self.heartbeat = Heartbeat()
        self._stop = asyncio.Event()

    def listen_to_signals(self) -> None:
        """Stop on SIGTERM or SIGINT, and read the policy anew on SIGHUP, from now on."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._parts.policy_files.reload_quietly)

    async def until_stopped(self) -> None:
        """Serve until a signal says to stop. Raises PartFailed if a part of the daemon ends by
        itself."""
        try:
            async with asyncio.TaskGroup() as group:
                endless = (
                    group.create_task(self._sweep_forever()),
                    group.create_task(self._beat_forever()),
                    group.create_task(self._ask_forever()),
                    group.create_task(self._show_forever()),
                    group.create_task(self._disks.limits_forever()),
                    group.create_task(self._disks.rooms_forever()),
                    group.create_task(self._parts.policy_files.compare_forever()),
                )
                await self._stop.wait()
                for task in endless:
                    task.cancel()
        except BaseExceptionGroup as failed:
            cause = failed.exceptions[0]
            if isinstance(cause, PartFailed):
                raise cause from None
            log.error("a part of the daemon failed", exc_info=cause)
            raise PartFailed("a part of the daemon failed") from cause

    def sweep(self) -> Iterator[None]:
        """Find what nobody has told of, one thing a step: calls whose end was missed, cgroups that
        nobody owns, sessions whose cgroup is gone."""
        for part in (self._calls.check_all, self._sweep_observers, self._parts.lifecycle.sweep):
            try:
                yield from part()
            except (AgentcgroupdError, OSError, ValueError) as error:
                # One thing that cannot be read must not end the daemon: the next sweep tries again.
                log.error("housekeeping: %s", error)

    def _sweep_observers(self) -> Iterator[None]:
        self.observers.sweep()
        yield

    def sweep_at_once(self) -> None:
        """Do all of `sweep`, before anybody waits for the loop."""
        for _ in self.sweep():
            pass

    async def _sweep_forever(self) -> None:
        rest_s = SWEEP_INTERVAL_S
        while True:
            await asyncio.sleep(rest_s)
            took_s = await in_slices(self.sweep())
            rest_s = rest_after(took_s, SWEEP_INTERVAL_S, SWEEP_MOST_S)

    async def _beat_forever(self) -> None:
        """Keep gauges and the loop's lateness."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += BEAT_INTERVAL_S
            await asyncio.sleep(max(0.0, due - loop.time()))
            self._metrics.loop_lag.observe(max(0.0, loop.time() - due))
            due = max(due, loop.time())
            self.heartbeat.beat()
            self._parts.views.idle_cpus.sample()
            if not self._pool.cgroup.exists():
                raise PartFailed(
                    f"the pool's cgroup {self._pool.path} was removed, and with it all sessions in "
                    "it; the daemon ends, and makes it anew when it is started again"
                )
            note_alive(self._pool)
            self._cpu.check()
            self.memory.check()
            self.garbage.check()
            try:
                self._set_gauges()
            except KnobError as error:
                log.error("the pool cannot be read: %s", error)

    async def _show_forever(self) -> None:
        """Keep the metrics of sessions and calls, which there may be thousands of."""
        await asyncio.sleep(SHOW_INTERVAL_S)
        shown = SessionMetrics(self._metrics, self._sessions_shown)
        while True:
            took_s = await in_slices(self._show(shown))
            await asyncio.sleep(rest_after(took_s, SHOW_INTERVAL_S, SHOW_MOST_S))

    def _show(self, shown: SessionMetrics) -> Iterator[None]:
        states = Counter(call.state for call in self._calls.open.values())
        for name, state in CALL_STATES.items():
            self._metrics.calls_open.labels(name).set(states[state])
        sessions = tuple(self._parts.sessions.open.values())
        yield from look_at_adopted(self._pool, sessions)
        self._show_held()
        yield from shown.show(sessions)

    def _show_held(self) -> None:
        most, nan = self._pool.memory_max_bytes, float("nan")
        try:
            held = used_of_pool(self._pool)
        except KnobError as error:
            log.error("the pool cannot be read: %s", error)
            held = None
        self._pool.held_bytes = held
        self._metrics.pool_memory_held.set(nan if held is None else held)
        self._metrics.pool_memory_ratio.set(held / most if held is not None and most else nan)

    async def _ask_forever(self) -> None:
        """Ask the daemon itself; the answers feed systemd's watchdog and /readyz."""
        watchdog_s = watchdog_interval_s()
        if not watchdog_s and not self._is_watched:
            return

        def answered(role: str) -> None:
            self.heartbeat.answered(role)
            if role == "admin" and watchdog_s:
                notify("WATCHDOG=1")

        every_s = min(EVERY_S, watchdog_s / 2 or EVERY_S)
        canary = Canary(self._run_dir, answered, self.heartbeat.unanswered, every_s)
        await canary.forever()

    def _set_gauges(self) -> None:
        metrics = self._metrics
        current = self._pool.cgroup.read_if(knobs.MEMORY_CURRENT)
        if current is not None:
            current += self._pool.adopted_bytes
        metrics.pool_memory_current.set(float("nan") if current is None else current)
        most = self._pool.memory_max_bytes
        metrics.pool_memory_max.set(float("nan") if most is None else most)
        metrics.calls_waited_longest.set(self._parts.queue.longest_wait_usec() / 1e6)
        metrics.cgroups_polled.set(self._events.polled)
        metrics.audit_lost.follow(self._parts.notices.audit.lost)
        metrics.audit_left_out.follow(self._parts.notices.audit.left_out)
        metrics.history_lost.follow(self._parts.notices.history.lost)
        metrics.history_bytes.set(self._parts.notices.history.used_bytes)
        metrics.gpu_calls.set(len(self._gpus.tenants))


def rest_after(took_s: float, least_s: float, most_s: float) -> float:
    """Seconds until something is done again that took so many of a CPU."""
    return min(most_s, max(least_s, took_s / SWEEP_SHARE))


def note_alive(pool: Pool) -> None:
    """Write on the pool until when a daemon has been alive here."""
    ticks = boottime_usec() * os.sysconf("SC_CLK_TCK") // 1_000_000
    try:
        pool.cgroup.set_xattr(str(ticks).encode(), ALIVE_XATTR)
    except KnobError as error:
        log.error("the pool: %s", error)
