"""Cyclic garbage, looked for in short steps.

Python looks at every object that may be part of a cycle whenever a quarter has been added to them:
with 10,000 open calls that stops the loop for some 50 ms. Nearly all of these objects are free of
cycles and go by themselves. So what has survived one look is not looked at again, until there is
twice as much as after the last thorough look, or for an hour.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable

OLDEST = 2
"""The generation that holds all objects."""
FULL_AFTER = 4
"""Looks at the second generation before one at all that came since the last: some 30,000 objects,
and 3 ms."""
THOROUGH_S = 3600.0
THOROUGH_LEAST_S = 60.0
GREW = 2.0


def collect_all() -> None:
    """Look at every object, and then at none of them again for the time being."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class Garbage:
    """Python's collector of cycles, set for a loop that nobody is to wait for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._thresholds = gc.get_threshold()
        self._looked_s = 0.0
        self._blocks = 0

    def start(self) -> None:
        """Leave alone what is there now, and what survives a look from now on."""
        self._thoroughly()
        first, second, _ = self._thresholds
        gc.set_threshold(first, second, FULL_AFTER)
        gc.callbacks.append(self._looked)

    def stop(self) -> None:
        """Set the collector as it was."""
        gc.callbacks.remove(self._looked)
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    def check(self) -> None:
        """Look thoroughly where there is twice as much as the last time, or after an hour."""
        since_s = self._clock() - self._looked_s
        if since_s < THOROUGH_LEAST_S:
            return
        if since_s >= THOROUGH_S or sys.getallocatedblocks() > GREW * self._blocks:
            self._thoroughly()

    def _thoroughly(self) -> None:
        collect_all()
        self._looked_s, self._blocks = self._clock(), sys.getallocatedblocks()

    @staticmethod
    def _looked(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == OLDEST:
            gc.freeze()
