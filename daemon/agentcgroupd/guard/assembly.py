"""Puts together what keeps the pool in its limits: snapshots, the guard, and the queue for room."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.memory_resource import MemoryResource
from agentcgroupd.calls.queue import AdmissionQueue
from agentcgroupd.cgroup.psi import PressureTrigger
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import KnobError
from agentcgroupd.guard.host_capacity import read_host, zram_used_bytes
from agentcgroupd.guard.loop import Guard
from agentcgroupd.guard.sampler import Looker
from agentcgroupd.guard.session_sampler import Views
from agentcgroupd.policy.learning import Peaks
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Host, Signal, SignalKind
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import Call, Session

log = logging.getLogger(__name__)

HOST_USEC = 1_000_000
"""Swap is not read more often."""
NUDGE_S = 0.005
"""Ends of calls within this time are one signal."""
STALL_USEC = 200_000
WINDOW_USEC = 2_000_000
"""The pool's PSI trigger: a tenth of the time, as policies/default.toml has it."""


class HostReader:
    """What the host can do, read now and then."""

    def __init__(self, pool: Pool, programs: Callable[[], Host]) -> None:
        self._pool = pool
        self._programs = programs
        self._read_usec: int | None = None
        self._host = Host()
        self.zram_bytes = 0
        """Memory that the pool has in zram, which no cgroup is charged for."""

    def __call__(self, now_usec: int) -> Host:
        if self._read_usec is None or now_usec - self._read_usec >= HOST_USEC:
            self._read_usec = now_usec
            try:
                self._host = read_host(self._programs(), self._pool.cgroup)
                self.zram_bytes = zram_used_bytes(self._pool.cgroup)
            except (KnobError, OSError) as error:
                # What is not known is taken for not there: nothing is sent to swap then.
                log.error("swap cannot be read: %s", error)
                self._host = self._programs()
        return self._host


class Control:
    """Looks, decides, acts; and lets calls in. Only where the pool has a limit on memory."""

    def __init__(
        self,
        config: GuardConfig,
        policy: Policy,
        pool: Pool,
        calls: Calls,
        queue: AdmissionQueue,
        peaks: Peaks,
        sessions: Mapping[str, Session],
        programs: Callable[[], Host],
    ) -> None:
        """On a running loop. Nothing is done before the guard is started. `programs`: what those in
        the kernel can do."""
        self._actions = calls.actions
        self._sessions = sessions
        self._pool = pool
        self._nudge: asyncio.TimerHandle | None = None
        self._trigger: PressureTrigger | None = None
        host = HostReader(pool, programs)
        views = Views(sessions.values)
        looker = Looker(pool, calls, views.look, host, lambda: peaks.sorted_bytes,
                        lambda: [s for s in sessions.values() if s.adopted])  # fmt: skip
        self.guard = Guard(config, policy, looker, calls, sessions)
        self.memory = MemoryResource(lambda: self.guard.policy, self.guard.snapshot)
        self._queue = queue
        queue.add(self.memory)
        self.guard.on_look = self.memory.sampled
        self.guard.wanted = lambda: queue.waits_for(self.memory)
        self._learn_by(policy)

    def start(self) -> None:
        """Listen for stalls of the pool; where the kernel tells none, the guard's looks have to
        do."""
        try:
            self._trigger = PressureTrigger(
                self._pool.cgroup, "some", STALL_USEC, WINDOW_USEC,
                lambda: self.guard.look_now(Signal(SignalKind.PRESSURE)),
            )  # fmt: skip
            self._trigger.start()
        except (KnobError, OSError) as error:
            log.warning("stalls of the pool are not told by the kernel: %s", error)
            self._trigger = None

    def stop(self) -> None:
        """No more looks; sessions that were slowed do not stay so."""
        self.guard.stop()
        for session in self._sessions.values():
            try:
                self._actions.restore(session, "The daemon is stopping.")
            except KnobError:
                log.debug("session %s is gone", session.id)
        if self._trigger is not None:
            self._trigger.stop()
        if self._nudge is not None:
            self._nudge.cancel()

    def change_policy(self, policy: Policy) -> None:
        """From now on this one."""
        self._learn_by(policy)
        self.guard.change_policy(policy)

    def session_opened(self, session: Session) -> None:
        """It learns as the policy says."""
        session.learned.learning = self.guard.policy.learning

    def _learn_by(self, policy: Policy) -> None:
        for session in self._sessions.values():
            session.learned.learning = policy.learning

    def call_ended(self, call: Call, held_bytes: int) -> None:
        """Room may be there for who waits or is paused."""
        self.memory.call_ended(held_bytes)
        wanted = self._queue.waits_for(self.memory) or self.guard.holds_back
        if self._nudge is None and wanted:
            loop = asyncio.get_running_loop()
            self._nudge = loop.call_later(NUDGE_S, self._look, call.id)

    def _look(self, call_id: str) -> None:
        self._nudge = None
        self.guard.look_now(Signal(SignalKind.ENDED, call_id))
