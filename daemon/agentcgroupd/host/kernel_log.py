"""The kernel's log, /dev/kmsg, as far as it tells which processes the OOM killer has ended
(Documentation/ABI/testing/dev-kmsg).

The counters of cgroups say how many they were, not which. A program of ours at the tracepoint
mark_victim says it as well, where the kernel takes programs.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

KMSG = "/dev/kmsg"
_RECORD_BYTES = 16_384
"""More than a record can have (kernel/printk/internal.h: PRINTK_MESSAGE_MAX); a read gives one."""
_RECORDS_MOST = 20_000
"""How many are read at a time."""
_VICTIMS_MOST = 4096
_FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""Inode of the first pid namespace (include/linux/proc_ns.h: PROC_PID_INIT_INO), whose pids the log
has."""
# mm/oom_kill.c: __oom_kill_process(); the facility is 0, which only the kernel itself can write.
_KILLED = re.compile(
    rb"([0-7]),[0-9]+,[0-9]+,[^;]*;(?:Memory cgroup out|Out) of memory[^:\n]*: "
    rb"Killed process ([0-9]+) \("
)


def parse_victim(record: bytes) -> int | None:
    """The pid of the process that a record says the OOM killer has ended; None for others."""
    match = _KILLED.match(record)
    return int(match[2]) if match else None


@dataclass(slots=True)
class OomLog:
    """Reads the kernel's log from when it was opened. A log that cannot be read tells nothing."""

    fd: int | None
    lost: bool = False
    """Whether records were overwritten before they were read."""
    _victims: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @classmethod
    def open(cls) -> OomLog:
        """Open the log at its end."""
        if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
            return cls(None)
        try:
            fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(fd, 0, os.SEEK_END)
        except OSError as error:
            log.info("%s cannot be read, so whom the OOM killer chose is not told: %s", KMSG, error)
            return cls(None)
        return cls(fd)

    def close(self) -> None:
        """Give up the log."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def chose(self, pid: int) -> bool | None:
        """Tell whether the OOM killer has ended a process since the log was opened; None: the log
        does not tell."""
        if self.fd is None:
            return None
        self._read(self.fd)
        if pid in self._victims:
            return True
        return None if self.lost else False

    def _read(self, fd: int) -> None:
        for _ in range(_RECORDS_MOST):
            try:
                victim = parse_victim(os.read(fd, _RECORD_BYTES))
            except BlockingIOError:
                return
            except BrokenPipeError:
                self.lost = True  # the next read goes on with the oldest that is there
                continue
            if victim is not None:
                self._victims[victim] = None
                self._victims.move_to_end(victim)
                if len(self._victims) > _VICTIMS_MOST:
                    self._victims.popitem(last=False)
        self.lost = True
        os.lseek(fd, 0, os.SEEK_END)
