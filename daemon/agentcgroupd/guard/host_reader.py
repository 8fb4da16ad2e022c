"""The host as the policy sees it, and the pool's limit beside what the pool has in zram.

What zram holds takes memory of the host that no cgroup is charged for. So the pool's memory.max is
lowered by it: the pool and what it has swapped out together stay within the pool's budget, also
where the guard is late.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import KnobError
from agentcgroupd.guard.host_capacity import read_host, zram_used_bytes
from agentcgroupd.policy.snapshot import Host
from agentcgroupd.sessions.pool import Pool

log = logging.getLogger(__name__)

HOST_USEC = 1_000_000
"""Swap is not read more often."""
ZRAM_USEC = 50_000
"""Nor is zram, while it holds something of the pool."""
STEP_BYTES = 4 << 20
"""The limit is not moved for less."""
SLACK_BYTES = 8 << 20
"""The limit stays so far above use: a lower one would have the kernel end a call."""


class HostReader:
    """Reads what the host can do, as often as that may change, and keeps the pool's limit."""

    def __init__(self, pool: Pool, programs: Callable[[], Host]) -> None:
        """`programs`: what the programs in the kernel can do."""
        assert pool.memory_max_bytes is not None
        self._cgroup: Cgroup = pool.cgroup
        self._budget_bytes = self._limit_bytes = pool.memory_max_bytes
        self._programs = programs
        self._read_usec: int | None = None
        self._zram_usec = 0
        self._host = Host()
        self.zram_bytes = 0
        """Memory that the pool has in zram, which no cgroup is charged for."""

    def __call__(self, now_usec: int) -> Host:
        """The host as it is now, or was a moment ago."""
        whole = self._read_usec is None or now_usec - self._read_usec >= HOST_USEC
        if whole:
            self._read_usec = now_usec
            try:
                self._host = read_host(self._programs(), self._cgroup)
            except (KnobError, OSError) as error:
                # What is not known is taken for not there: nothing is sent to swap then.
                log.error("swap cannot be read: %s", error)
                self._host = self._programs()
        if whole or (self.zram_bytes and now_usec - self._zram_usec >= ZRAM_USEC):
            self._zram_usec = now_usec
            self._follow_zram()
        return self._host

    def _follow_zram(self) -> None:
        try:
            self.zram_bytes = zram_used_bytes(self._cgroup)
            self._keep_limit()
        except (KnobError, OSError) as error:
            log.error("the pool's limit does not follow zram: %s", error)

    def _keep_limit(self) -> None:
        """Lower the pool's limit by what it has in zram. Raises KnobError."""
        wanted = self._budget_bytes - self.zram_bytes
        if wanted < self._limit_bytes:
            wanted = max(wanted, self._cgroup.read(knobs.MEMORY_CURRENT) + SLACK_BYTES)
        wanted = min(wanted, self._budget_bytes)
        is_whole = wanted == self._budget_bytes != self._limit_bytes
        if is_whole or abs(wanted - self._limit_bytes) >= STEP_BYTES:
            self._cgroup.write(knobs.MEMORY_MAX, wanted, wait=False)
            self._limit_bytes = wanted
