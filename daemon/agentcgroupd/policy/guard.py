"""Looks at the pool, asks the engine, and applies what it decides.

How often it looks depends on how soon the pool could be full: at the fastest growth that is assumed
possible, several looks fall into the time that the reserve lasts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls import Calls
from agentcgroupd.cgroup import knobs
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import BpfError, KnobError
from agentcgroupd.policy.engine import Action, CallView, Decision, Snapshot, decide
from agentcgroupd.policy.tripwire import Tripwire
from agentcgroupd.pool import Pool
from agentcgroupd.session import boottime_usec

log = logging.getLogger(__name__)

BURST_BYTES_PER_S = 2 << 30
"""Recorded agents' tool calls grew by up to 1.7 GB/s (arXiv 2602.09345)."""
CALM_INTERVAL_S = 0.25
IDLE_INTERVAL_S = 1.0
COOLDOWN_USEC = 250_000


class Guard:
    """Keeps the pool below its limit. `start` and `stop` on a running loop."""

    def __init__(self, config: GuardConfig, pool: Pool, calls: Calls, can_deny: bool) -> None:
        """`pool.memory_max_bytes` must be known. `can_deny`: growth can be denied here."""
        assert pool.memory_max_bytes is not None
        self._config = config
        self._pool = pool
        self._calls = calls
        self._actions = calls.actions
        self._can_deny = can_deny
        self._limit = pool.memory_max_bytes
        self._reserve = int(self._limit * config.margin_percent / 100)
        self._resume = int(self._limit * config.resume_percent / 100)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._before: dict[str, tuple[int, int]] = {}
        """(time in usec, bytes) at the last look, by call; the pool's own under an empty id."""
        self._growth: dict[str, float] = {}
        self._thawed_usec = 0
        self._tripwire: Tripwire | None = None
        self.applied = 0
        """Decisions that were applied so far."""

    def start(self, tripwire: Tripwire | None) -> None:
        """Begin to look. `tripwire`: what says that the mark is passed, if no program does."""
        self._tripwire = tripwire
        if tripwire is not None:
            tripwire.start(self.look_now)
        self._timer = self._loop.call_soon(self._tick)  # type: ignore[assignment]

    def stop(self) -> None:
        """No more looks."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._tripwire is not None:
            self._tripwire.stop()

    @property
    def mark_bytes(self) -> tuple[int, int]:
        """Use of the pool at which to look at once, and below which that is over."""
        return self._limit - self._reserve, self._limit - self._resume

    def look_now(self) -> None:
        """Something says that the pool is short; the timer goes on from here."""
        if self._timer is not None:
            self._timer.cancel()
            self._tick()

    def still_short(self) -> bool:
        """Whether less of the pool is free than frozen calls wait for. Raises KnobError."""
        usage = self._pool.cgroup.read(knobs.MEMORY_CURRENT)
        return self._limit - usage <= self._resume

    def _tick(self) -> None:
        started = self._loop.time()
        interval = IDLE_INTERVAL_S
        try:
            interval = self._look()
        except KnobError as error:
            log.error("the pool cannot be read: %s", error)
        finally:
            # On a slow machine looking must not become the main work.
            cost = self._loop.time() - started
            self._timer = self._loop.call_later(max(interval, cost * 4), self._tick)

    def _look(self) -> float:
        """One look; returns seconds until the next."""
        if not self._calls.open:
            self._before.clear()
            self._growth.clear()
            return CALM_INTERVAL_S
        usage = self._pool.cgroup.read(knobs.MEMORY_CURRENT)
        if self._tripwire is not None:
            self._tripwire.arm_below(usage)
        pool_growth = self._rate("", usage)
        free = self._limit - usage
        frozen = any(c.denied_at_bytes is not None or c.frozen_since_usec is not None
                     for c in self._calls.open.values())  # fmt: skip
        to_reserve_s = (free - self._reserve) / BURST_BYTES_PER_S
        # The engine keeps at most half of the pool free for a growing leader.
        if not frozen and free > self._limit // 2 + self._reserve:
            return min(CALM_INTERVAL_S, to_reserve_s)
        for decision in decide(self._snapshot(usage, pool_growth)):
            self._apply(decision)
        return max(self._config.tick / 1e6, min(CALM_INTERVAL_S, to_reserve_s / 2))

    def _rate(self, key: str, value: int, since_usec: int | None = None) -> float:
        """Bytes per second since the last look, or since `since_usec` at the first, falling off
        over a few looks after growth ends."""
        now = boottime_usec()
        first = (now, value) if since_usec is None else (since_usec, 0)
        then, before = self._before.get(key, first)
        self._before[key] = (now, value)
        fresh = (value - before) * 1e6 / (now - then) if now > then else 0.0
        self._growth[key] = max(fresh, self._growth.get(key, 0.0) * 0.7)
        return self._growth[key]

    def _snapshot(self, usage: int, pool_growth: float) -> Snapshot:
        now, views = boottime_usec(), []
        for call in self._calls.open.values():
            if call.state == pb.CALL_STATE_ENDING:
                continue
            try:
                memory = call.cgroup.read(knobs.MEMORY_CURRENT)
                cpu = call.cgroup.read(knobs.CPU_STAT)["usage_usec"]
            except KnobError:
                continue  # it has just ended
            since, at = call.frozen_since_usec, call.denied_at_bytes
            views.append(CallView(
                id=call.id, name=call.name, priority=call.grant.priority,
                began_usec=call.began_boot_usec, memory_bytes=memory,
                growth_bytes_per_s=self._rate(call.id, memory, call.began_boot_usec), cpu_usec=cpu,
                frozen_for_usec=None if since is None else now - since,
                on_pressure=call.grant.on_pressure,
                memory_expected_bytes=call.grant.memory_expected_bytes,
                memory_max_bytes=call.grant.memory_max_bytes,
                denied_growth_bytes=None if at is None else memory - at,
            ))  # fmt: skip
        for gone in self._before.keys() - {v.id for v in views} - {""}:
            del self._before[gone], self._growth[gone]
        return Snapshot(
            limit_bytes=self._limit, usage_bytes=usage, growth_bytes_per_s=pool_growth,
            reserve_bytes=self._reserve, resume_bytes=self._resume,
            lease_usec=self._config.lease, since_thaw_usec=now - self._thawed_usec,
            cooldown_usec=COOLDOWN_USEC, calls=tuple(views), can_deny=self._can_deny,
        )  # fmt: skip

    def _apply(self, decision: Decision) -> None:
        call = self._calls.open.get(decision.call_id)
        if call is None:
            return
        actions: dict[Action, Callable[[], None]] = {
            Action.DENY: lambda: self._actions.deny(call, decision.why),
            Action.ALLOW: lambda: self._actions.allow(call, decision.why),
            Action.FREEZE: lambda: self._actions.freeze(call, decision.why),
            Action.THAW: lambda: self._actions.thaw(call, decision.why),
            Action.KILL: lambda: self._actions.stop(call, decision.why),
        }
        try:
            actions[decision.action]()
        except (KnobError, BpfError) as error:
            log.warning("%s of call %s failed: %s", decision.action.value, call.id, error)
            return
        self.applied += 1
        if decision.action is Action.THAW:
            self._thawed_usec = boottime_usec()
