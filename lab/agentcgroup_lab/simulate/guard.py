"""The simulator's guard: it samples the pool when the daemon's does, sees what that would see, and
asks the engine.

The schedule, the marks, the estimate of growth and the memory of peaks are the daemon's own modules
(`policy.schedule`, `policy.growth`, `policy.learning`). What a sample costs the daemon is assumed
here, because it limits how often the daemon can sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentcgroup_lab.simulate.types import Lane, SimulatedCall
from agentcgroup_lab.simulate.world import World
from agentcgroupd.config import GuardConfig
from agentcgroupd.guard.session_sampler import QUIET_SHARE
from agentcgroupd.policy.engine import decide
from agentcgroupd.policy.growth import Growth
from agentcgroupd.policy.headroom import GROWING_BYTES_PER_S
from agentcgroupd.policy.schedule import CORES_MOST, NUDGE_S, Schedule, holds_back, rest_s
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import (
    TICK,
    Action,
    CallView,
    Decision,
    Host,
    SessionView,
    Signal,
    SignalKind,
    Snapshot,
    State,
)

_POOL = "pool"
"""The key of the whole pool's growth; no call has it for its id."""
_REFAULT_S = 1.0
"""Refaults show in a session's rate for this long."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Assumptions on the machine that the daemon samples on."""

    tick_s: float = GuardConfig().tick / 1e6
    cores: int = CORES_MOST
    cost_s_per_call: float = 30e-6
    """Two interface files read through Python, 15 us each."""
    sessions_s: float = 0.25
    """Age of a session's view at which it is made anew. The daemon renews a few of them with each
    sample, which makes the oldest of 500 about as old while the pool is short."""
    signals: bool = True
    """The kernel tells when use passes the mark, and when a call ends."""


