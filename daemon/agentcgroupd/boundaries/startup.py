"""What a shell's startup files have it start, as far as /proc tells it: for processes whose exec
event was lost, which has it from the kernel (is_at_startup() in bpf/lifecycle.bpf.c says why)."""

from __future__ import annotations

import signal

from agentcgroupd.boundaries.processes import TICK_NS
from agentcgroupd.host.proc import ignores
from agentcgroupd.host.syscalls import ProcessStat, process_stat

STARTUP_TICKS = 10_000_000_000 // TICK_NS
STARTUP_DEPTH = 4


def is_at_startup(pid: int) -> bool:
    """Whether a process that ignores no stop of the terminal has been started by a shell which
    does, in the same process group and soon after that shell's own start. Raises FileNotFoundError
    or ProcessLookupError when it has ended."""
    own = process_stat(pid)
    if not own.terminal or ignores(pid, signal.SIGTSTP):
        return False
    try:
        return _is_below_young_shell(own)
    except (FileNotFoundError, ProcessLookupError):
        return False  # a parent of it has ended


def _is_below_young_shell(own: ProcessStat) -> bool:
    parent = own.parent_pid
    for _ in range(STARTUP_DEPTH):
        if not parent:
            break
        found = process_stat(parent)
        if found.group != own.group:
            break
        if ignores(parent, signal.SIGTSTP):
            return own.start_ticks - found.start_ticks < STARTUP_TICKS
        parent = found.parent_pid
    return False
