"""Puts together what keeps the pool in its limits: the sampler, the loop, and the wait for
memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from agentcgroupd.bpf.look import LookProgram
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.memory_resource import MemoryResource
from agentcgroupd.calls.queue import AdmissionQueue
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.cgroup.psi import PressureTrigger
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.guard.credit import CreditKeeper
from agentcgroupd.guard.high_mark import PoolMark
from agentcgroupd.guard.host_reader import HostReader
from agentcgroupd.guard.io_sampler import IoSampler
from agentcgroupd.guard.lock_holders import LockHolders
from agentcgroupd.guard.look import CallLook, FileLook, KernelLook
from agentcgroupd.guard.loop import GuardLoop
from agentcgroupd.guard.policy_files import PolicyFiles
from agentcgroupd.guard.sampler import Sampler
from agentcgroupd.guard.session_sampler import SessionSampler
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.policy.engine import kill_free_bytes
from agentcgroupd.policy.learning import Peaks
from agentcgroupd.policy.schedule import NUDGE_S
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Host, Signal, SignalKind
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import Call, Session
from agentcgroupd.units import CgroupId

log = logging.getLogger(__name__)

ROOT_CGROUP = CgroupId(1)
"""Id of the topmost cgroup, which kernfs gives its root."""
STALL_USEC = 200_000
WINDOW_USEC = 2_000_000
"""The pool's PSI trigger: a tenth of the time, as policies/default.toml has it."""


