"""Makes snapshots of what the pool, its sessions and its calls use, and how fast that grows.

There may be 10,000 open calls, of which most do nothing. A sample therefore judges anew only those
that are active: they have moved, grew lately, or something was done to them. What a sample shows of
the others is what was seen of them before; each has its turn at being judged anew.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.cgroup import knobs
from agentcgroupd.enforce.reclaimer import CacheHolder
from agentcgroupd.errors import BpfError, KnobError
from agentcgroupd.guard.adopted_caches import FRESH_USEC, AdoptedCaches
from agentcgroupd.guard.io_sampler import IoSampler
from agentcgroupd.guard.look import CallLook, FileCache, FileLook, Seen, file_cache, read_cold
from agentcgroupd.policy.choose import kill_least_bytes
from agentcgroupd.policy.growth import Growth
from agentcgroupd.policy.headroom import GROWING_BYTES_PER_S, rank
from agentcgroupd.policy.snapshot import CallView, Host, SessionView, Snapshot
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import Call, Session, boottime_usec

log = logging.getLogger(__name__)

CACHE_MATTERS_SHARE = 0.3
"""Share of the pool: while more than this is free, nobody asks how much of its use is file
cache."""
STALL_APART_USEC = 50_000
"""The share of time stalled is taken over at least this long."""
CPU_ASKED = 64
"""Calls that are asked for their CPU time when one may have to be ended."""
IN_TURN = 50
"""Calls that do nothing are judged anew so many at a time."""
CACHES_CHANGE = 0.05
"""Share of the adopted sessions whose file cache may come to be known, or be known no more, from
one sample to the next; more than that would show as growth."""
STEADY_USEC = 10_000_000
"""A call is active for so long after it grew, unless the policy says otherwise."""


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
        look: CallLook | None = None,
    ) -> None:
        """`sessions` and `host` are asked with the time of the snapshot in usec (CLOCK_BOOTTIME);
        `peaks`: what ended calls took at most; `adopted`: the adopted sessions; `look`: how to find
        out what calls hold, None: by their files."""
        assert pool.memory_max_bytes is not None
        self._pool = pool
        self._calls = calls
        self._sessions = sessions
        self._host = host
        self._peaks = peaks
        self._adopted = adopted
        self._look: CallLook = FileLook() if look is None else look
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        """All calls by id, the one whose turn is next first."""
        self._active: dict[str, Seen] = {}
        self._views: dict[str, CallView] = {}
        self._first: CallView | None = None
        """The most important of `_views`; None: not known."""
        self._growth = Growth()
        self._caches = AdoptedCaches(adopted)
        self._caches_known = 0
        self._pools_cold_bytes = 0
        self._stall: tuple[int, int] | None = None
        self._stalled_share = 0.0
        self.limit_bytes = pool.memory_max_bytes
        self.disks: IoSampler | None = None
        """Waits for disks, and their users; None: nobody looks."""
        self.credit_bytes: Callable[[], int | None] = lambda: None
        """What all calls may take without asking; None: they have no credit."""
        self.steady_usec: Callable[[], int] = lambda: STEADY_USEC
        """For how long a call that grew counts as one that wants more."""
        self.cpu_below_bytes: Callable[[], int] = lambda: self.limit_bytes
        """Free bytes below which CPU time matters, because a call may be ended."""

    # Calls

    def call_opened(self, call: Call) -> None:
        """Look at a call from now on."""
        if call.id in self._seen or call.parent is not None:
            # What a call inside another one uses is in the outer one's use, and is acted on with
            # it.
            return
        seen = Seen(call)
        self._look.opened(seen)
        self._seen[call.id] = self._active[call.id] = seen

    def call_closed(self, call: Call) -> None:
        """Forget a call."""
        seen = self._seen.pop(call.id, None)
        if seen is not None:
            self._look.closed(seen)
            self._drop_view(seen)
            self._active.pop(call.id, None)

    def touch(self, call: Call) -> None:
        """Judge a call anew at the next sample: something was done to it."""
        seen = self._seen.get(call.id)
        if seen is not None:
            self._active[call.id] = seen

    def active(self) -> list[Call]:
        """The calls that may grow or are held back."""
        return [seen.call for seen in self._active.values()]

    def _follow(self) -> None:
        """Take up calls that nobody told of, and drop those that are gone."""
        opened = self._calls.open
        if len(opened) == len(self._seen):
            return
        for id in self._seen.keys() - opened.keys():
            self.call_closed(self._seen[id].call)
        for call in list(opened.values()):
            self.call_opened(call)

    def _next_in_turn(self) -> list[Seen]:
        found = list(itertools.islice(self._seen.values(), IN_TURN))
        for seen in found:
            self._seen.move_to_end(seen.call.id)
        return found

    # Samples

    def usage(self) -> int:
        """Bytes that the pool uses, file cache and what zram holds of it included. Adopted sessions
        lie beside the pool's cgroup, but share its budget. Raises KnobError."""
        self._host(boottime_usec())  # what zram holds is known, and the pool's limit follows it
        used = self._pool.cgroup.read(knobs.MEMORY_CURRENT) + self._host.zram_bytes
        for session in self._adopted():
            try:
                used += session.cgroup.read_if(knobs.MEMORY_CURRENT) or 0
            except KnobError:
                continue  # its runtime has just removed it
        return used

    def free_bytes(self, matters_share: float) -> int:
        """Bytes that are free of the pool; while that is less than `matters_share` of it, file
        cache that the kernel can take back counts as free. Raises KnobError."""
        free = self.limit_bytes - self.usage()
        if free < self.limit_bytes * matters_share:
            free += self._cache(boottime_usec()).freeable_bytes(self.limit_bytes)
        return free

    def _cache(self, now: int) -> FileCache:
        """File cache of the pool and of adopted sessions. Raises KnobError."""
        own, beside = file_cache(self._pool.cgroup), self._caches.look(now)
        self._pools_cold_bytes = own.cold_bytes
        return FileCache(own.cold_bytes + beside.cold_bytes, own.clean_bytes + beside.clean_bytes)

    def cache_holders(self) -> list[CacheHolder]:
        """List the cgroups that had cold file cache at the last sample, the most of it first."""
        found = [CacheHolder(self._pool.cgroup, self._pools_cold_bytes)]
        for session, cold_bytes in self._caches.cold(boottime_usec()):
            found.append(CacheHolder(session.cgroup, cold_bytes, session))
        return sorted(found, key=lambda holder: holder.cold_bytes, reverse=True)

    def snapshot(self) -> Snapshot:
        """What the policy sees now, with the CPU time of all calls. Raises KnobError when the pool
        cannot be read."""
        now = self.sample(self.usage())
        return replace(now, calls=self._with_cpu(now.calls, now.calls))

    def sample(self, usage: int) -> Snapshot:
        """What the policy sees now, with `usage` as it was just read. Raises KnobError when the
        pool cannot be read."""
        now = boottime_usec()
        cache = FileCache(0, 0)
        tight = self.limit_bytes - usage < self.limit_bytes * CACHE_MATTERS_SHARE
        if tight:
            cache = self._cache(now)
        used = usage - cache.freeable_bytes(self.limit_bytes)
        active = self._judge_calls(now, tight)
        calls = tuple(self._views.values())
        if self.limit_bytes - used < self.cpu_below_bytes():
            calls = self._with_cpu(calls, self._may_be_ended(calls))
        # With and without the cache are two series: from one to the other is no growth.
        key, other = ("pool", "pool and cache") if tight else ("pool and cache", "pool")
        known, before = self._caches.known, self._caches_known
        self._caches_known = known
        if tight and abs(known - before) > CACHES_CHANGE * known:
            self._growth.forget(key)
        growth = self._growth.of(key, now, used)
        self._growth.forget(other)
        sessions = self._sessions(now)
        return Snapshot(
            now_usec=now,
            limit_bytes=self.limit_bytes,
            usage_bytes=used,
            growth_bytes_per_s=growth,
            calls=calls,
            sessions=self._with_disks(sessions),
            io_stalled_share=0.0 if self.disks is None else self.disks.pool_share,
            io_calls=() if self.disks is None else self.disks.calls,
            host=self._host(now),
            stalled_share=self._stalled(now, sessions),
            credit_bytes=self.credit_bytes(),
            cache_bytes=cache.cold_bytes,
            peaks_bytes=self._peaks(),
            active=active,
            first=self._first,
        )

    def _with_disks(self, sessions: tuple[SessionView, ...]) -> tuple[SessionView, ...]:
        """Add for what part of the time important sessions wait for disks, where any does."""
        disks = self.disks
        if disks is None or not disks.pool_share:
            return sessions
        return tuple(
            replace(view, io_stalled_share=share) if (share := disks.share_of(view.id)) else view
            for view in sessions
        )

    def _judge_calls(self, now: int, tight: bool) -> tuple[CallView, ...]:
        """Look at all calls, and judge those anew that are active or whose turn it is. Returns
        those that are active now."""
        self._follow()
        wanted = {seen.call.id: seen for seen in self._next_in_turn()}
        wanted.update(self._active)
        for seen in self._look.look(now, wanted.values()):
            wanted[seen.call.id] = seen
        growth = {id: self._growth_of(seen) for id, seen in wanted.items()}
        growing = [seen for id, seen in wanted.items() if growth[id] > GROWING_BYTES_PER_S]
        if tight:
            # They may be reading or writing files, which costs nobody anything.
            read_cold(growing, now)
            for seen in growing:
                id = seen.call.id
                growth[id] = min(growth[id], self._growth_held(seen, growth[id]))
        steady_since = now - self.steady_usec()
        for id, seen in wanted.items():
            self._judge(seen, now, growth[id])
            if seen.view is not None and _is_active(seen, steady_since):
                self._active[id] = seen
            elif self._active.pop(id, None) is not None:
                self._growth.forget(f"{id}/")
        if self._first is None:
            self._first = min(self._views.values(), key=rank, default=None)
        return tuple(seen.view for seen in self._active.values() if seen.view is not None)

    def _judge(self, seen: Seen, now: int, growth: float) -> None:
        """Make the view of a call, or drop it where the policy is not to see it any more."""
        call = seen.call
        if call.state == pb.CALL_STATE_ENDING or seen.gone or seen.at_usec is None:
            self._drop_view(seen)
            return
        if growth > GROWING_BYTES_PER_S:
            call.grew_usec = now
        before, seen.view = seen.view, self._view(seen, growth, now)
        self._views[call.id] = seen.view
        first = self._first
        if before is not None and before is first:
            self._first = seen.view if rank(seen.view) <= rank(before) else None
        elif first is not None and rank(seen.view) < rank(first):
            self._first = seen.view

    def _growth_of(self, seen: Seen) -> float:
        """Bytes a second that a call grows by, with its file cache."""
        call = seen.call
        if seen.at_usec is None or seen.gone:
            return 0.0
        if seen.view is not None and call.id not in self._active:
            # It was not followed: what it held at the look before is known all the same.
            self._growth.restart(call.id, seen.before_usec, seen.before_bytes)
        return self._growth.of(call.id, seen.at_usec, seen.memory_bytes, call.began_boot_usec)

    def _growth_held(self, seen: Seen, with_cache: float) -> float:
        """Bytes a second that a call grows by without the file cache that nobody touches."""
        if seen.cold_usec is None or seen.at_usec is None:
            return with_cache
        key, held = f"{seen.call.id}/", seen.memory_bytes - seen.cold_bytes
        return self._growth.of(key, seen.at_usec, held, seen.call.began_boot_usec)

    def _drop_view(self, seen: Seen) -> None:
        id = seen.call.id
        if seen.view is not None and seen.view is self._first:
            self._first = None
        seen.view = None
        self._views.pop(id, None)
        for key in (id, f"{id}/"):
            self._growth.forget(key)

    def _may_be_ended(self, calls: Iterable[CallView]) -> list[CallView]:
        """The largest calls of each of the least important priorities, as far as there is time to
        ask for their CPU time."""
        least = kill_least_bytes(self.limit_bytes)
        large = (view for view in calls if view.memory_bytes >= least)
        return heapq.nsmallest(CPU_ASKED, large, key=lambda c: (c.priority, -c.memory_bytes))

    def _with_cpu(
        self, calls: tuple[CallView, ...], chosen: Iterable[CallView]
    ) -> tuple[CallView, ...]:
        """Add the CPU time so far of the calls that are chosen."""
        known = {view.id: replace(view, cpu_usec=self._cpu_usec(view)) for view in chosen}
        return tuple(known.get(view.id, view) for view in calls) if known else calls

    def _cpu_usec(self, view: CallView) -> int | None:
        try:
            return self._seen[view.id].call.cgroup.read(knobs.CPU_STAT)["usage_usec"]
        except KnobError:
            return None  # it has just ended

    def _view(self, seen: Seen, growth: float, now: int) -> CallView:
        call, memory = seen.call, seen.memory_bytes
        grant, since = call.grant, call.frozen_since_usec
        expected = call.likely_bytes or grant.memory_expected_bytes
        paused = None if since is None else now - since
        return CallView(
            id=call.id,
            name=call.name,
            session_id=call.session.id,
            priority=call.priority,
            began_usec=call.began_boot_usec,
            memory_bytes=memory,
            growth_bytes_per_s=growth,
            cpu_usec=None,
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
            throttled_by_cpu=call.throttled_by_cpu,
        )

    def _refused(self, call: Call) -> int:
        if call.denied_at_bytes is None:
            return 0
        try:
            return self._calls.actions.refused(call) - call.refused_before
        except BpfError as error:
            log.debug("call %s: %s", call.id, error)
            return 0

    def _stalled(self, now: int, sessions: Iterable[SessionView]) -> float | None:
        """The share of the time in which some task of the pool, or of the adopted session that
        stalls most, stalled on memory, since the last sample that was long enough ago to say
        something; None where this kernel does not measure it (CONFIG_PSI, psi=0, cgroup.pressure).
        """
        share = self._stalled_in_pool(now)
        if share is None:
            return None
        adopted = {session.id for session in self._adopted()}
        if not adopted:
            return share
        fresh = (v for v in sessions if now - v.sampled_usec <= FRESH_USEC)
        return max(share, *(view.stalled_share for view in fresh if view.id in adopted), 0.0)

    def _stalled_in_pool(self, now: int) -> float | None:
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


def _is_active(seen: Seen, steady_since: int) -> bool:
    """Tell whether a call may grow or is held back."""
    call = seen.call
    return (
        call.grew_usec > steady_since
        or call.frozen_since_usec is not None
        or call.denied_at_bytes is not None
        or call.throttled_at_bytes is not None
        or call.asks
        or call.starved
        or call.awaits_credit
    )
