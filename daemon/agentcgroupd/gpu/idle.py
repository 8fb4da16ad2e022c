"""When a tenant no longer wants its devices. Pure.

To take one that works for one that rests costs the others nothing and it everything: its rivals are
let run beside it. So it has to have been let run, and to have shown nothing, for long enough that
its work would have been seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How long nothing has to be seen, in microseconds."""

    quiet_usec: int
    ran_usec: int
    """Of the time in which it was not held back."""


WATCHED = Limits(200_000, 60_000)
"""Its launches are counted by probes, and NVML shows nothing either: a launch is seen at the next
look, and who has launched nothing in so long waits for one long kernel, which NVML sees."""
SAMPLED = Limits(1_500_000, 400_000)
"""NVML alone: it takes a sample in a sixth of a second, which shows whoever is on the device at
that moment, and so often misses one with a small share for several turns in a row."""


def rests(watched: bool, quiet_usec: int, ran_usec: int) -> bool:
    """Whether one that wanted its devices does so no longer. `quiet_usec`: since it was last seen
    to use one; `ran_usec`: how long it was let run of that."""
    limits = WATCHED if watched else SAMPLED
    return quiet_usec > limits.quiet_usec and ran_usec > limits.ran_usec
