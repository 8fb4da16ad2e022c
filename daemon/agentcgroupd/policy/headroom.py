"""What follows from a snapshot before any ruleset is asked: who leads, what room it needs.

The leader is the call that must get through: the most important, and among equals the one that
needs least to be done. It is never stopped, so that something always ends and gives its memory
back. Room is kept so that all can end in turn, because calls that grow side by side until the pool
is full could none of them end. A call that takes nothing more, such as a server, gives the lead to
its equals at once, and to less important ones when they were paused for a whole lease; else all
others would wait for its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import CallView, Snapshot

GROWING_BYTES_PER_S = 4 << 20
"""Slower growth is left alone while others grow faster."""
DENIED_SLACK_BYTES = 48 << 20
"""A call whose growth is denied may come by this much more: its allowance, and what it had asked
for before but not yet touched. Beyond it, denying was not enough."""


def growing(call: CallView) -> bool:
    """Whether it takes memory fast enough to matter."""
    return call.growth_bytes_per_s > GROWING_BYTES_PER_S


def rank(call: CallView) -> tuple[int, int, str]:
    """Order of importance: the smallest goes first."""
    return -call.priority, call.began_usec, call.id


def best(calls: Iterable[CallView]) -> CallView | None:
    """The most important, and among equals the oldest."""
    return min(calls, key=rank, default=None)


def still_needs(now: Snapshot, call: CallView, share: float, prior_bytes: int = 0) -> int:
    """Bytes that a call may still take: up to what it is expected to, or up to what `share` of the
    pool's calls that got as far as this one stayed below, whichever is more. Where too few did and
    nothing more is expected, as much again as it holds, or up to `prior_bytes`."""
    peak = now.likely_peak(call.memory_bytes, share)
    if peak is None and call.expected_bytes <= call.memory_bytes:
        wanted = max(call.memory_bytes, prior_bytes - call.memory_bytes)
    else:
        wanted = max(peak or 0, call.expected_bytes) - call.memory_bytes
    if call.memory_max_bytes is not None:
        wanted = min(wanted, call.memory_max_bytes - call.memory_bytes)
    return max(0, wanted)


@dataclass(frozen=True)
class Situation:
    """A snapshot and what follows from it under one policy."""

    policy: Policy
    now: Snapshot

    @cached_property
    def running(self) -> list[CallView]:
        """Calls that are not paused."""
        return [c for c in self.now.calls if c.frozen_for_usec is None]

    @cached_property
    def frozen(self) -> list[CallView]:
        """Paused calls, the first to go on first."""
        return sorted((c for c in self.now.calls if c.frozen_for_usec is not None), key=rank)

    @cached_property
    def leader(self) -> CallView | None:
        """The call that must get through; it may be paused still. Of those that room is kept for,
        else of those that grow or are paused, the most important, and among equals the one that
        needs least to be done."""
        first = best(self.now.calls)
        if first is None:
            return None
        rivals = self.counting or [
            c for c in self.now.calls if self.rising(c) or c.frozen_for_usec is not None
        ]
        if all(c.priority < first.priority for c in rivals):
            # Its equals that want something, small as they are, go before all that are less
            # important. Where none does, the others do not wait for its end for ever.
            lease = self.policy.headroom.lease
            rivals = [c for c in self.now.calls if c.priority == first.priority
                      and (self.rising(c) or c.frozen_for_usec is not None)
                      ] or [c for c in rivals if c.paused_usec >= lease]  # fmt: skip
        return min(rivals, key=self._turn, default=first)

    @cached_property
    def counting(self) -> list[CallView]:
        """Calls that room is kept for: they hold enough to matter, and may still grow."""
        return [c for c in self.now.calls if c.memory_bytes >= self.small_bytes
                and (c.frozen_for_usec is not None or self.rising(c))]  # fmt: skip

    @cached_property
    def heir(self) -> CallView | None:
        """Of those, the one that is to end first: it is not stopped so that room is kept."""
        return min(self.counting, key=self._turn, default=None)

    def _turn(self, call: CallView) -> tuple[int, bool, bool, int, tuple[int, int, str]]:
        """The smallest leads. Who runs goes on leading, as long as its needs are there."""
        needs = self.needs(call)
        paused = call.frozen_for_usec is not None
        return -call.priority, needs > self.now.free_bytes, paused, needs, rank(call)

    @cached_property
    def growing(self) -> list[CallView]:
        """Running calls that take memory fast enough to matter."""
        return [c for c in self.running if growing(c)]

    @cached_property
    def growth_bytes_per_s(self) -> float:
        """The pool's, or its calls' where that says more."""
        calls = sum(c.growth_bytes_per_s for c in self.running)
        return max(self.now.growth_bytes_per_s, calls)

    def needs(self, call: CallView) -> int:
        """Bytes that it may still take before it ends. No call is taken to go beyond its part of
        the pool."""
        head, limit = self.policy.headroom, self.now.limit_bytes
        wanted = still_needs(self.now, call, head.leader_share, head.prior.of(limit))
        return min(wanted, max(0, head.leader_most.of(limit) - call.memory_bytes))

    @cached_property
    def room_bytes(self) -> int:
        """Free memory with which all calls that count can still end, one after the other, the most
        important first and then whoever needs least, when each one's end gives back what it holds:
        the banker's algorithm (E. W. Dijkstra, EWD 623) with what calls may take as their claims.
        As long as so much is free, no two of them can wait for each other's memory."""
        room = given_back = 0
        for call in sorted(self.counting, key=lambda c: (-c.priority, self.needs(c))):
            room = max(room, self.needs(call) - given_back)
            given_back += call.memory_bytes
        return room

    def rising(self, call: CallView) -> bool:
        """Whether it grows, or did lately: most that grow do so in bursts."""
        steady = self.now.now_usec - call.grew_usec
        return growing(call) or (
            call.frozen_for_usec is None and steady < self.policy.headroom.steady
        )

    @cached_property
    def small_bytes(self) -> int:
        """Calls that hold less neither keep room nor have to make room; most never hold more."""
        return self.policy.headroom.small.of(self.now.limit_bytes)

    def more_important(self, call: CallView) -> str:
        """Why it is this call's turn to wait, in words."""
        leader = self.leader
        if leader is None or leader.id == call.id:
            return ""
        kind = "more important" if leader.priority > call.priority else "further on"
        return f", while {leader.name!r} is {kind}"
