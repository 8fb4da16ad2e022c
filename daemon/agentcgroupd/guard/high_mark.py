"""The pool's mark: the use of memory at which the guard decides at once, whatever its timer says.

Two things can tell that use has passed it. Where the kernel takes the memory programs, one of them
does. Elsewhere memory.high does, used once: passing it is an event that wakes the daemon. It would
also slow everyone in the pool, the important sessions too, so the file is set back at once: at the
moment of passing the overage is next to nothing, and so is the delay (mm/memcontrol.c:
calculate_high_delay). It is set again when use has fallen well below the mark; never above use,
where the write itself would reclaim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.bpf.plane import DataPlane
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import KnobError

log = logging.getLogger(__name__)


class PoolMark(Protocol):
    """Whatever tells that use of the pool has passed the mark."""

    def start(self, mark_bytes: int, low_bytes: int, on_passed: Callable[[], None]) -> None:
        """Tell from now on when use passes `mark_bytes`, once until it was below `low_bytes`.
        Raises KnobError, BpfError or OSError."""

    def move(self, mark_bytes: int, low_bytes: int) -> None:
        """Go by other numbers from now on. Raises KnobError."""

    def sampled(self, usage_bytes: int) -> None:
        """Take note of the use that was just read. Raises KnobError."""

    def stop(self) -> None:
        """Leave the pool without a mark; no error if it was not started."""


class ProgramMark:
    """The mark as the memory programs keep it. `guard.signals` hears their event, with the time at
    which use passed it, so `on_passed` is not called from here."""

    def __init__(self, plane: DataPlane, memory: MemoryPrograms, pool: Cgroup) -> None:
        self._plane, self._memory, self._pool = plane, memory, pool

    def start(self, mark_bytes: int, low_bytes: int, on_passed: Callable[[], None]) -> None:
        """Set the mark. Raises BpfError."""
        self._memory.set_mark(self._pool.id, mark_bytes, low_bytes)

    def move(self, mark_bytes: int, low_bytes: int) -> None:
        """Set another mark; what goes wrong is logged."""
        self._plane.attempt(
            "the pool's mark cannot be moved",
            self._memory.set_mark,
            self._pool.id,
            mark_bytes,
            low_bytes,
        )

    def sampled(self, usage_bytes: int) -> None:
        """Do nothing: the program sees use itself."""

    def stop(self) -> None:
        """Do nothing: the mark goes with the program."""


class HighMark:
    """The mark as memory.high of the pool keeps it, armed again and again."""

    def __init__(self, pool: Cgroup, events: FileEvents) -> None:
        self._pool = pool
        self._events = events
        self._mark_bytes = self._low_bytes = 0
        self._armed = False
        self._high_events = 0
        """What memory.events.local counted when the mark was armed."""
        self._watch: int | None = None

    def start(self, mark_bytes: int, low_bytes: int, on_passed: Callable[[], None]) -> None:
        """Watch from now on; the first sample of use below `low_bytes` arms the mark. Raises
        KnobError or OSError."""
        self._mark_bytes, self._low_bytes = mark_bytes, low_bytes
        self._watch = self._events.watch(
            self._pool, knobs.MEMORY_EVENTS_LOCAL, lambda: self._changed(on_passed)
        )

    def move(self, mark_bytes: int, low_bytes: int) -> None:
        """Go by other numbers: the mark is armed anew with the next sample. Raises KnobError."""
        if (mark_bytes, low_bytes) != (self._mark_bytes, self._low_bytes):
            self._mark_bytes, self._low_bytes = mark_bytes, low_bytes
            if self._armed:
                self._disarm()

    def sampled(self, usage_bytes: int) -> None:
        """Arm the mark if it is not armed and use is low enough. Raises KnobError."""
        if not self._armed and usage_bytes < self._low_bytes:
            self._high_events = self._pool.read(knobs.MEMORY_EVENTS_LOCAL)["high"]
            self._pool.write(knobs.MEMORY_HIGH, self._mark_bytes)
            self._armed = True

    def _changed(self, on_passed: Callable[[], None]) -> None:
        if not self._armed:
            return
        try:
            if self._pool.read(knobs.MEMORY_EVENTS_LOCAL)["high"] == self._high_events:
                return
            self._disarm()
        except KnobError as error:
            log.error("the pool's mark: %s", error)
            return
        on_passed()

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
