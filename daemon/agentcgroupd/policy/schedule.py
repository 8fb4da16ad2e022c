"""When the guard samples the pool again, and whether a sample is worth a decision. Pure: no I/O, no
clock; the guard and the simulator both follow it.

How soon depends on how soon the pool could be full, or could hold too much for its calls to end one
after the other: at the fastest growth that is assumed possible, several samples fall into the time
that the free memory lasts.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentcgroupd.policy.engine import attention_bytes, claim_bytes, marks
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import TICK, CallView, Decision, Signal, Snapshot

BURST_BYTES_PER_S = 2 << 30
"""Recorded agents' tool calls grew by up to 1.7 GB/s (arXiv 2602.09345), which is what a core can
touch; so many calls may do so at once as there are cores."""
CORES_MOST = 8
"""More than eight together touch little more than eight do."""
CALM_INTERVAL_S = 0.25
NUDGE_S = 0.005
"""Ends of calls within this time are one signal."""
BUSY_SHARE = 0.25
"""Sampling and deciding may take this part of the time."""


class Schedule:
    """The marks of one policy on a pool of one size, and the times between samples."""

    def __init__(self, policy: Policy, limit_bytes: int, tick_s: float, cores: int) -> None:
        """`tick_s`: the shortest time between samples. `cores`: of this machine."""
        self.mark_bytes, self.resume_bytes = marks(policy, limit_bytes)
        """Use of the pool at which to sample at once, and below which that is over."""
        self._attention_bytes = attention_bytes(policy, limit_bytes)
        self._least_free_bytes = limit_bytes - self.mark_bytes + claim_bytes(policy, limit_bytes)
        self._tick_s = tick_s
        self._cores = min(CORES_MOST, cores)

    def is_calm(self, free_bytes: int, signal: Signal) -> bool:
        """Whether no ruleset on the pool's use can hold, and nothing else asks for a decision."""
        return free_bytes > self._attention_bytes and signal is TICK

    def interval_s(self, free_bytes: int, open_calls: int) -> float:
        """Seconds until the next sample, by what was free at the last one."""
        if not open_calls:
            return CALM_INTERVAL_S
        growing = min(open_calls, self._cores)
        left_s = (free_bytes - self._least_free_bytes) / (BURST_BYTES_PER_S * growing)
        return max(self._tick_s, min(CALM_INTERVAL_S, left_s / 2))


def rest_s(cost_s: float) -> float:
    """Seconds that have to pass after a sample that took `cost_s`, so that on a slow machine
    sampling does not become the main work."""
    return cost_s / BUSY_SHARE


def holds_back(snapshot: Snapshot, decisions: Sequence[Decision]) -> bool:
    """Whether something was done, or is decided now, that is to be undone in time: the pool is
    then sampled however calm it gets."""
    calls, sessions = snapshot.active_calls, snapshot.sessions
    if decisions or any(map(_held_back, calls)) or any(s.slowed for s in sessions):
        return True
    lowered = ((c.weight_lowered_usec, c.held_usec) for c in snapshot.io_calls)
    return any(since is not None for pair in lowered for since in pair)


def _held_back(call: CallView) -> bool:
    paused = call.frozen_for_usec is not None
    denied = call.denied_growth_bytes is not None
    throttled = call.throttled_growth_bytes is not None
    return paused or denied or throttled
