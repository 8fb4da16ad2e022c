"""The simulator's pool and clock: held memory is piecewise linear, so that the moment at which use
reaches its mark or its limit is computed, not looked for."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from itertools import count

from agentcgroup_lab.simulate.types import KernelModel, Lane, SimulatedCall

INFINITY = float("inf")
SAMPLES = 200
"""Steps of the histogram of use, over twice the pool's limit."""


class SimulatedPool:
    """Time, what the pool holds, and how what is cold leaves and comes back."""

    def __init__(self, kernel: KernelModel, limit_bytes: int) -> None:
        self.kernel, self.limit = kernel, float(limit_bytes)
        self.now = 0.0
        self.usage = self.slope = self.swapped = 0.0
        self.kept = 1.0 / kernel.zram_ratio if kernel.zram_ratio else 1.0
        """Part of a byte that it still takes in zram."""
        self.counts: Counter[str] = Counter()
        self.area = self.measured_from_s = 0.0
        self.histogram = [0.0] * SAMPLES
        self.mark: float | None = None
        """Use at which `mark_passed` is called."""
        self.mark_passed: Callable[[], None] = lambda: None
        self.quiet_pct = kernel.agent_works_pct
        """Percent of a core: an agent that burns less is taken for one that waits."""
        self._heap: list[tuple[float, int, Callable[..., None], object, int]] = []
        self._order = count()
        self._over = False

    def relieve(self) -> None:
        """Called when the pool is at its limit."""
        raise NotImplementedError

    def at(self, time_s: float, run: Callable[..., None], what: object, version: int) -> None:
        """Have `run(what, version)` called at that time."""
        heapq.heappush(self._heap, (time_s, next(self._order), run, what, version))

    def run(self, until_s: float, progress: Callable[[float], None]) -> None:
        """Follow all events until that time, or until nothing happens any more."""
        heap = self._heap
        told = 0
        while heap and not self._over:
            time_s = heap[0][0]
            if self.slope > 0.0 and self._crosses(min(time_s, until_s)):
                continue
            if time_s > until_s:
                break
            _, _, run, what, version = heapq.heappop(heap)
            self.advance(time_s)
            run(what, version)
            if self.usage > self.limit:
                self.relieve()
            told += 1
            if not told % 20_000:
                progress(self.now)
        if until_s < INFINITY and not self._over:
            self.advance(max(until_s, self.now))

    def finish(self) -> None:
        """End the simulation: nothing more is to happen."""
        self._over = True

    def measure(self, _: object, version: int) -> None:
        """Begin to measure the pool's use: what it was before does not count."""
        del version
        self.area, self.measured_from_s = 0.0, self.now
        self.histogram = [0.0] * SAMPLES

    def use_quantile(self, share: float) -> float:
        """Part of the pool that its use stayed below for this part of the time."""
        left = sum(self.histogram) * share
        for place, length_s in enumerate(self.histogram):
            left -= length_s
            if left <= 0.0:
                return (place + 1) / (SAMPLES / 2)
        return 0.0

    def _crosses(self, before_s: float) -> bool:
        """Go to where the pool's use passes its mark or its limit, if that comes first."""
        mark = self.mark
        if mark is not None and self.usage < mark:
            edge = mark
        else:
            edge = self.limit
        cross_s = self.now + (edge - self.usage) / self.slope
        if cross_s >= before_s:
            return False
        self.advance(max(cross_s, self.now))
        if edge == mark and mark < self.limit:
            self.usage = max(self.usage, mark)
            self.mark_passed()
        else:
            self.relieve()
        return True

    def advance(self, time_s: float) -> None:
        """Let the pool's use grow until then."""
        passed = time_s - self.now
        if passed > 0.0:
            grown = self.slope * passed
            self.area += (self.usage + grown / 2) * passed
            place = int(self.usage / self.limit * (SAMPLES / 2))
            self.histogram[min(SAMPLES - 1, max(0, place))] += passed
            self.usage += grown
            self.now = time_s

    def sync(self, call: SimulatedCall) -> None:
        """Bring what a call holds up to now."""
        passed = (self.now - call.since_s) * call.speed
        call.since_s = self.now
        if passed > 0.0:
            segment = call.segment
            grown = segment.rate * passed
            call.held_bytes += grown
            call.left_s -= passed
            call.cpu_s += segment.cores * passed
            if call.capped:
                call.swapped_bytes += grown
                self.swapped += grown

    def slope_of(self, call: SimulatedCall) -> float:
        rate = call.segment.rate * call.speed
        return rate * self.kept if call.capped else rate

    @property
    def swap_free(self) -> float:
        """Bytes that zram still takes in."""
        return self.kernel.zram_size * self.limit - self.swapped if self.kernel.zram_ratio else 0.0

    def resize(self, call: SimulatedCall, new_bytes: float) -> None:
        """Give memory back at once, or take it too fast to be seen growing."""
        call.peak_bytes = max(call.peak_bytes, call.resident_bytes)
        out = min(call.swapped_bytes, new_bytes)
        self.usage += (new_bytes - out) - call.resident_bytes
        self.usage += (out - call.swapped_bytes) * self.kept
        self.swapped += out - call.swapped_bytes
        call.held_bytes, call.swapped_bytes = new_bytes, out
        call.view = None

    def agent_holds(self, lane: Lane, new_bytes: float) -> None:
        out = min(lane.agent_swapped, new_bytes * self.kernel.reclaimable_share)
        self.usage += (new_bytes - out) - lane.agent_resident
        self.usage += (out - lane.agent_swapped) * self.kept
        self.swapped += out - lane.agent_swapped
        lane.agent_bytes, lane.agent_swapped = new_bytes, out

    def wake(self, lane: Lane) -> None:
        """Let the agent work: what it touches comes back, and takes its time."""
        back = lane.agent_swapped - lane.agent_bytes * self.kernel.cold_share
        if back <= 0.0:
            return
        lane.agent_swapped -= back
        self.swapped -= back
        self.usage += back * (1.0 - self.kept)
        lane.refault_s, lane.refault_bytes = self.now, back
        lane.since_s = max(lane.since_s, self.now) + back * self.kernel.page_in_s_per_byte

    def reclaim_agent(self, lane: Lane, amount: float) -> float:
        """Take memory from a waiting agent; returns what went."""
        most = lane.agent_bytes * self.kernel.reclaimable_share - lane.agent_swapped
        amount = min(amount, most, self.swap_free)
        if amount <= 0.0:
            return 0.0
        lane.agent_swapped += amount
        self.swapped += amount
        self.usage -= amount * (1.0 - self.kept)
        return amount

    def reclaim_call(self, call: SimulatedCall, amount: float) -> float:
        """Take memory from a paused call; returns what went."""
        most = call.held_bytes * self.kernel.reclaimable_share - call.swapped_bytes
        amount = min(amount, most, self.swap_free)
        if amount <= 0.0:
            return 0.0
        call.peak_bytes = max(call.peak_bytes, call.resident_bytes)
        call.swapped_bytes += amount
        call.view = None
        self.swapped += amount
        self.usage -= amount * (1.0 - self.kept)
        return amount
