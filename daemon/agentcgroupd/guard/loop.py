"""The guard's loop: sample the pool, ask the engine, apply what it decides. `policy.schedule` says
when."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence

from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import BpfError, KnobError
from agentcgroupd.guard.high_mark import PoolMark
from agentcgroupd.guard.io_sampler import IoSampler
from agentcgroupd.guard.lock_holders import LockHolders
from agentcgroupd.guard.sampler import Sampler
from agentcgroupd.policy.engine import decide
from agentcgroupd.policy.schedule import Schedule, holds_back, rest_s
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import (
    IO_ACTIONS,
    SESSION_ACTIONS,
    TICK,
    Action,
    Decision,
    Signal,
    SignalKind,
    Snapshot,
    State,
)
from agentcgroupd.state.session import Call, Session, boottime_usec

log = logging.getLogger(__name__)

IDLE_INTERVAL_S = 1.0
DRY_SAID_USEC = 10_000_000
"""What a dry run would do is told once in this time for each subject, not with each decision."""


class GuardLoop:
    """Keeps the pool below its limit. `start` and `stop` on a running loop."""

    def __init__(
        self,
        config: GuardConfig,
        policy: Policy,
        sampler: Sampler,
        calls: Calls,
        sessions: Mapping[str, Session],
        waits: Callable[[], bool],
        on_sample: Callable[[Snapshot], None],
        marks: Sequence[PoolMark],
        locks: LockHolders | None = None,
        disks: IoSampler | None = None,
    ) -> None:
        """`waits`: whether a call waits for memory, so that snapshots are taken although the pool
        is calm; `on_sample`: called with each snapshot, after what was decided by it is done;
        `marks`: what tells that use of the pool has passed the mark; all of them follow it;
        `locks`: finds calls that hold others up, `disks`: who waits for disks and who uses them;
        None: nobody looks."""
        self._config = config
        self._sampler = sampler
        self._calls = calls
        self._sessions = sessions
        self._waits = waits
        self._on_sample = on_sample
        self._marks = marks
        self._locks, self._disks = locks, disks
        self._actions = calls.actions
        self._limit = sampler.limit_bytes
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._dry_said: dict[tuple[str, str], int] = {}
        self._free_bytes = 0
        """Memory of the pool that was free at the last sample."""
        self._least_s = 0.0
        """Between samples, so that on a slow machine sampling does not become the main work."""
        self.holds_back = False
        """Whether something was done that is to be undone in time."""
        self.policy = policy
        self._schedule = self._schedule_of(policy)
        self.state = State()
        self.applied = 0
        """Decisions that were applied so far."""

    def start(self) -> None:
        """Sample from now on. Raises KnobError, BpfError or OSError where the mark cannot be
        set."""
        for mark in self._marks:
            mark.start(*self.mark_bytes, lambda: self.decide_now(Signal(SignalKind.MARK)))
        self._timer = self._loop.call_later(0, self._tick)

    def stop(self) -> None:
        """Sample no more; what was done stays done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for mark in self._marks:
            mark.stop()

    @property
    def mark_bytes(self) -> tuple[int, int]:
        """Use of the pool at which to decide at once, and below which that is over."""
        return self._schedule.mark_bytes, self._schedule.resume_bytes

    def _schedule_of(self, policy: Policy) -> Schedule:
        return Schedule(policy, self._limit, self._config.tick / 1e6, os.cpu_count() or 1)

    def change_policy(self, policy: Policy) -> None:
        """Decide by another policy from now on; what was done under the old one is judged by it at
        once."""
        self.policy = policy
        self._schedule = self._schedule_of(policy)
        for mark in self._marks:
            try:
                mark.move(*self.mark_bytes)
            except KnobError as error:
                log.error("the pool's mark cannot be moved: %s", error)
        self.decide_now(Signal(SignalKind.RELOADED))

    def decide_now(self, signal: Signal) -> None:
        """Decide because something happened; the timer goes on from here."""
        if self._timer is not None:
            self._timer.cancel()
            self._tick(signal)

    def call_began(self) -> None:
        """Sample soon: the next sample may have been put off because no call was open."""
        if self._timer is None:
            return
        soon = self._loop.time() + max(self._least_s, self._interval_s())
        if self._timer.when() > soon:
            self._timer.cancel()
            self._timer = self._loop.call_at(soon, self._tick)

    def still_short(self) -> bool:
        """Whether less of the pool is free than frozen calls wait for. Raises KnobError."""
        return self._sampler.usage() >= self.mark_bytes[1]

    def snapshot(self) -> Snapshot:
        """What the policy sees now. Raises KnobError."""
        return self._sampler.snapshot()

    def _tick(self, signal: Signal = TICK) -> None:
        started = self._loop.time()
        interval = IDLE_INTERVAL_S
        try:
            self._decide(signal)
            interval = self._interval_s()
        except KnobError as error:
            log.error("the pool cannot be read: %s", error)
        finally:
            self._least_s = rest_s(self._loop.time() - started)
            self._timer = self._loop.call_later(max(interval, self._least_s), self._tick)

    def _interval_s(self) -> float:
        """Seconds until the next sample."""
        return self._schedule.interval_s(self._free_bytes, len(self._calls.open))

    def _decide(self, signal: Signal) -> None:
        """Sample, decide and apply once; where the pool is calm and nothing is to be undone, only
        its use is read. Raises KnobError."""
        usage = self._sampler.usage()
        for mark in self._marks:
            mark.sampled(usage)
        self._free_bytes = free = self._limit - usage
        calm = self._schedule.is_calm(free, signal)
        busy = self._disks is not None and self._disks.look(boottime_usec())
        if calm and not busy and not self.holds_back and not self._waits():
            return
        self._check_pauses()
        self._check_locks()
        snapshot = self._sampler.sample(usage)
        outcome = decide(self.policy, snapshot, signal, self.state)
        self.state = outcome.state
        for decision in outcome.decisions:
            self._apply(decision, snapshot.now_usec)
        self.holds_back = holds_back(snapshot, outcome.decisions)
        self._on_sample(snapshot)

    def _check_locks(self) -> None:
        """Lend priority to calls that hold up others, where calls are paused or may be."""
        if self._locks is None:
            return
        if not self.holds_back and self._free_bytes > self._limit - self.mark_bytes[1]:
            self._locks.clear()
            return
        try:
            self._locks.update(boottime_usec())
        except OSError as error:
            log.error("file locks cannot be read: %s", error)

    def _check_pauses(self) -> None:
        """Find out which paused calls have stopped since they were told to."""
        for call in self._sampler.active():
            if call.frozen_since_usec is None or call.stopped:
                continue
            try:
                self._actions.check_pause(call)
            except KnobError as error:
                log.debug("call %s: %s", call.id, error)

    def _apply(self, decision: Decision, now_usec: int) -> None:
        if decision.dry_run:
            self._say_dry(decision, now_usec)
            return
        try:
            applied = (
                self._apply_to_session(decision)
                if decision.action in SESSION_ACTIONS
                else self._apply_to_call(decision)
            )
        except (KnobError, BpfError) as error:
            log.warning("%s of %s failed: %s", decision.action.value, decision.subject, error)
            return
        self.applied += applied

    def _apply_to_call(self, decision: Decision) -> bool:
        call = self._calls.open.get(decision.subject)
        if call is None:
            return False
        actions, why = self._actions, decision.why
        if decision.action in IO_ACTIONS:
            self._apply_to_disks(call, decision)
            return True
        match decision.action:
            case Action.THROTTLE:
                actions.throttle(call, decision.amount, why, by_cpu=decision.by_cpu)
            case Action.UNTHROTTLE:
                actions.unthrottle(call, why)
            case Action.DENY:
                actions.deny(call, why)
            case Action.ALLOW:
                actions.allow(call, why)
            case Action.FREEZE:
                actions.freeze(call, why)
            case Action.THAW:
                actions.thaw(call, why)
            case Action.KILL:
                actions.kill(call, why)
        return True

    def _apply_to_disks(self, call: Call, decision: Decision) -> None:
        actions, why = self._actions, decision.why
        match decision.action:
            case Action.IO_WEIGHT:
                actions.io_weight(call, decision.amount, why)
            case Action.IO_UNWEIGHT:
                actions.io_unweight(call, why)
            case Action.IO_MAX:
                actions.io_max(call, decision.amount, why)
            case Action.IO_UNMAX:
                actions.io_unmax(call, why)

    def _apply_to_session(self, decision: Decision) -> bool:
        if not decision.subject:
            holders = self._sampler.cache_holders()
            self._actions.reclaim_pool(decision.amount, decision.why, holders)
            return True
        session = self._sessions.get(decision.subject)
        if session is None or session.closing:
            return False
        match decision.action:
            case Action.RECLAIM:
                calls = [self._calls.open[c] for c in decision.calls if c in self._calls.open]
                if decision.calls and not calls:
                    return False
                self._actions.reclaim(session, decision.amount, calls, decision.why)
            case Action.SLOW:
                self._actions.slow(session, decision.amount, decision.why)
            case Action.RESTORE:
                self._actions.restore(session, decision.why)
        return True

    def _say_dry(self, decision: Decision, now_usec: int) -> None:
        key = decision.action.value, decision.subject
        if now_usec - self._dry_said.get(key, -DRY_SAID_USEC) < DRY_SAID_USEC:
            return
        if len(self._dry_said) > 10_000:
            self._dry_said.clear()
        self._dry_said[key] = now_usec
        self._actions.notices.dry_run(
            decision.action.value, decision.subject, decision.ruleset, decision.why
        )
