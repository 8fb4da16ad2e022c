"""When a tenant no longer wants its devices. Pure.

Taking a working tenant for an idle one costs it its share, for its rivals are then let run beside
it. So a tenant is idle only after it was let run, and showed nothing, for so long that its work
would have been seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a tenant shows no work before it is idle, in microseconds."""

    quiet_usec: int
    ran_usec: int
    """The least part of that time in which it was not held back."""


WATCHED = Limits(200_000, 60_000)
"""Launches are counted by probes, and NVML is asked besides. A launch is seen at the next sample;
who has launched nothing for so long may only wait for one long kernel, which NVML shows."""
SAMPLED = Limits(1_500_000, 400_000)
"""NVML alone. Its samples are a sixth of a second apart and show whoever is on the device at that
moment, so they often miss a tenant with a small share for several slices in a row."""


def is_idle(watched: bool, quiet_usec: int, ran_usec: int) -> bool:
    """Whether a tenant that wanted its devices wants them no longer.

    `watched`: all its launches are seen by probes. `quiet_usec`: time since it was last seen to use
    a device. `ran_usec`: how much of that time it was let run.
    """
    limits = WATCHED if watched else SAMPLED
    return quiet_usec > limits.quiet_usec and ran_usec > limits.ran_usec