class PoolGuard:
    """Guards the pool's memory and lets calls in. Only where the pool has a limit on memory."""

    def __init__(
        self,
        config: GuardConfig,
        policy_files: PolicyFiles,
        pool: Pool,
        calls: Calls,
        queue: AdmissionQueue,
        peaks: Peaks,
        sessions: Mapping[str, Session],
        programs: Callable[[], Host],
        marks: Sequence[PoolMark],
        events: FileEvents,
        look: LookProgram | None,
    ) -> None:
        """Make the parts, on a running loop. From now on calls that `queue` lets in may have to
        wait for memory; nothing is done to calls before `start`. `peaks`: what ended calls
        took; `programs`: what the programs in the kernel can do; `marks`: what tells that use of
        the pool has passed its mark; `events` tells when calls have used up their credit; `look`:
        the program that looks at all calls, None: their files are read."""
        self._actions = calls.actions
        self._sessions = sessions
        self._pool = pool
        self._nudge: asyncio.TimerHandle | None = None
        self._trigger: PressureTrigger | None = None
        host = HostReader(pool, self._abilities)
        self._programs = programs
        self.credit: CreditKeeper | None = None
        session_sampler = SessionSampler(sessions.values)
        sampler = Sampler(
            pool,
            calls,
            session_sampler.views,
            host,
            lambda: peaks.sorted_bytes if self.credit is None else self.credit.peaks(),
            lambda: [s for s in sessions.values() if s.adopted],
            self._make_look(look),
        )
        sampler.steady_usec = lambda: policy_files.policy.headroom.steady
        sampler.cpu_below_bytes = lambda: kill_free_bytes(policy_files.policy, sampler.limit_bytes)
        calls.actions.touched = sampler.touch
        self.sampler = sampler
        disks = IoSampler(
            pool.cgroup,
            calls.open,
            sessions.values,
            lambda: policy_files.policy,
            calls.actions.disks_lowered,
        )
        sampler.disks = disks
        self._memory = MemoryResource(lambda: policy_files.policy, sampler.snapshot)
        if config.credit:
            self.credit = CreditKeeper(
                lambda: policy_files.policy,
                sampler,
                calls,
                events,
                lambda: peaks.sorted_bytes,
                lambda: programs().can_deny,
            )
            sampler.credit_bytes = lambda: self._held_credit()
        self._queue = queue
        queue.add(self._memory)
        self.loop = GuardLoop(
            config,
            policy_files.policy,
            sampler,
            calls,
            sessions,
            self._waits,
            self._memory.sampled,
            marks,
            LockHolders(sessions, sampler.touch),
            disks,
        )
        policy_files.follow(self._change_policy)
        self._learn_by(policy_files.policy)

    def _make_look(self, program: LookProgram | None) -> CallLook:
        if program is None:
            return FileLook()

        def root() -> CgroupId:
            # An adopted session lies beside the pool, so the walk begins at the top.
            beside = any(s.adopted for s in self._sessions.values())
            return ROOT_CGROUP if beside else self._pool.cgroup.id

        return KernelLook(program, root)

    def start(self) -> None:
        """Guard from now on. Where the kernel tells no stalls of the pool, the loop's own samples
        have to do. Raises KnobError, BpfError or OSError where the pool's mark cannot be set."""
        if self.credit is not None:
            self.credit.start()
        self.loop.start()
        try:
            self._trigger = PressureTrigger(
                self._pool.cgroup,
                "some",
                STALL_USEC,
                WINDOW_USEC,
                lambda: self.loop.decide_now(Signal(SignalKind.PRESSURE)),
            )
            self._trigger.start()
        except (KnobError, OSError) as error:
            log.warning("stalls of the pool are not told by the kernel: %s", error, extra=DETAIL)
            self._trigger = None

    def stop(self) -> None:
        """Decide no more, and give sessions that were slowed their CPU weight again."""
        self.loop.stop()
        if self.credit is not None:
            self.credit.stop()
        for session in self._sessions.values():
            try:
                self._actions.restore(session, "The daemon is stopping.")
            except CgroupGone:
                log.debug("session %s is gone", session.id)
            except KnobError as error:
                log.error("session %s may stay slowed: %s", session.id, error)
        if self._trigger is not None:
            self._trigger.stop()
        if self._nudge is not None:
            self._nudge.cancel()

    def _abilities(self) -> Host:
        """What the programs can do here, and credit."""
        return replace(self._programs(), can_hold=self.credit is not None)

    def _held_credit(self) -> int | None:
        return None if self.credit is None else self.credit.unused_bytes

    def call_opened(self, call: Call) -> None:
        """Look at a call, and hold it to its credit, from now on."""
        self.sampler.call_opened(call)
        if self.credit is not None:
            self.credit.call_opened(call)

    def call_changed(self, call: Call) -> None:
        """Judge a call anew with the next sample."""
        self.sampler.touch(call)

    def call_closed(self, call: Call) -> None:
        """Forget a call whose cgroup is gone or given up."""
        self.sampler.call_closed(call)
        if self.credit is not None:
            self.credit.call_closed(call)

    def session_opened(self, session: Session) -> None:
        """Let a session learn as the policy says."""
        session.learned.learning = self.loop.policy.learning

    def session_changed(self, session: Session) -> None:
        """Do nothing: each sample reads the limits anew."""

    def session_given_back(self, session: Session) -> None:
        """Do nothing: no process of a session is held by the guard itself."""

    def session_closed(self, session: Session) -> None:
        """Do nothing: the samplers notice by themselves."""

    def _change_policy(self, policy: Policy) -> None:
        self._learn_by(policy)
        self.loop.change_policy(policy)

    def _learn_by(self, policy: Policy) -> None:
        for session in self._sessions.values():
            session.learned.learning = policy.learning

    def _waits(self) -> bool:
        return self._queue.waits_for(self._memory)

    def call_ended(self, call: Call, held_bytes: int) -> None:
        """Let calls that wait or are paused have what a call has given back, a moment later."""
        self._memory.call_ended(held_bytes)
        self.room_freed(call)

    def room_freed(self, call: Call) -> None:
        """Let calls that wait or are paused have what is not kept for a call any more, a moment
        later."""
        self.sampler.touch(call)
        if self._nudge is None and (self._waits() or self.loop.holds_back):
            loop = asyncio.get_running_loop()
            self._nudge = loop.call_later(NUDGE_S, self._decide, call.id)

    def _decide(self, call_id: str) -> None:
        self._nudge = None
        self.loop.decide_now(Signal(SignalKind.ENDED, call_id))
