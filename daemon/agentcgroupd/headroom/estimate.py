"""How many agents fit, from what the pool holds: without I/O and without a clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

EVERY_S = 5.0
"""How often the number is measured."""
RISE_AFTER_S = 60.0
"""For how long it has to be larger before a larger one is told."""
LEAST_BYTES = 128 << 20
"""What an agent is taken to hold at least: one that has just begun holds little, and will not stay
so."""
LEAST_CALL_BYTES = 1 << 30
"""What the large call is taken to need at least: a node on which none has ended yet knows of none,
and would fill with agents whose first large call could never run."""
PEAK_QUANTILE = 0.99
"""The peak among those of calls that has to fit beside all agents: calls that are larger take
their turn, or wait."""
AGENTS_A_CALL = 32
"""So many agents have one large call at a time among them, in the mean: a large call lasts for
seconds, and agents mostly wait (docs/cluster.md)."""
AGENTS_FIRST = 16
"""So many agents at most are let onto a node that has none. What they hold is known once they are
there: many that come at once would fill the node by a guess, and none of them could go on."""
TIMES_MORE = 2
"""The most that is told of a node with agents, as a multiple of these."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the daemon tells of its pool."""

    pool_bytes: int
    """The pool's limit."""
    used_bytes: int
    sessions: int
    peaks: Sequence[tuple[float, float]] = field(default_factory=tuple)
    """Calls by their peak: (upper bound in bytes, calls up to that), the bound growing."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator may change."""

    least_bytes: int = LEAST_BYTES
    least_call_bytes: int = LEAST_CALL_BYTES
    agents_max: int = 250
    """The most that is ever told, those that are there among them."""


def agents_that_fit(numbers: Numbers, settings: Settings) -> int:
    """How many agents the node has room for, those that are there among them.

    Agents mostly wait and hold little; now and then a call takes much more for a moment, and the
    daemon has the others wait when two of these meet. So each further agent is counted with what
    the present ones hold in the mean, and a large call for every AGENTS_A_CALL of them, and one
    more, has to fit beside them all. No more than TIMES_MORE as many are told as were measured.
    """
    mean = numbers.used_bytes / numbers.sessions if numbers.sessions else 0
    each = max(settings.least_bytes, mean)
    call = max(settings.least_call_bytes, large_call_bytes(numbers.peaks))
    calls = 1 + numbers.sessions // AGENTS_A_CALL
    free = numbers.pool_bytes - numbers.used_bytes - call * calls
    more = max(0, math.floor(free / each))
    most = min(max(AGENTS_FIRST, TIMES_MORE * numbers.sessions), settings.agents_max)
    return max(numbers.sessions, min(numbers.sessions + more, most))


def large_call_bytes(peaks: Sequence[tuple[float, float]]) -> int:
    """The peak that PEAK_QUANTILE of all calls stay below; 0: no call has ended yet. Where it lies
    above every bound, the last bound is taken."""
    total = peaks[-1][1] if peaks else 0.0
    if not total:
        return 0
    finite = [bound for bound, _ in peaks if math.isfinite(bound)]
    for bound, count in peaks:
        if count >= PEAK_QUANTILE * total and math.isfinite(bound):
            return int(bound)
    return int(finite[-1]) if finite else 0


class Steady:
    """A number that falls at once and rises slowly: pods that were placed by a number that was too
    large for a moment would stay."""

    def __init__(self, rise_after_s: float) -> None:
        """`rise_after_s`: for how long it has to be larger before it is believed."""
        self._rise_after_s = rise_after_s
        self.value: int | None = None
        self._least_since: tuple[float, int] | None = None
        """Since when it has been larger, and the least that it was in that time."""

    def see(self, value: int, now_s: float) -> int:
        """Take a new measurement; returns what is to be told. `now_s`: of a clock that never goes
        back."""
        if self.value is None or value <= self.value:
            self.value, self._least_since = value, None
            return value
        since, least = self._least_since or (now_s, value)
        self._least_since = (since, min(least, value))
        if now_s - since >= self._rise_after_s:
            self.value, self._least_since = self._least_since[1], None
        return self.value
