"""The two clocks that the daemon reads."""

from __future__ import annotations

import time


def boottime_usec() -> int:
    """Time since boot with suspends, which a restarted daemon shares with the one before it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def unix_usec() -> int:
    """Wall clock, for people only; no decision depends on it."""
    return time.time_ns() // 1000
