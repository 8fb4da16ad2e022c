"""The simulator's guard: looks when the real one would, sees what it would see, asks the engine.

Growth is estimated from two looks, and what a look costs the real guard sets how often it can look.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from agentcgroup_lab.simulate.types import Call, Lane
from agentcgroup_lab.simulate.world import World
from agentcgroupd.policy.engine import attention_bytes, claim_bytes, decide, marks
from agentcgroupd.policy.headroom import GROWING_BYTES_PER_S
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


@dataclass(frozen=True, slots=True)
class Looks:
    """How the guard looks; the numbers are `policy.guard`'s."""

    tick_s: float = 0.02
    calm_s: float = 0.25
    sessions_s: float = 0.25
    """Sessions are read no more often than this."""
    burst_bytes_per_s: float = float(2 << 30)
    cores: int = 8
    cost_s_per_call: float = 30e-6
    """Two interface files read through Python, 15 us each."""
    busy_share: float = 0.25
    """Looking may take this much of the time."""
    decay: float = 0.7
    """What is left of an estimate of growth at the next look, where nothing grew."""
    signals: bool = True
    """The kernel tells when use passes the mark, and when a call ends."""
    peaks_kept: int = 1000
    quiet_pct: float = 5.0
    """An agent that burns less of a core waits (policy.sessions_view)."""
    quiet_in_calls: bool = False
    """An agent whose call runs counts as waiting, too."""


