"""The opposite of a split: an adopted cgroup holds its processes itself again.

Its agent may have made cgroups of its own meanwhile, at any depth, with controllers enabled in them
and all its processes there. The kernel turns a controller off only where no child gives it on, and
takes processes only where none is given on.
"""

from __future__ import annotations

import errno
import logging
import os

from agentcgroupd.cgroup.knobs import CGROUP_SUBTREE_CONTROL
from agentcgroupd.cgroup.subtree import GONE, walk_up
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import CgroupGone, KnobError

log = logging.getLogger(__name__)

CONTROLLER_TRIES = 8
"""How often controllers are turned off below a cgroup while somebody turns them on."""
MOVE_TRIES = 100
"""How often the processes below a cgroup are moved while they fork."""


def merge(cgroup: Cgroup, leaf: str) -> None:
    """Turn off all controllers in `cgroup` and below it, move the processes of its child `leaf` and
    of all below that into it, and remove these. It may have been done in part. Raises KnobError,
    with the processes that were moved left there."""
    _disable_all(cgroup)
    if leaf in set(cgroup.children()):
        child = cgroup.child(leaf)
        _gather(child, cgroup)
        child.remove()


def _disable_all(cgroup: Cgroup) -> None:
    for left in range(CONTROLLER_TRIES - 1, -1, -1):
        try:
            top = os.open(cgroup.proc_path(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for directory in walk_up(top):
                    _disable(directory)
                return
            finally:
                os.close(top)
        except OSError as error:
            if error.errno != errno.EBUSY or not left:
                file = CGROUP_SUBTREE_CONTROL.file
                kind = CgroupGone if error.errno in GONE and not cgroup.exists() else KnobError
                raise kind(error, str(cgroup.path), file) from None


def _disable(directory: int) -> None:
    """Turn off all controllers of one cgroup; nothing if it is gone. Raises OSError (EBUSY: one
    below it gives them on)."""
    try:
        fd = os.open(CGROUP_SUBTREE_CONTROL.file, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        if error.errno in GONE:
            return
        raise
    try:
        for name in os.read(fd, 4096).split():
            os.write(fd, b"-" + name)
    except OSError as error:
        if error.errno not in GONE:
            raise
    finally:
        os.close(fd)


def _gather(source: Cgroup, target: Cgroup) -> None:
    """Move every process of `source` and below it into `target`. Raises KnobError (EBUSY) if there
    still are some after many tries."""
    for _ in range(MOVE_TRIES):
        # Where it was made threaded, `target` is the domain that lists its processes.
        pids = source.all_procs()
        if not pids and source.populated():
            pids = list(target.procs())
        if not pids:
            return
        for pid in pids:
            try:
                target.attach(pid)
            except CgroupGone:
                raise
            except KnobError as error:
                if error.errno != errno.ESRCH:  # it has ended
                    raise
    raise KnobError(OSError(errno.EBUSY, "still has processes"), str(source.path), "cgroup.procs")
