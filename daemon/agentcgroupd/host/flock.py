"""Locks on files by flock(2): the kernel takes one away however its holder ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

LOCKS = Path("/proc/locks")


class Locked(Exception):
    """Somebody else has locked the file."""

    def __init__(self, pid: int | None) -> None:
        """`pid`: of the process that took the lock; None: it cannot be seen from here."""
        self.pid = pid
        super().__init__(f"locked by process {pid}" if pid else "locked by another process")


def lock(fd: int) -> None:
    """Lock an open file for this process alone. Raises Locked, or OSError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(holder(fd)) from None


def holder(fd: int, locks: Path = LOCKS) -> int | None:
    """The pid of the process that has locked the file of `fd`, as proc_locks(5) shows it; None
    where nobody has, or where it is in a pid namespace that cannot be seen from here."""
    found = os.fstat(fd)
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}".encode()
    for line in locks.read_bytes().split(b"\n"):
        words = line.split()
        # A line of a waiting process has an arrow (->) for its second word.
        if len(words) >= 6 and words[1] == b"FLOCK" and words[5] == file:
            return max(0, int(words[4])) or None
    return None