class Guard:
    """Keeps a World's pool by a policy."""

    def __init__(self, world: World, policy: Policy, looks: Looks, can_deny: bool) -> None:
        self._world, self._policy, self._looks = world, policy, looks
        self._can_deny = can_deny
        limit = int(world.limit)
        self._mark, self._resume = marks(policy, limit)
        self._claim = claim_bytes(policy, limit)
        self._attention = attention_bytes(policy, limit)
        self._state = State()
        self._version = 0
        self._growth = self._seen = self._seen_s = 0.0
        self._peaks: list[int] = []
        self._peaks_order: list[int] = []
        self._peaks_seen: tuple[int, ...] = ()
        self._views: list[SessionView] = []
        self._views_s = -1.0
        self._held_up = 0
        """Calls that are paused, denied or throttled."""
        self._lanes = {lane.id: index for index, lane in enumerate(world.lanes)}
        self._calls: dict[str, Call] = {}
        self.looks = 0
        self._next_s = 0.0
        self._least_s = 0.0
        world.quiet_pct = looks.quiet_pct
        if looks.signals:
            world.mark = float(self._mark)
            world.mark_passed = self._mark_passed
            world.call_ended = self._call_ended
            world.call_began = self._call_began
        world.at(0.0, self._tick, None, 0)

    def _mark_passed(self) -> None:
        self._world.mark = None  # until it is over
        self._look(Signal(SignalKind.MARK))

    def _call_ended(self) -> None:
        if self._held_up and self._world.now - self._seen_s >= self._looks.tick_s:
            self._version += 1
            self._world.at(self._world.now, self._ended, None, self._version)

    def _call_began(self) -> None:
        """The next look may have been put off while there was nobody to look at."""
        soon_s = self._world.now + max(self._least_s, self._open_s())
        if self._next_s > soon_s:
            self._version += 1
            self._next_s = soon_s
            self._world.at(self._next_s, self._tick, None, self._version)

    def _open_s(self) -> float:
        """Until the next look, while calls are open."""
        looks = self._looks
        calls = max(1, min(len(self._world.calls), looks.cores))
        until_s = (self._mark - self._claim - self._seen) / (looks.burst_bytes_per_s * calls)
        return max(looks.tick_s, min(looks.calm_s, until_s / 2))

    def _ended(self, _: object, version: int) -> None:
        if version == self._version:
            self._look(Signal(SignalKind.ENDED))

    def _tick(self, _: object, version: int) -> None:
        if version == self._version:
            self._look(TICK)

    def _look(self, signal: Signal) -> None:
        world, looks = self._world, self._looks
        self._learn()
        usage = world.usage
        if looks.signals and world.mark is None and usage < self._resume:
            world.mark = float(self._mark)
        self._growth = self._rate(self._growth, usage - self._seen, world.now - self._seen_s)
        self._seen, self._seen_s = usage, world.now
        calm = not self._held_up and world.limit - usage > self._attention
        if not calm and world.calls:
            self.looks += 1
            outcome = decide(self._policy, self._snapshot(), signal, self._state)
            self._state = outcome.state
            for decision in outcome.decisions:
                self._apply(decision)
        cost_s = len(world.calls) * looks.cost_s_per_call
        self._least_s = cost_s / looks.busy_share
        wait_s = max(self._open_s() if world.calls else looks.calm_s, self._least_s)
        self._version += 1
        self._next_s = world.now + wait_s
        world.at(self._next_s, self._tick, None, self._version)

    def _rate(self, before: float, change: float, passed_s: float) -> float:
        fresh = change / passed_s if passed_s > 0.0 else 0.0
        return max(fresh, before * self._looks.decay)

    def _learn(self) -> None:
        peaks = self._world.peaks
        if not peaks:
            return
        for peak in peaks:
            bisect.insort(self._peaks, int(peak))
            self._peaks_order.append(int(peak))
        peaks.clear()
        over = len(self._peaks_order) - self._looks.peaks_kept
        for old in self._peaks_order[: max(0, over)]:
            del self._peaks[bisect.bisect_left(self._peaks, old)]
        del self._peaks_order[: max(0, over)]
        self._peaks_seen = tuple(self._peaks)

    def _snapshot(self) -> Snapshot:
        world = self._world
        now = world.now
        self._calls = {call.id: call for call in world.calls}
        self._held_up = 0
        views = [call.view or self._view(call, now) for call in world.calls]
        zram = world.kernel.zram_ratio is not None
        if zram and now - self._views_s >= self._looks.sessions_s:
            self._views = [self._session_view(lane, now) for lane in world.lanes]
            self._views_s = now
        return Snapshot(
            now_usec=int(now * 1e6), limit_bytes=int(world.limit), usage_bytes=int(world.usage),
            growth_bytes_per_s=self._growth, calls=tuple(views), sessions=tuple(self._views),
            host=Host(can_deny=self._can_deny, can_reclaim=True,
                      swap_free_bytes=max(0, int(world.swap_free)), swap_is_zram=zram),
            peaks_bytes=self._peaks_seen,
        )  # fmt: skip

    def _view(self, call: Call, now: float) -> CallView:
        self._world.sync(call)
        resident = call.resident_bytes
        call.growth = self._rate(call.growth, resident - call.seen_bytes, now - call.seen_s)
        if call.growth < 1.0:
            call.growth = 0.0
        if call.growth > GROWING_BYTES_PER_S:
            call.grew_s = now
        call.seen_bytes, call.seen_s = resident, now
        frozen, denied, throttled = call.frozen_at_s, call.denied_bytes, call.throttled_bytes
        view = CallView(
            id=call.id, name=call.shape.name, session_id=call.lane.id, priority=call.lane.priority,
            began_usec=int(call.began_s * 1e6), memory_bytes=int(resident),
            growth_bytes_per_s=call.growth, cpu_usec=int(call.cpu_s * 1e6),
            grew_usec=int(call.grew_s * 1e6),
            frozen_for_usec=None if frozen is None else int((now - frozen) * 1e6),
            paused_usec=int((call.paused_s + (0.0 if frozen is None else now - frozen)) * 1e6),
            denied_growth_bytes=None if denied is None else int(resident - denied),
            throttled_growth_bytes=None if throttled is None else int(resident - throttled),
        )  # fmt: skip
        held_up = frozen is not None or denied is not None or throttled is not None
        self._held_up += held_up
        if not held_up and call.growth == 0.0 and call.segment.rate == 0.0:
            call.view = view  # it stays so until its next segment
        return view

    def _session_view(self, lane: Lane, now: float) -> SessionView:
        waiting = 0.0
        if lane.state == "runs" and (self._looks.quiet_in_calls or not lane.calls):
            if lane.agent_pct < self._looks.quiet_pct:
                waiting = max(0.0, now - lane.active_s)
        refaults = lane.refault_bytes / 4096 if now - lane.refault_s < 1.0 else 0.0
        reclaimed = lane.reclaimed_s
        agent = int(lane.agent_resident)
        return SessionView(
            id=lane.id, priority=lane.priority, memory_bytes=agent, agent_bytes=agent,
            waiting_usec=int(waiting * 1e6), refaults_per_s=refaults, slowed=lane.slowed,
            reclaimed_usec=None if reclaimed is None else int((now - reclaimed) * 1e6),
        )  # fmt: skip

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
        self._held_up += 1
        _APPLY[action](world, call)

    def _reclaim(self, decision: Decision) -> None:
        world = self._world
        if not decision.subject:
            return  # file cache is not simulated
        lane = world.lanes[self._lanes[decision.subject]]
        lane.reclaimed_s = world.now
        if decision.calls:
            for name in decision.calls:
                call = self._calls.get(name)
                if call is not None and call in world.calls:
                    freed = world.reclaim_call(call, decision.amount)
        else:
            freed = world.reclaim_agent(lane, decision.amount)
            world.counts["reclaimed_bytes"] += int(freed)
        index = self._lanes[decision.subject]
        if self._views:
            self._views[index] = self._session_view(lane, world.now)


def _freeze(world: World, call: Call) -> None:
    if call.frozen_at_s is None:
        call.frozen_at_s = world.now
        world.set_pace(call)


def _thaw(world: World, call: Call) -> None:
    if call.frozen_at_s is not None:
        world.go_on(call)


def _throttle(world: World, call: Call) -> None:
    if call.throttled_bytes is None:
        call.throttled_bytes = call.resident_bytes
        world.set_pace(call)


def _unthrottle(world: World, call: Call) -> None:
    if call.throttled_bytes is not None:
        call.throttled_bytes = None
        world.set_pace(call)


def _deny(world: World, call: Call) -> None:
    if call.denied_bytes is None:
        call.denied_bytes = call.resident_bytes
        if call.segment.rate > 0.0 and call.speed > 0.0:
            world.end_call(call, "denied")


def _allow(world: World, call: Call) -> None:
    del world
    call.denied_bytes = None


def _kill(world: World, call: Call) -> None:
    world.end_call(call, "killed")


_APPLY: dict[Action, Callable[[World, Call], None]] = {
    Action.FREEZE: _freeze,
    Action.THAW: _thaw,
    Action.THROTTLE: _throttle,
    Action.UNTHROTTLE: _unthrottle,
    Action.DENY: _deny,
    Action.ALLOW: _allow,
    Action.KILL: _kill,
}
