"""The pool's mark on kernels that cannot tell it by a program: memory.high, used once.

Passing memory.high is an event that wakes the daemon. It would also slow everyone in the pool, the
important sessions too, so the file is set back at once: at the moment of passing the overage is
next to nothing, and so is the delay (mm/memcontrol.c: calculate_high_delay). It is set again when
use has fallen well below it; never above use, where the write itself would reclaim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import KnobError

log = logging.getLogger(__name__)


class Tripwire:
    """`on_trip` is called once for each time that use passes the mark while it is armed."""

    def __init__(self, pool: Cgroup, events: FileEvents, mark_bytes: int, low_bytes: int) -> None:
        """Armed below `low_bytes`, tripped above `mark_bytes`. Nothing is written yet."""
        self._pool = pool
        self._events = events
        self._mark_bytes, self._low_bytes = mark_bytes, low_bytes
        self._armed = False
        self._count = 0
        self._watch: int | None = None
        self._on_trip: Callable[[], None] = lambda: None

    def start(self, on_trip: Callable[[], None]) -> None:
        """Watch from now on; `arm_below` arms it. Raises KnobError or OSError."""
        self._on_trip = on_trip
        self._watch = self._events.watch(self._pool, knobs.MEMORY_EVENTS_LOCAL, self._changed)

    def move(self, mark_bytes: int, low_bytes: int) -> None:
        """Another mark: armed anew with the next look. Raises KnobError."""
        if (mark_bytes, low_bytes) != (self._mark_bytes, self._low_bytes):
            self._mark_bytes, self._low_bytes = mark_bytes, low_bytes
            if self._armed:
                self._disarm()

    def arm_below(self, usage_bytes: int) -> None:
        """Arm it if it is not and use is low enough. Raises KnobError."""
        if not self._armed and usage_bytes < self._low_bytes:
            self._count = self._pool.read(knobs.MEMORY_EVENTS_LOCAL)["high"]
            self._pool.write(knobs.MEMORY_HIGH, self._mark_bytes)
            self._armed = True

    def _changed(self) -> None:
        if not self._armed:
            return
        try:
            if self._pool.read(knobs.MEMORY_EVENTS_LOCAL)["high"] == self._count:
                return
            self._disarm()
        except KnobError as error:
            log.error("the pool's mark: %s", error)
            return
        self._on_trip()

    def _disarm(self) -> None:
        self._pool.write(knobs.MEMORY_HIGH, None)
        self._armed = False

    def stop(self) -> None:
        """Leave the pool without a mark; no error if it was not started."""
        if self._watch is None:
            return
        self._events.unwatch(self._watch)
        self._watch = None
        if self._armed:
            try:
                self._disarm()
            except KnobError as error:
                log.error("the pool's mark: %s", error)
