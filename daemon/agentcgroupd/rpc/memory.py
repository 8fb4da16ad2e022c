"""The daemon's own memory, held below what the configuration allows.

What peers can make it hold is counted where it is held (rpc/budgets.py). For what nobody counts,
such as what libraries keep for a connection, whoever has most open is disconnected.
"""

from __future__ import annotations

import logging
import os

from agentcgroupd.garbage import collect_all
from agentcgroupd.host.kept_file import KeptFile
from agentcgroupd.host.syscalls import give_memory_back, use_few_arenas
from agentcgroupd.rpc.budgets import Budgets, Crowd

log = logging.getLogger(__name__)

ARENAS = 2
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
CALM_CHECKS = 20
"""Checks between two attempts while there is nobody to disconnect."""


class MemoryWatch:
    """Compares what the daemon holds with its limit, again and again."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._budgets: list[Budgets] = []
        self._calm = 0
        self._statm = KeptFile("/proc/self/statm")
        use_few_arenas(ARENAS)

    def add(self, budgets: Budgets) -> None:
        """Take connections from these, too, when memory runs short."""
        self._budgets.append(budgets)

    def check(self) -> None:
        """Disconnect the crowd that has most open, if the daemon holds too much."""
        if self._calm:
            self._calm -= 1
            return
        held = self.resident_bytes()
        if held <= self._limit_bytes:
            return
        crowds = [(crowd, budgets) for budgets in self._budgets for crowd in budgets.crowds()]
        most = max(crowds, key=lambda pair: _weight(pair[0]), default=None)
        if most is None or not most[0].connections:
            self._calm = CALM_CHECKS
        else:
            crowd, budgets = most
            log.error(
                "the daemon holds %d MiB, more than limits.memory (%d MiB): the %d connections of "
                "%s are closed",
                held >> 20,
                self._limit_bytes >> 20,
                len(crowd.connections),
                crowd.key,
            )
            budgets.refused("memory")
            for close in list(crowd.connections.values()):
                close()
        collect_all()
        give_memory_back()

    def resident_bytes(self) -> int:
        """Memory that this process holds now (proc_pid_statm(5))."""
        return int(self._statm.read().split()[1]) * PAGE_BYTES


def _weight(crowd: Crowd) -> tuple[int, int, int]:
    return crowd.answer_bytes, crowd.streams, len(crowd.connections)
