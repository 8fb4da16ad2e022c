"""The leader and the reserve: what follows from a snapshot before any ruleset is asked.

The leader is the call that must get through: the most important, and among equals the one that
needs least to finish. The leader is never held back, so that some call always ends and gives its
memory back. A reserve is kept free so that all calls can end in turn: of calls that grow side by
side until the pool is full, none could end. A call that takes no more memory, such as a server,
does not lead while a call of the same priority wants more, nor while a less important one has been
paused for a whole lease. Otherwise all others would wait for its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from agentcgroupd.policy.schema import HeadroomSettings, Policy
from agentcgroupd.policy.snapshot import CallView, Snapshot

GROWING_BYTES_PER_S = 4 << 20
"""Growth that matters. Slower growth is left alone while other calls grow faster."""
DENIED_SLACK_BYTES = 48 << 20
"""Growth that is normal after growth was denied: the allowance, and memory that was asked for
before but not touched yet. Where a call grows by more, denying was not enough."""

STOPS_USEC = 50_000
"""Time that a pause takes at most where no task is inside a system call."""


def is_growing(call: CallView) -> bool:
    """Tell whether a call takes memory fast enough to matter."""
    return call.asks or call.growth_bytes_per_s > GROWING_BYTES_PER_S


def rank(call: CallView) -> tuple[int, int, str]:
    """Sort key of importance: the smallest is the most important call, among equals the oldest."""
    return -call.priority, call.began_usec, call.id


def most_important(calls: Iterable[CallView]) -> CallView | None:
    """Return the call that ranks first; None where there is no call."""
    return min(calls, key=rank, default=None)


def still_needs(now: Snapshot, call: CallView, share: float, prior_bytes: int = 0) -> int:
    """Return the bytes that a call may still take.

    A call is taken to reach what it is expected to take, or what `share` of the pool's calls that
    got as far as this one stayed below, whichever is more. Where too few calls got as far and no
    more is expected, the call is taken to need as much again as it holds, or to reach
    `prior_bytes`. No call is taken to pass its own limit.
    """
    peak = now.likely_peak(call.memory_bytes, share)
    if peak is None and call.expected_bytes <= call.memory_bytes:
        wanted = max(call.memory_bytes, prior_bytes - call.memory_bytes)
    else:
        wanted = max(peak or 0, call.expected_bytes) - call.memory_bytes
    if call.memory_max_bytes is not None:
        wanted = min(wanted, call.memory_max_bytes - call.memory_bytes)
    return max(0, wanted)


def lead_of(leader: CallView, call: CallView) -> str:
    """Say what the leader is, compared with a call that comes after it."""
    return "more important" if leader.priority > call.priority else "further on"


@dataclass(frozen=True)
class Headroom:
    """A snapshot under a policy: which calls run and grow, who leads, how much must stay free."""

    policy: Policy
    now: Snapshot

    @property
    def settings(self) -> HeadroomSettings:
        """The policy's table `headroom`."""
        return self.policy.headroom

    @property
    def anything_runs(self) -> bool:
        """Whether there is a call that is not paused."""
        return len(self.now.calls) > len(self.frozen)

    @cached_property
    def running(self) -> list[CallView]:
        """Calls that are not paused, without those that do nothing."""
        return [c for c in self.now.active_calls if c.frozen_for_usec is None]

    @cached_property
    def frozen(self) -> list[CallView]:
        """Paused calls, the first to go on first."""
        return sorted((c for c in self.now.active_calls if c.frozen_for_usec is not None), key=rank)

    @cached_property
    def moving(self) -> list[CallView]:
        """Calls that may be taking memory: those that run, without those that do nothing, and
        paused ones that have not stopped."""
        return [c for c in self.now.active_calls if c.frozen_for_usec is None or not c.stopped]

    @cached_property
    def growing(self) -> list[CallView]:
        """Calls that take memory fast enough to matter."""
        return [c for c in self.moving if is_growing(c)]

    @cached_property
    def growth_bytes_per_s(self) -> float:
        """The growth of the pool, or of its calls together if that is faster."""
        calls = sum(c.growth_bytes_per_s for c in self.moving)
        return max(self.now.growth_bytes_per_s, calls)

    def taken_within_bytes(self, usec: int) -> float:
        """Return what is taken of the pool within this time at its present growth: where calls have
        credit, no more than that."""
        taken, credit = self.growth_bytes_per_s * usec / 1e6, self.now.credit_bytes
        return taken if credit is None else min(taken, credit)

    @property
    def starves(self) -> bool:
        """Whether even the call that is the first to get more is held at its credit."""
        return any(c.starved for c in self.running)

    @cached_property
    def _held_back(self) -> set[str]:
        """Ids of calls that take no more, or will not in a moment: those that are paused or being
        paused, and those that may not be paused just yet, as they were a moment ago. Until they may
        their growth is held back at their credit."""
        now, leader = self.now, self.leader
        settling = (c for c in self.running if c is not leader and not self.may_pause(c))
        paused = (c for c in now.active_calls if c.frozen_for_usec is not None)
        stops = (c for c in paused if c.stopped or (c.frozen_for_usec or 0) < STOPS_USEC)
        return {c.id for calls in (settling, stops) for c in calls}

    @property
    def unheld_growth_bytes_per_s(self) -> float:
        """The growth that goes on: of calls that nothing holds back, or of the pool without those
        that are held back, if that is faster, for agents grow as well. What a call took just before
        it was paused is no growth to come."""
        free = [c for c in self.moving if c.id not in self._held_back]
        held = [c for c in self.now.active_calls if c.id in self._held_back]
        calls = sum(c.growth_bytes_per_s for c in free)
        return max(calls, self.now.growth_bytes_per_s - sum(c.growth_bytes_per_s for c in held))

    @property
    def starves_unheld(self) -> bool:
        """Whether a call is held at its credit though it is the first to get more, and pausing it
        in a moment is no answer."""
        return any(c.starved and c.id not in self._held_back for c in self.running)

    # Changes of direction

    def may_pause(self, call: CallView) -> bool:
        """Tell whether a call may be paused by now. Where nothing else can hold its growth back, it
        always may, and `may_go_on` alone keeps it from changing too often."""
        ago = call.paused_ago_usec
        return not self.now.host.can_hold or ago is None or ago >= self.settings.settle

    def may_go_on(self, call: CallView) -> bool:
        """Tell whether a paused call may go on by now: it changes at most twice within
        `headroom.settle`."""
        settle, ago = self.settings.settle, call.resumed_ago_usec
        if ago is not None and ago < settle:
            return False
        return self.now.host.can_hold or (call.frozen_for_usec or 0) >= settle

    # The leader

    @cached_property
    def leader(self) -> CallView | None:
        """The call that must get through, which may be paused still; None where there is no call.

        The most important calls come first: those that have a claim on the reserve, else those that
        want more though they are small. Where no call of that priority wants more, the calls that
        have waited for a whole lease come next, and at last the oldest of the most important ones.
        """
        top = self.now.first or most_important(self.now.calls)
        if top is None:
            return None
        equals = [c for c in self.now.active_calls if c.priority == top.priority]
        candidates = self._with_claim(equals) or self._wanting(equals) or self._overdue()
        return min(candidates, key=self._finish_key, default=top)

    def _with_claim(self, calls: Iterable[CallView]) -> list[CallView]:
        """Return the calls that want more and hold enough to matter."""
        return [c for c in self._wanting(calls) if c.memory_bytes >= self.small_bytes]

    def _wanting(self, calls: Iterable[CallView]) -> list[CallView]:
        """Return the calls that are paused, grow, or grew lately: most calls grow in bursts."""
        steady_since = self.now.now_usec - self.settings.steady
        return [
            c
            for c in calls
            if c.frozen_for_usec is not None or is_growing(c) or c.grew_usec > steady_since
        ]

    def _overdue(self) -> list[CallView]:
        """Return the calls that want more and have been paused for a whole lease in all. Small
        calls count only where no larger call wants more."""
        waiting = self.claimants or self._wanting(self.now.active_calls)
        return [c for c in waiting if c.paused_usec >= self.settings.lease]

    def _finish_key(self, call: CallView) -> tuple[int, bool, bool, int, tuple[int, int, str]]:
        """Sort key: the smallest is to finish first. A running call stays ahead of paused ones as
        long as what it needs is free."""
        need = self.need_bytes(call)
        paused = call.frozen_for_usec is not None
        return -call.priority, need > self.now.free_bytes, paused, need, rank(call)

    # The reserve

    @cached_property
    def claimants(self) -> list[CallView]:
        """Calls that the reserve is kept for: they hold enough to matter, and may still grow."""
        return self._with_claim(self.now.active_calls)

    @cached_property
    def next_to_finish(self) -> CallView | None:
        """The claimant that is to finish first. It is not held back for the sake of the reserve."""
        return min(self.claimants, key=self._finish_key, default=None)

    @cached_property
    def reserve_bytes(self) -> int:
        """Free memory with which all claimants can finish, one after the other.

        The banker's algorithm (E. W. Dijkstra, EWD 623), with what calls may still take as their
        needs: the most important call finishes first, among equals the one that needs least, and
        each one's end gives back what it holds. As long as so much is free, no two claimants can
        wait for each other's memory.
        """
        reserve = given_back = 0
        for call in sorted(self.claimants, key=lambda c: (-c.priority, self.need_bytes(c))):
            reserve = max(reserve, self.need_bytes(call) - given_back)
            given_back += call.memory_bytes
        return reserve

    def need_bytes(self, call: CallView) -> int:
        """Return the bytes that a call may still take before it ends. No call is taken to go
        beyond `headroom.leader_most` of the pool."""
        settings, limit = self.settings, self.now.limit_bytes
        wanted = still_needs(self.now, call, settings.leader_share, settings.prior.of(limit))
        return min(wanted, max(0, settings.leader_most.of(limit) - call.memory_bytes))

    @cached_property
    def small_bytes(self) -> int:
        """Size below which a call has no claim on the reserve and is not held back for it. Most
        calls never hold more."""
        return self.settings.small.of(self.now.limit_bytes)
