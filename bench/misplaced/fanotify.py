"""Holds a program at its exec until it has been moved, by a permission event of fanotify(7).

A trial of that way, for the benchmark alone: only the one program's file is marked. The event comes
before the program's arguments are known, so a rule could not decide here whether a call begins; and
whoever listens holds up every exec of what is marked for as long as it does not answer.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import sys
import threading
from pathlib import Path

FAN_CLOEXEC, FAN_NONBLOCK, FAN_CLASS_CONTENT = 1, 2, 4
FAN_MARK_ADD = 1
FAN_OPEN_EXEC_PERM = 0x40000
FAN_ALLOW = 1
EVENT = struct.Struct("=IBBHQii")
ANSWER = struct.Struct("=iI")
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def listen(program: Path) -> int:
    """Return a descriptor that tells of each exec of a program before that. Raises OSError."""
    flags = FAN_CLOEXEC | FAN_NONBLOCK | FAN_CLASS_CONTENT
    fd = _libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    mask = ctypes.c_uint64(FAN_OPEN_EXEC_PERM)
    if _libc.fanotify_mark(fd, FAN_MARK_ADD, mask, AT_FDCWD, os.fsencode(program)) < 0:
        error = ctypes.get_errno()
        os.close(fd)
        raise OSError(error, f"fanotify_mark: {program}")
    return int(fd)


class Holder:
    """Moves what executes a program into a cgroup, before it does."""

    def __init__(self, program: Path, leaf: Path) -> None:
        """Begin to listen, in a thread. Raises OSError."""
        self._fd, self.leaf = listen(program), leaf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            if not select.select([self._fd], [], [], 0.05)[0]:
                continue
            data, at = os.read(self._fd, 65536), 0
            while at < len(data):
                length, _, _, _, _, opened, pid = EVENT.unpack_from(data, at)
                at += length
                try:
                    (self.leaf / "cgroup.procs").write_text(str(pid))
                except OSError as error:
                    print(f"process {pid} stays where it is: {error}", file=sys.stderr)
                finally:
                    os.write(self._fd, ANSWER.pack(opened, FAN_ALLOW))
                    os.close(opened)

    def close(self) -> None:
        """Hold nothing any more."""
        self._stop.set()
        self._thread.join()
        os.close(self._fd)
