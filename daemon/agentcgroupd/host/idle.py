"""How much of this machine's CPUs is idle, from the kernel's own count in /proc/stat."""

from __future__ import annotations

import os
import time

from agentcgroupd.host.kept_file import KeptFile

STAT = "/proc/stat"
WINDOW_S = 0.25
"""The kernel counts in ticks of its clock: over less than this, the count says little."""
IDLE, IOWAIT = 4, 5
"""Columns of a line `cpu<n>` (proc_stat(5))."""


class IdleCpus:
    """Compares two readings of the idle time of the CPUs that this process may use."""

    def __init__(self) -> None:
        self._stat = KeptFile(STAT)
        self._before = self._now = self._read()

    def sample(self) -> None:
        """Take a reading; to be called about twice a second."""
        self._before, self._now = self._now, self._read()

    def millicores(self) -> int:
        """Thousandths of a core that were idle lately."""
        now = self._read()
        before = self._now if now[0] - self._now[0] >= WINDOW_S else self._before
        passed_s = now[0] - before[0]
        cpus = len(os.sched_getaffinity(0))
        if passed_s <= 0:
            return cpus * 1000
        idle = (now[1] - before[1]) / os.sysconf("SC_CLK_TCK") / passed_s
        return round(max(0.0, min(float(cpus), idle)) * 1000)

    def _read(self) -> tuple[float, int]:
        """The time, and the ticks for which the CPUs that this process may use have been idle since
        boot."""
        mine = os.sched_getaffinity(0)
        ticks = 0
        for line in self._stat.read().decode("ascii").rstrip("\n").split("\n"):
            name, *columns = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in mine:
                ticks += int(columns[IDLE - 1]) + int(columns[IOWAIT - 1])
        return time.monotonic(), ticks
