"""File locks that somebody waits for, from /proc/locks (proc_locks(5), fs/locks.c).

Locks of open file descriptions (F_OFD_SETLK) name no holder, and leases and locks of processes
that are not visible from here none either: of these nothing is told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

LOCKS = Path("/proc/locks")

_LINE = re.compile(
    r"\d+: (?P<waits>(?: *-> )?) *(?P<kind>\w+) +\w+ +\w+ +(?P<pid>-?\d+) ", re.ASCII
)
_KINDS = ("FLOCK", "POSIX")


@dataclass(slots=True)
class Contested:
    """A lock that somebody waits for: pids of who holds it and of who waits."""

    holder: int
    waiters: list[int] = field(default_factory=list)


def parse_locks(text: str) -> list[Contested]:
    """List the locks of visible processes that others wait for. The lines of those who wait follow
    the line of the lock that they wait for."""
    found: list[Contested] = []
    current: Contested | None = None
    for line in text.split("\n"):
        match = _LINE.match(line)
        if match is None:
            continue
        pid = int(match["pid"])
        if not match["waits"]:
            known = match["kind"] in _KINDS and pid > 0
            current = Contested(pid) if known else None
        elif current is not None and pid > 0:
            if not current.waiters:
                found.append(current)
            current.waiters.append(pid)
    return found


def contested() -> list[Contested]:
    """Read which locks somebody waits for now. Raises OSError."""
    return parse_locks(LOCKS.read_text(encoding="ascii"))
