"""Makes snapshots of what the pool, its sessions and its calls use, and how fast that grows.

A sample reads a few small files for each open call, so sampling often costs something: the guard
does so as often as the pool's state demands (guard/loop.py).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import BpfError, KnobError
from agentcgroupd.policy.growth import Growth
from agentcgroupd.policy.headroom import GROWING_BYTES_PER_S
from agentcgroupd.policy.snapshot import CallView, Host, SessionView, Snapshot
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import Call, Session, boottime_usec

log = logging.getLogger(__name__)

CACHE_MATTERS_SHARE = 0.3
"""Share of the pool: while more than this is free, nobody asks how much of its use is file
cache."""
STALL_APART_USEC = 50_000
"""The share of time stalled is taken over at least this long."""


class HostSource(Protocol):
    """Reads what the host can do, and how much of its memory the pool has in zram."""

    zram_bytes: int

    def __call__(self, now_usec: int) -> Host:
        """The host as it is now, or was a moment ago."""


class Sampler:
    """Makes snapshots of the pool."""

    def __init__(
        self,
        pool: Pool,
        calls: Calls,
        sessions: Callable[[int], tuple[SessionView, ...]],
        host: HostSource,
        peaks: Callable[[], tuple[int, ...]],
        adopted: Callable[[], Iterable[Session]],
    ) -> None:
        """`sessions` and `host` are asked with the time of the snapshot in usec (CLOCK_BOOTTIME);
        `peaks`: what ended calls took at most; `adopted`: the adopted sessions."""
        assert pool.memory_max_bytes is not None
        self._pool = pool
        self._calls = calls
        self._sessions = sessions
        self._host = host
        self._peaks = peaks
        self._adopted = adopted
        self._growth = Growth()
        self._stall: tuple[int, int] | None = None
        self._stalled_share = 0.0
        self.limit_bytes = pool.memory_max_bytes
        self.credit_bytes: Callable[[], int | None] = lambda: None
        """What all calls may take without asking; None: they have no credit."""

    def usage(self) -> int:
        """Bytes that the pool uses, file cache and what zram holds of it included. Adopted sessions
        lie beside the pool's cgroup, but share its budget. Raises KnobError."""
        used = self._pool.cgroup.read(knobs.MEMORY_CURRENT) + self._host.zram_bytes
        for session in self._adopted():
            try:
                used += session.cgroup.read_if(knobs.MEMORY_CURRENT) or 0
            except KnobError:
                continue  # its runtime has just removed it
        return used

    def free_bytes(self, matters_share: float) -> int:
        """Bytes that are free of the pool; while that is less than `matters_share` of it, cold file
        cache counts as free. Raises KnobError."""
        free = self.limit_bytes - self.usage()
        if free < self.limit_bytes * matters_share:
            free += _cold_cache(self._pool.cgroup)
        return free

    def snapshot(self) -> Snapshot:
        """What the policy sees now. Raises KnobError when the pool cannot be read."""
        return self.sample(self.usage())

    def sample(self, usage: int) -> Snapshot:
        """What the policy sees now, with `usage` as it was just read. Raises KnobError when the
        pool cannot be read."""
        now = boottime_usec()
        cache = 0
        tight = self.limit_bytes - usage < self.limit_bytes * CACHE_MATTERS_SHARE
        if tight:
            cache = _cold_cache(self._pool.cgroup)
        seen = (self._call(call, now, tight) for call in list(self._calls.open.values()))
        calls = tuple(view for view in seen if view is not None)
        # With and without the cache are two series: from one to the other is no growth.
        key = "pool" if tight else "pool and cache"
        growth = self._growth.of(key, now, usage - cache)
        self._growth.keep({key, *(c.id for c in calls), *(f"{c.id}/" for c in calls)})
        return Snapshot(
            now_usec=now,
            limit_bytes=self.limit_bytes,
            usage_bytes=usage - cache,
            growth_bytes_per_s=growth,
            calls=calls,
            sessions=self._sessions(now),
            host=self._host(now),
            stalled_share=self._stalled(now),
            credit_bytes=self.credit_bytes(),
            cache_bytes=cache,
            peaks_bytes=self._peaks(),
        )

    def _call(self, call: Call, now: int, tight: bool) -> CallView | None:
        # What a call inside another one uses is in the outer one's use, and is acted on with it.
        if call.state == pb.CALL_STATE_ENDING or call.parent is not None:
            return None
        try:
            memory = call.cgroup.read(knobs.MEMORY_CURRENT)
            cpu = call.cgroup.read(knobs.CPU_STAT)["usage_usec"]
            growth = self._growth.of(call.id, now, memory, call.began_boot_usec)
            if tight and growth > GROWING_BYTES_PER_S:
                # It may be reading or writing files, which costs nobody anything.
                held = memory - _cold_cache(call.cgroup)
                of_held = self._growth.of(f"{call.id}/", now, held, call.began_boot_usec)
                growth = min(growth, of_held)
        except KnobError:
            return None  # it has just ended
        if growth > GROWING_BYTES_PER_S:
            call.grew_usec = now
        grant, since = call.grant, call.frozen_since_usec
        expected = call.likely_bytes or grant.memory_expected_bytes
        paused = None if since is None else now - since
        return CallView(
            id=call.id,
            name=call.name,
            session_id=call.session.id,
            priority=grant.priority,
            began_usec=call.began_boot_usec,
            memory_bytes=memory,
            growth_bytes_per_s=growth,
            cpu_usec=cpu,
            grew_usec=call.grew_usec,
            frozen_for_usec=paused,
            asks=call.asks,
            starved=call.starved,
            awaits_credit=call.awaits_credit,
            stopped=paused is None or call.stopped,
            paused_usec=call.frozen_usec + (paused or 0),
            paused_ago_usec=_ago(now, call.paused_at_usec),
            resumed_ago_usec=_ago(now, call.resumed_at_usec),
            on_pressure=grant.on_pressure,
            expected_bytes=expected if call.keeps_room else min(expected, memory),
            is_unused=not call.entered,
            memory_max_bytes=grant.memory_max_bytes,
            denied_growth_bytes=_since(memory, call.denied_at_bytes),
            refused_requests=self._refused(call),
            throttled_growth_bytes=_since(memory, call.throttled_at_bytes),
        )

    def _refused(self, call: Call) -> int:
        if call.denied_at_bytes is None:
            return 0
        try:
            return self._calls.actions.refused(call) - call.refused_before
        except BpfError as error:
            log.debug("call %s: %s", call.id, error)
            return 0

    def _stalled(self, now: int) -> float | None:
        """The share of the time in which some task of the pool stalled on memory, since the last
        sample that was long enough ago to say something; None where this kernel does not measure it
        (CONFIG_PSI, psi=0, cgroup.pressure)."""
        try:
            pressure = self._pool.cgroup.read_if(knobs.MEMORY_PRESSURE)
        except KnobError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return None
        if pressure is None:
            return None
        total = pressure["some"].total_usec
        if self._stall is None:
            self._stall = now, total
            return 0.0
        then, before = self._stall
        if now - then >= STALL_APART_USEC:
            self._stalled_share = min(1.0, max(0, total - before) / (now - then))
            self._stall = now, total
        return self._stalled_share


def _ago(now: int, at: int | None) -> int | None:
    return None if at is None else max(0, now - at)


def _since(memory: int, at: int | None) -> int | None:
    return None if at is None else memory - at


def _cold_cache(cgroup: Cgroup) -> int:
    return cgroup.read(knobs.MEMORY_STAT).get("inactive_file", 0)