class SimulatedGuard:
    """Keeps a World's pool by a policy."""

    def __init__(self, world: World, policy: Policy, sampling: Sampling, can_deny: bool) -> None:
        self._world, self._policy, self._sampling = world, policy, sampling
        self._can_deny = can_deny
        self._limit_bytes = int(world.limit)
        self._schedule = Schedule(policy, self._limit_bytes, sampling.tick_s, sampling.cores)
        self._state = State()
        self._version = 0
        """Number of the timer: an event made for an older one is void."""
        self._growth = Growth()
        self._free_bytes = 0
        self._views: list[SessionView] = []
        self._views_s = -1.0
        self._holds_back = False
        self._nudged = False
        self._lanes = {lane.id: index for index, lane in enumerate(world.lanes)}
        self._calls: dict[str, SimulatedCall] = {}
        self.samples = 0
        """Samples in which the engine was asked."""
        self._next_s = 0.0
        self._rest_s = 0.0
        world.quiet_pct = QUIET_SHARE * 100
        if sampling.signals:
            world.mark = float(self._schedule.mark_bytes)
            world.mark_passed = self._mark_passed
            world.call_ended = self._call_ended
            world.call_began = self._call_began
        world.at(0.0, self._tick, None, 0)

    def _mark_passed(self) -> None:
        self._world.mark = None  # until it is over
        self._sample(Signal(SignalKind.MARK))

    def _call_ended(self) -> None:
        if self._holds_back and not self._nudged:
            self._nudged = True
            self._world.at(self._world.now + NUDGE_S, self._nudge, None, 0)

    def _nudge(self, _: object, version: int) -> None:
        del version
        self._nudged = False
        self._sample(Signal(SignalKind.ENDED))

    def _call_began(self) -> None:
        """Bring the next sample forward if it was put off while no call was open."""
        wait_s = self._schedule.interval_s(self._free_bytes, len(self._world.calls))
        soon_s = self._world.now + max(self._rest_s, wait_s)
        if self._next_s > soon_s:
            self._sample_at(soon_s)

    def _sample_at(self, time_s: float) -> None:
        self._version += 1
        self._next_s = time_s
        self._world.at(time_s, self._tick, None, self._version)

    def _tick(self, _: object, version: int) -> None:
        if version == self._version:
            self._sample(TICK)

    def _sample(self, signal: Signal) -> None:
        world = self._world
        usage = int(world.usage)
        if self._sampling.signals and world.mark is None and usage < self._schedule.resume_bytes:
            world.mark = float(self._schedule.mark_bytes)
        self._free_bytes = self._limit_bytes - usage
        cost_s = 0.0
        if self._holds_back or not self._schedule.is_calm(self._free_bytes, signal):
            self.samples += 1
            cost_s = len(world.calls) * self._sampling.cost_s_per_call
            snapshot = self._snapshot(usage)
            outcome = decide(self._policy, snapshot, signal, self._state)
            self._state = outcome.state
            self._holds_back = holds_back(snapshot, outcome.decisions)
            for decision in outcome.decisions:
                self._apply(decision)
        self._rest_s = rest_s(cost_s)
        wait_s = self._schedule.interval_s(self._free_bytes, len(world.calls))
        self._sample_at(world.now + max(wait_s, self._rest_s))

    def _snapshot(self, usage: int) -> Snapshot:
        world, now_s = self._world, self._world.now
        now_usec = int(now_s * 1e6)
        self._calls = {call.id: call for call in world.calls}
        calls = tuple(self._call_view(call, now_usec) for call in world.calls)
        growth = self._growth.of(_POOL, now_usec, usage)
        self._growth.keep({_POOL, *self._calls})
        zram = world.kernel.zram_ratio is not None
        if zram and now_s - self._views_s >= self._sampling.sessions_s:
            self._views = [self._session_view(lane) for lane in world.lanes]
            self._views_s = now_s
        host = Host(
            can_deny=self._can_deny,
            can_reclaim=True,
            swap_free_bytes=max(0, int(world.swap_free)),
            swap_is_zram=zram,
        )
        return Snapshot(
            now_usec=now_usec,
            limit_bytes=self._limit_bytes,
            usage_bytes=usage,
            growth_bytes_per_s=growth,
            calls=calls,
            sessions=tuple(self._views),
            host=host,
            peaks_bytes=world.peaks.sorted_bytes,
        )

    def _call_view(self, call: SimulatedCall, now_usec: int) -> CallView:
        began_usec = int(call.began_s * 1e6)
        if call.view is not None:
            self._growth.of(call.id, now_usec, call.view.memory_bytes, began_usec)
            return call.view
        self._world.sync(call)
        resident = int(call.resident_bytes)
        growth = self._growth.of(call.id, now_usec, resident, began_usec)
        if growth > GROWING_BYTES_PER_S:
            call.grew_usec = now_usec
        frozen_usec = None
        if call.frozen_at_s is not None:
            frozen_usec = int((self._world.now - call.frozen_at_s) * 1e6)
        view = CallView(
            id=call.id,
            name=call.profile.name,
            session_id=call.lane.id,
            priority=call.lane.priority,
            began_usec=began_usec,
            memory_bytes=resident,
            growth_bytes_per_s=growth,
            cpu_usec=int(call.cpu_s * 1e6),
            grew_usec=call.grew_usec,
            frozen_for_usec=frozen_usec,
            paused_usec=int(call.paused_s * 1e6) + (frozen_usec or 0),
            paused_ago_usec=self._ago(call.paused_at_s),
            resumed_ago_usec=self._ago(call.resumed_at_s),
            denied_growth_bytes=_since(resident, call.denied_bytes),
            throttled_growth_bytes=_since(resident, call.throttled_bytes),
        )
        held_up = call.frozen_at_s is not None or call.throttled_bytes is not None
        if not held_up and call.denied_bytes is None and growth < 1.0 and call.segment.rate == 0.0:
            call.view = view  # the same until its next segment
        return view

    def _ago(self, at_s: float | None) -> int | None:
        """Usec since a time; None where there is none."""
        return None if at_s is None else int((self._world.now - at_s) * 1e6)

    def _session_view(self, lane: Lane) -> SessionView:
        now_s = self._world.now
        quiet = lane.state == "runs" and not lane.calls and lane.agent_pct < self._world.quiet_pct
        waiting_s = max(0.0, now_s - lane.active_s) if quiet else 0.0
        refaults = lane.refault_bytes / 4096 if now_s - lane.refault_s < _REFAULT_S else 0.0
        reclaimed_usec = None
        if lane.reclaimed_s is not None:
            reclaimed_usec = int((now_s - lane.reclaimed_s) * 1e6)
        agent = int(lane.agent_resident)
        return SessionView(
            id=lane.id,
            priority=lane.priority,
            memory_bytes=agent,
            agent_bytes=agent,
            waiting_usec=int(waiting_s * 1e6),
            refaults_per_s=refaults,
            slowed=lane.slowed,
            reclaimed_usec=reclaimed_usec,
        )

    def _apply(self, decision: Decision) -> None:
        world = self._world
        action = decision.action
        world.counts[f"action_{action.value}"] += 1
        if decision.dry_run:
            return
        if action in (Action.SLOW, Action.RESTORE):
            world.lanes[self._lanes[decision.subject]].slowed = action is Action.SLOW
            return
        if action is Action.RECLAIM:
            self._reclaim(decision)
            return
        call = self._calls.get(decision.subject)
        if call is None or call not in world.calls:
            return
        world.sync(call)
        call.view = None
        _APPLY[action](world, call)

    def _reclaim(self, decision: Decision) -> None:
        world = self._world
        if not decision.subject:
            return  # file cache is not simulated
        lane = world.lanes[self._lanes[decision.subject]]
        lane.reclaimed_s = world.now
        for name in decision.calls:
            call = self._calls.get(name)
            if call is not None and call in world.calls:
                world.reclaim_call(call, decision.amount)
        if not decision.calls:
            world.reclaim_agent(lane, decision.amount)
        if self._views:
            self._views[self._lanes[decision.subject]] = self._session_view(lane)


