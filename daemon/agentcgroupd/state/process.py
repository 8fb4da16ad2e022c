"""Processes, told apart from later ones of the same pid."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from agentcgroupd.host.syscalls import pidfd_alive, process_stat


@dataclass(slots=True)
class Process:
    """A process that cannot be confused with a later one of the same pid."""

    pid: int
    start_ticks: int
    pidfd: int

    @classmethod
    def of_pidfd(cls, pid: int, pidfd: int) -> Process:
        """The process of a pidfd, which is taken over. Raises ProcessLookupError or
        FileNotFoundError if it has been reaped; the pidfd then stays the caller's."""
        stat = process_stat(pid)
        if not pidfd_alive(pidfd):
            raise ProcessLookupError(pid)
        return cls(pid, stat.start_ticks, pidfd)

    @classmethod
    def find(cls, pid: int, start_ticks: int) -> Process | None:
        """The process of a record, if that very one still exists."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        try:
            if process_stat(pid).start_ticks == start_ticks and pidfd_alive(pidfd):
                return cls(pid, start_ticks, pidfd)
        except (ProcessLookupError, FileNotFoundError):
            pass  # it has been reaped since: there is no such process any more
        os.close(pidfd)
        return None

    def copy(self) -> Process:
        """The same process with a pidfd of its own."""
        return Process(self.pid, self.start_ticks, os.dup(self.pidfd))

    def is_same(self, other: Process) -> bool:
        """Whether both are the same process, by whatever pidfd."""
        return (self.pid, self.start_ticks) == (other.pid, other.start_ticks)

    def signal(self, number: int) -> None:
        """Send a signal; no error if the process has ended. Raises PermissionError."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return

    def close(self) -> None:
        """Give up the pidfd."""
        os.close(self.pidfd)
