"""Log lines that a peer can cause as often as it likes: the first is written, then a count."""

from __future__ import annotations

import logging
import time

EVERY_S = 10.0


class Seldom:
    """Writes a line at most every EVERY_S, with how many there were meanwhile."""

    def __init__(self, log: logging.Logger, level: int, what: str) -> None:
        """`what`: begins each line."""
        self._log, self._level, self._what = log, level, what
        self._next = 0.0
        self._kept_back = 0

    def say(self, sentence: object) -> None:
        """Write a line, or count it."""
        now = time.monotonic()
        if now < self._next:
            self._kept_back += 1
            return
        more = f" ({self._kept_back} more like this since the last line)" if self._kept_back else ""
        self._next, self._kept_back = now + EVERY_S, 0
        self._log.log(self._level, "%s: %s%s", self._what, sentence, more)
