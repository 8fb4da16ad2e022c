"""Splitting a container's cgroup before its first instruction.

A runtime that asks before it starts a container waits for the answer. Nothing of that is done on
the daemon's loop, which may be busy: what is done here is the kernel's alone, and the loop makes a
session of the split cgroup when it comes to it.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agentcgroupd.cgroup.tree import Cgroup, move_all
from agentcgroupd.errors import KnobError
from agentcgroupd.sessions.containers import agent_leaf
from agentcgroupd.sessions.pool import offered_controllers

log = logging.getLogger(__name__)

SPLIT_S = 0.4
"""How long a runtime is kept waiting at most. NRI drops a plugin that takes 2 s."""
PROCESSES_MOST = 64
"""A container that has not started has one process; one with more than these has."""


class Splitter:
    """Splits cgroups in threads, and is waited for no longer than SPLIT_S."""

    def __init__(self, mount: Path) -> None:
        """`mount`: where cgroup2 is mounted."""
        self._mount = mount
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="split")

    def split(self, path: str) -> str:
        """Move the processes of a cgroup into its agent leaf, and give its controllers on. `path`:
        below the mount. Returns a clause where it could not be done; nothing else is touched."""
        done = self._threads.submit(self._split, path)
        try:
            return done.result(SPLIT_S)
        except TimeoutError:
            done.cancel()  # not later, when the path may be another container's
            return f"it took more than {SPLIT_S:g} s"

    def _split(self, path: str) -> str:
        try:
            cgroup = Cgroup.open(self._mount / path.strip("/"))
        except OSError as error:
            return f"there is no cgroup {path}: {error.strerror}"
        try:
            agent = agent_leaf(cgroup)
            move_all(cgroup, agent, most=PROCESSES_MOST)
            cgroup.enable(offered_controllers(cgroup))
        except KnobError as error:
            return str(error)
        finally:
            cgroup.close()
        return ""

    def close(self) -> None:
        """Begin nothing more; what is under way goes on."""
        self._threads.shutdown(wait=False, cancel_futures=True)
