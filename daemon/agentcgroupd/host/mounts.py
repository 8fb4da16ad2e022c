"""Mounts of this process's mount namespace, from /proc/self/mountinfo (proc_pid_mountinfo(5)).

The file is read as bytes and split at blanks and line feeds alone. The kernel writes those, tabs
and backslashes of a path as octal escapes; every other byte stands for itself, a carriage return
too, and need not be UTF-8.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_DEVICE, _ROOT, _POINT = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system, and where it is mounted."""

    kind: bytes
    """The type of the file system, such as b"cgroup2"."""
    root: Path
    """The directory of the file system that is seen at `point`."""
    point: Path
    options: tuple[bytes, ...]
    """Options of the file system itself (not of this mount), such as b"rw"."""
    device: bytes = b""
    """Numbers of its device, such as b"8:1"."""


def unescape(field: bytes) -> bytes:
    """A path as it is, from one with octal escapes (fs/seq_file.c: mangle_path)."""
    return _ESCAPE.sub(lambda code: bytes([int(code[1], 8) & 0xFF]), field)


def parse_mountinfo(data: bytes) -> tuple[Mount, ...]:
    """The mounts in the kernel's order. Raises ValueError for a line of another form."""
    return tuple(_parse_line(line) for line in data.split(b"\n") if line)


def _parse_line(line: bytes) -> Mount:
    # No path has a blank of its own, so the first " - " ends the optional fields.
    mount, separator, file_system = line.partition(b" - ")
    fields, tail = mount.split(b" "), file_system.split(b" ", 2)
    if not separator or len(fields) <= _POINT or len(tail) < 3:
        raise ValueError(f"not a line of mountinfo: {line!r}")
    kind, _source, options = tail
    root, point = (Path(os.fsdecode(unescape(fields[at]))) for at in (_ROOT, _POINT))
    return Mount(kind, root, point, tuple(options.split(b",")), fields[_DEVICE])


def mounts(path: str | Path = MOUNTINFO) -> tuple[Mount, ...]:
    """Every mount that this process can reach. Raises OSError."""
    return parse_mountinfo(Path(path).read_bytes())
