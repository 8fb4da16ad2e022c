"""Processes of a call that are no longer in its cgroup: its main process, and what that started.

A process that may write to cgroup.procs can move itself or its children. What has left and is no
descendant of the main process any more, as a daemon is none, cannot be told from others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.host.proc import CgroupUnknown, cgroup_of, children_of
from agentcgroupd.host.syscalls import open_cgroup, pidfd_ended, process_stat
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import CALL_PREFIX, Call

DESCENDANTS_MOST = 2000
"""How many descendants of a main process are looked at."""
SEARCH_S = 0.01
"""How long they are looked for; the loop is held meanwhile."""
OUTSIDERS_MOST = 256
"""How many processes outside of a call are kept; each takes a descriptor."""


def place_outside(call: Call) -> str | None:
    """The cgroup of the main process, as /proc/<pid>/cgroup shows it, if that is not its call's or
    one below it; None: it is there, or has ended, or its place cannot be told."""
    main = call.main
    if main is None or pidfd_ended(main.pidfd):
        return None
    try:
        path = cgroup_of(main.pid)
    except (FileNotFoundError, ProcessLookupError, CgroupUnknown):
        return None
    return None if _is_inside(call, path) or pidfd_ended(main.pidfd) else path


def _is_inside(call: Call, path: str) -> bool:
    inside = call.cgroup.path.relative_to(call.session.cgroup.path)
    own = f"{call.session.cgroup_path}/{inside}"
    return path == own or path.startswith((f"{own}/", f"{own} (deleted)"))


def outside_path(call: Call, pool: Cgroup, cgroup_id: int) -> str | None:
    """The path of a cgroup below the mount, by its id, if it is not in the call; None: it is, or it
    was removed."""
    try:
        directory = open_cgroup(pool.dir_fd, cgroup_id)
    except OSError:
        return None
    try:
        path = os.readlink(f"/proc/self/fd/{directory}")
    except OSError:
        return None
    finally:
        os.close(directory)
    if Path(path).is_relative_to(call.cgroup.path):
        return None
    # The session's path is known both ways: below the mount, and in this process's own view.
    mount = str(call.session.cgroup.path).removesuffix(call.session.cgroup_path)
    return path.removeprefix(mount)


def find_outsiders(call: Call, inside: Collection[int], search_s: float = SEARCH_S) -> int:
    """Keep the descendants of the main process that are neither in the call nor in another one, so
    that they can be ended with it even when the main process has ended; those of processes that
    are kept already, too. `inside`: the processes of the call. The search ends after
    `search_s` seconds.
    Returns how many were found that had not been kept before."""
    before = len(call.outsiders)
    known = {*inside, *(process.pid for process in call.outsiders)}
    until = time.perf_counter() + search_s
    for root in [*([] if call.main is None else [call.main]), *call.outsiders]:
        if not pidfd_ended(root.pidfd):
            _find_below(call, root, known, until)
    return len(call.outsiders) - before


def _find_below(call: Call, root: Process, known: set[int], until: float) -> None:
    others = f"{call.session.cgroup_path}/{CALL_PREFIX}"
    for parent, pid in _descendants(root.pid, until):
        if pid in known:
            continue
        try:
            path = cgroup_of(pid)
        except (FileNotFoundError, ProcessLookupError, CgroupUnknown):
            continue
        if _is_inside(call, path) or path.startswith(others):
            continue
        if len(call.outsiders) >= OUTSIDERS_MOST:
            return
        process = _child(parent, pid)
        if process is not None:
            call.outsiders.append(process)
            known.add(pid)


def _descendants(pid: int, until: float) -> Iterator[tuple[int, int]]:
    """Each descendant of a process with its parent before it, those that are nearer first, until
    that time (perf_counter)."""
    waiting = [pid]
    for parent in waiting:
        for children in children_of(parent):
            for child in children:
                if len(waiting) > DESCENDANTS_MOST or time.perf_counter() >= until:
                    return
                waiting.append(child)
                yield parent, child
            # A process may have thousands of threads, and none of them a child.
            if time.perf_counter() >= until:
                return


def _child(parent: int, pid: int) -> Process | None:
    """The process `pid` if it still is a child of `parent`; None: it has ended, or is another."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        stat = process_stat(pid)
        if stat.parent_pid == parent:
            return Process(pid, stat.start_ticks, pidfd)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has been reaped since: there is no such process any more
    os.close(pidfd)
    return None
