"""What a call has written to disks, from its cgroup and from its processes.

Neither tells all. The counts of a cgroup (io.stat) come when pages are written back, hold what was
swapped out as well, and know only writers that the file system tells the kernel of. Those of a
process (/proc/<pid>/io) come with the write, but go with a process that nobody waits for; its
parent takes over those of one that it waits for (kernel/exit.c: wait_task_zombie). So the larger of
the two counts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.errors import KnobError
from agentcgroupd.host.proc import parse_written, read_proc
from agentcgroupd.state.session import Call

log = logging.getLogger(__name__)

FILLED = "Stopped: a file system was nearly full"
WROTE_TOO_MUCH = "Stopped at its own limit of what it may write"
"""Beginnings of the sentences about calls that were ended for what they wrote."""

PROCESSES_MOST = 256
"""Processes of a call that are asked."""
_IO_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Written:
    """What a call has written so far."""

    by_disk: Mapping[str, int] = field(default_factory=dict)
    """Bytes by the disk's numbers, as the cgroup counts them, without disks that are swapped to."""
    unwritten_bytes: int = 0
    """What stands in memory and is still to be written."""
    by_processes: int = 0
    """The same as the processes count it, at least."""

    @property
    def total(self) -> int:
        """Bytes to all disks, at least. A device that lies on others counts with each of them, so
        the largest count of one disk stands for all."""
        counted = max(self.by_disk.values(), default=0)
        return max(counted + self.unwritten_bytes if self.by_disk else 0, self.by_processes)

    def since(self, before: Written, disk: str) -> int:
        """Bytes that came since an earlier look to a disk, or, where it is not known who wrote to
        that, to all."""
        if disk in self.by_disk:
            came = self.by_disk[disk] - before.by_disk.get(disk, 0)
            return max(0, came + self.unwritten_bytes - before.unwritten_bytes)
        return max(0, self.by_processes - before.by_processes)


def parse_unwritten(text: str) -> int:
    """Bytes of file_dirty and file_writeback in memory.stat."""
    found = 0
    for line in text.split("\n"):
        if line.startswith(("file_dirty ", "file_writeback ")):
            found += int(line.rpartition(" ")[2])
    return found


_UNWRITTEN = Knob("memory.stat", parse_unwritten)


def _by_processes(call: Call) -> int:
    """Add up what the processes of a call have written. Raises KnobError."""
    found = {}
    for pid in call.cgroup.all_procs()[:PROCESSES_MOST]:
        try:
            found[pid] = parse_written(read_proc(pid, "io", _IO_BYTES_MAX))
        except (OSError, ValueError):
            continue  # it has just ended, or this kernel does not count (TASK_IO_ACCOUNTING)
    # A pid may have been given to another process meanwhile, which is in no call.
    there = set(call.cgroup.all_procs()) if found else set()
    return sum(count for pid, count in found.items() if pid in there)


def written(call: Call, swapped_to: Collection[str] = ()) -> Written:
    """Read what a call has written so far, with all that is inside it. `swapped_to`: disks with
    swap space. Raises KnobError, or CgroupGone."""
    call.written_least = max(call.written_least, _by_processes(call))
    stat = call.cgroup.read_if(knobs.IO_STAT) or {}
    by_disk = {disk: counts.get("wbytes", 0) for disk, counts in stat.items()}
    by_disk = {disk: count for disk, count in by_disk.items() if count and disk not in swapped_to}
    unwritten = 0
    if by_disk:
        try:
            unwritten = call.cgroup.read_if(_UNWRITTEN) or 0
        except KnobError as error:
            log.debug("call %s: %s", call.id, error)
    return Written(by_disk, unwritten, call.written_least)
