"""Which node takes the next agent: by requests, by packing, or by the headroom that nodes tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from agentcgroup_lab.cluster.workload import Bytes, Indices, Kinds
from agentcgroupd.headroom.estimate import (
    EVERY_S,
    RISE_AFTER_S,
    Numbers,
    Settings,
    Steady,
    agents_that_fit,
)
from agentcgroupd.telemetry.metrics import BYTES_BUCKETS


class Placing(Protocol):
    """A scheduler with one number a node."""

    def room(self, second: int, used: Bytes, sessions: Indices) -> Indices:
        """How many agents each node takes, those on it among them. `used`: bytes held on each;
        `sessions`: agents on each."""

    def ended(self, node: int, peak_bytes: float) -> None:
        """Take note that a call has ended on a node."""


class ByRequest:
    """Takes as many as fit when each asks for the same: the cluster's own scheduler."""

    def __init__(self, nodes: int, node_bytes: float, request_bytes: float) -> None:
        self._room = np.full(nodes, math.floor(node_bytes / request_bytes), dtype=np.int64)

    def room(self, second: int, used: Bytes, sessions: Indices) -> Indices:
        """Give the same at all times."""
        return self._room

    def ended(self, node: int, peak_bytes: float) -> None:
        """Do nothing: requests do not change."""


class ByHeadroom:
    """Takes as many as each node tells that it has room for (agentcgroupd.headroom)."""

    def __init__(self, nodes: int, node_bytes: float, settings: Settings) -> None:
        self._bytes, self._settings = int(node_bytes), settings
        self._steady = [Steady(RISE_AFTER_S) for _ in range(nodes)]
        self._counts = np.zeros((nodes, len(BYTES_BUCKETS) + 1))
        self._room = np.zeros(nodes, dtype=np.int64)

    def room(self, second: int, used: Bytes, sessions: Indices) -> Indices:
        """What the nodes have told last."""
        if second % EVERY_S == 0:
            for node, steady in enumerate(self._steady):
                numbers = Numbers(
                    self._bytes, int(used[node]), int(sessions[node]), self._peaks(node)
                )
                fit = agents_that_fit(numbers, self._settings)
                self._room[node] = steady.see(fit, float(second))
        return self._room

    def ended(self, node: int, peak_bytes: float) -> None:
        """Count the peak, as the daemon's histogram does."""
        self._counts[node, int(np.searchsorted(BYTES_BUCKETS, peak_bytes))] += 1

    def _peaks(self, node: int) -> Sequence[tuple[float, float]]:
        upto = np.cumsum(self._counts[node]).tolist()
        return tuple(zip((*BYTES_BUCKETS, math.inf), upto, strict=True))


def make(name: str, kinds: Kinds, nodes: int, node_bytes: float) -> Placing:
    """Make a scheduler by its name: `requests` (each asks for the highest recorded peak, because
    nobody knows who will reach it), `packing` (each asks for what it holds in the mean),
    `headroom`. Raises ValueError for another name."""
    match name:
        case "requests":
            return ByRequest(nodes, node_bytes, float(kinds.peaks.max()))
        case "packing":
            return ByRequest(nodes, node_bytes, float(kinds.means.mean()))
        case "headroom":
            return ByHeadroom(nodes, node_bytes, Settings(agents_max=1000))
    raise ValueError(f"{name!r} is no way of placing: requests, packing, headroom")
