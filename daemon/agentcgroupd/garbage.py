"""Cyclic garbage, looked for in short steps.

Python looks at every object that may be part of a cycle whenever a quarter has been added to them:
with 10,000 open calls that stops the loop for some 50 ms. Nearly all of these objects are free of
cycles and go by themselves. So what has survived one look is left alone until memory that open
sessions and calls do not explain has doubled, or an hour has passed. The hourly look waits, for a
day at most, until little is open: it takes some 0.7 us an object, and an open call has 40.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable

OLDEST = 2
"""The generation that holds all objects."""
FULL_AFTER = 0
"""The third threshold of gc: a full look follows every look at the second generation, after some
8,000 new objects; it takes 1 or 2 ms."""
THOROUGH_S = 3600.0
THOROUGH_LEAST_S = 60.0
THOROUGH_MOST_S = 24 * 3600.0
"""Age of the last thorough look from which the next one no longer waits until little is open."""
LITTLE_OPEN = 500
"""Sessions and calls together, up to which a thorough look keeps nobody waiting for long."""
GREW = 2.0
"""Factor by which unexplained blocks grow before a thorough look."""
BLOCKS_OF_OPEN = 80
"""Blocks of memory (sys.getallocatedblocks) that a session or a call that is open explains: 71 and
67 were measured with 1,000 sessions and 5,000 calls."""


def collect_all() -> None:
    """Look at every object, and then at none of them again for the time being."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class Garbage:
    """Python's collector of cycles, set for a loop that nobody is to wait for."""

    def __init__(
        self, count_open: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`count_open`: how many sessions and calls are open."""
        self._count_open, self._clock = count_open, clock
        self._thresholds = gc.get_threshold()
        self._looked_s = 0.0
        self._unexplained_blocks = self._at_start = 0

    def start(self) -> None:
        """Leave alone what is there now, and what survives a look from now on."""
        self._thoroughly()
        # What is open may take less than is reckoned with, so that later numbers come out too low.
        self._at_start = self._unexplained_blocks
        first, second, _ = self._thresholds
        gc.set_threshold(first, second, FULL_AFTER)
        gc.callbacks.append(self._looked)

    def stop(self) -> None:
        """Set the collector as it was."""
        gc.callbacks.remove(self._looked)
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    def check(self) -> None:
        """Look thoroughly if memory that open sessions and calls do not explain has doubled; else
        once an hour, or once a day while more than LITTLE_OPEN of them are open."""
        since_s = self._clock() - self._looked_s
        if since_s < THOROUGH_LEAST_S:
            return
        count = self._count_open()
        is_due = since_s >= THOROUGH_S and (count <= LITTLE_OPEN or since_s >= THOROUGH_MOST_S)
        if is_due or self._unexplained() > GREW * max(self._unexplained_blocks, self._at_start):
            self._thoroughly()

    def _unexplained(self) -> int:
        """Blocks of memory that are held besides those of what is open."""
        return sys.getallocatedblocks() - BLOCKS_OF_OPEN * self._count_open()

    def _thoroughly(self) -> None:
        collect_all()
        self._looked_s, self._unexplained_blocks = self._clock(), self._unexplained()

    @staticmethod
    def _looked(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == OLDEST:
            gc.freeze()