def _since(resident: int, then_bytes: float | None) -> int | None:
    """Bytes that a call has grown by since it held `then_bytes`; None where it never did."""
    return None if then_bytes is None else int(resident - then_bytes)


def _freeze(world: World, call: SimulatedCall) -> None:
    if call.frozen_at_s is None:
        call.frozen_at_s = call.paused_at_s = world.now
        world.set_pace(call)


def _thaw(world: World, call: SimulatedCall) -> None:
    if call.frozen_at_s is not None:
        world.go_on(call)


def _throttle(world: World, call: SimulatedCall) -> None:
    if call.throttled_bytes is None:
        call.throttled_bytes = call.resident_bytes
        world.set_pace(call)


def _unthrottle(world: World, call: SimulatedCall) -> None:
    if call.throttled_bytes is not None:
        call.throttled_bytes = None
        world.set_pace(call)


def _deny(world: World, call: SimulatedCall) -> None:
    if call.denied_bytes is None:
        call.denied_bytes = call.resident_bytes
        if call.segment.rate > 0.0 and call.speed > 0.0:
            world.end_call(call, "denied")


def _allow(world: World, call: SimulatedCall) -> None:
    del world
    call.denied_bytes = None


def _kill(world: World, call: SimulatedCall) -> None:
    world.end_call(call, "killed")


_APPLY: dict[Action, Callable[[World, SimulatedCall], None]] = {
    Action.FREEZE: _freeze,
    Action.THAW: _thaw,
    Action.THROTTLE: _throttle,
    Action.UNTHROTTLE: _unthrottle,
    Action.DENY: _deny,
    Action.ALLOW: _allow,
    Action.KILL: _kill,
}
