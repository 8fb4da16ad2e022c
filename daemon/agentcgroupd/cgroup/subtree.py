"""Whole subtrees of cgroups, on descriptors: walked, signalled and removed without recursion.

Whoever may write to a cgroup can nest others thousands deep. So nothing here recurses or makes a
path, which would grow beyond the system's limit.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

from agentcgroupd.cgroup.knobs import CGROUP_PROCS

GONE = (errno.ENOENT, errno.ENODEV)
"""What the kernel says of a cgroup that was removed: of its directory, and of its open files."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def _child_names(directory: int) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def walk(top: int) -> Iterator[int]:
    """Yield a descriptor of `top` and of each cgroup below it, a parent before its children; each
    is closed when the next one is asked for. Raises OSError.

    There are never more than two descriptors: the way back up is the directory `..`.
    """
    here = os.dup(top)
    try:
        yield here
        waiting = [_child_names(here)]
        while waiting:
            if not waiting[-1]:
                waiting.pop()
                if waiting:
                    here = _step(here, "..")
                continue
            try:
                here = _step(here, waiting[-1].pop())
            except FileNotFoundError:
                continue  # removed meanwhile
            yield here
            waiting.append(_child_names(here))
    finally:
        os.close(here)


def walk_up(top: int) -> Iterator[int]:
    """Yield a descriptor of each cgroup below `top` and of `top`, a parent after its children; each
    is closed when the next one is asked for. Raises OSError."""
    here = os.dup(top)
    try:
        waiting = [_child_names(here)]
        while True:
            if waiting[-1]:
                try:
                    here = _step(here, waiting[-1].pop())
                except FileNotFoundError:
                    continue  # removed meanwhile
                waiting.append(_child_names(here))
                continue
            yield here
            waiting.pop()
            if not waiting:
                return
            here = _step(here, "..")
    finally:
        os.close(here)


def _step(here: int, name: str) -> int:
    """Open a directory in `here` and close `here`. Raises OSError, with `here` still open."""
    there = os.open(name, _DIRECTORY, dir_fd=here)
    os.close(here)
    return there


_RESTARTS_MOST = 100


def remove_below(top: int) -> None:
    """Remove every cgroup below `top`, however deep. Raises OSError."""
    here = os.dup(top)
    way: list[str] = []
    restarts = 0
    try:
        while True:
            try:
                name = _remove_leaves(here)
                if name is not None:
                    here = _step(here, name)
                    way.append(name)
                elif way:
                    here = _step(here, "..")
                    os.rmdir(way.pop(), dir_fd=here)
                else:
                    return
            except FileNotFoundError:
                # Somebody else has removed something on the way: begin anew at the top.
                restarts += 1
                if restarts > _RESTARTS_MOST:
                    raise
                os.close(here)
                here = os.dup(top)
                way.clear()
    finally:
        os.close(here)


def _remove_leaves(directory: int) -> str | None:
    """Remove children of a directory; returns the name of the first one that does not go, because
    it has children or processes, or None. Raises OSError."""
    for name in _child_names(directory):
        try:
            os.rmdir(name, dir_fd=directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
            return name
    return None


def pids_in(directory: int) -> list[int]:
    """List the processes of one cgroup; none if it is gone. Raises OSError.

    A threaded cgroup gives no list: the cgroup above it, its domain, has its processes in its own.
    """
    try:
        fd = os.open(CGROUP_PROCS.file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:
            return [int(line) for line in file]
    except OSError as error:
        if error.errno in (*GONE, errno.EOPNOTSUPP):
            return []
        raise


_PIDFDS_MOST = 256
"""How many processes are signalled at a time; each takes a descriptor meanwhile."""


def signal_in(directory: int, number: int) -> Iterator[int]:
    """Signal each process of one cgroup, through a pidfd and only while it is still there. Yields
    how many were signalled, part by part. Raises OSError."""
    # 0 stands for a process of another pid namespace, which the daemon cannot name.
    pids = [pid for pid in pids_in(directory) if pid]
    parts = [pids[i : i + _PIDFDS_MOST] for i in range(0, len(pids), _PIDFDS_MOST)]
    for part in parts:
        yield _signal_each(directory, part, number)


def _signal_each(directory: int, pids: list[int], number: int) -> int:
    signalled = 0
    with ExitStack() as opened:
        pidfds = {}
        for pid in pids:
            try:
                pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            opened.callback(os.close, pidfds[pid])
        # A number may have come to another process before its descriptor was opened.
        for pid in pidfds.keys() & set(pids_in(directory)):
            try:
                signal.pidfd_send_signal(pidfds[pid], number)
                signalled += 1
            except ProcessLookupError:
                continue
    return signalled
