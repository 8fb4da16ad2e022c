"""How fast something grows, from what it held at each sample. Pure: no I/O, no clock; the guard's
sampler and the simulator both estimate with it."""

from __future__ import annotations

APART_USEC = 2_000
"""Samples closer together than this say nothing of growth: memory is charged in batches."""
FADE = 0.7
"""Part of the growth seen last that is kept from one sample to the next, when it ends."""


class Growth:
    """Bytes a second since the last sample, by key, falling off over a few samples after it
    ends."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, int]] = {}
        self._rate: dict[str, float] = {}

    def of(self, key: str, now_usec: int, value: int, since_usec: int | None = None) -> float:
        """The growth of `key`, which holds `value` bytes now. `since_usec`: at the first sample,
        when it held nothing; None: it does not grow yet."""
        first = (now_usec, value) if since_usec is None else (since_usec, 0)
        then, before = self._before.get(key, first)
        if now_usec - then < APART_USEC and key in self._before:
            return self._rate.get(key, 0.0)
        self._before[key] = (now_usec, value)
        fresh = (value - before) * 1e6 / (now_usec - then) if now_usec > then else 0.0
        self._rate[key] = max(fresh, self._rate.get(key, 0.0) * FADE)
        return self._rate[key]

    def restart(self, key: str, then_usec: int, value: int) -> None:
        """Take it that `key` held `value` bytes at that time, and has not grown before."""
        self._before[key] = (then_usec, value)
        self._rate.pop(key, None)

    def forget(self, key: str) -> None:
        """Forget one; no error if it is not known."""
        self._before.pop(key, None)
        self._rate.pop(key, None)

    def keep(self, keys: set[str]) -> None:
        """Forget all others."""
        for gone in self._before.keys() - keys:
            del self._before[gone]
            self._rate.pop(gone, None)
