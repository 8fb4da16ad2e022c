"""How much memory this host has."""

from __future__ import annotations

import os


def host_memory_bytes() -> int:
    """What the kernel manages of the host's memory, as MemTotal in /proc/meminfo."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
