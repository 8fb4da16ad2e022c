"""memory.reclaim, off the event loop: the write blocks for as long as the kernel reclaims."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Reclaim
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.state.session import Session

AT_ONCE = 2
"""Writes at a time: each keeps a core busy with compressing."""
STEP_BYTES = 8 << 20
"""How much is asked for at a time. The kernel does not let a cgroup go while it is being written
to, so a step has to be short: this is some 10 ms of compressing by one core."""
Swappiness = int | Literal["max"] | None
CACHE_ONLY: tuple[Swappiness, ...] = (0, None)
"""Values that take file cache and leave anonymous memory, the best first: a kernel that does not
know one refuses it. None leaves it to the kernel."""
ANON_FIRST: tuple[Swappiness, ...] = ("max", 200, None)
"""Values that take anonymous memory, which goes to swap, before the files that an agent works
on."""
_SPENT = (errno.EAGAIN, errno.ENODEV, errno.ENOENT)


@dataclass(frozen=True, slots=True)
class CacheHolder:
    """A cgroup with file cache that can be taken back."""

    cgroup: Cgroup
    cold_bytes: int
    session: Session | None = None
    """The adopted session that the cgroup is of; None: the pool."""


@dataclass(slots=True)
class Reclaimer:
    """Reclaims in threads, a few cgroups at a time; on a running loop."""

    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(AT_ONCE, "reclaim")
    )
    _running: dict[str, asyncio.Task[int]] = field(default_factory=dict)

    def start(self, key: str, work: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
        """Begin `work` in a task and return that. While a task of this key is running, that one is
        returned, and `work` is not begun."""
        running = self._running.get(key)
        if running is not None:
            work.close()
            return running
        task = asyncio.get_running_loop().create_task(work)
        self._running[key] = task
        task.add_done_callback(lambda _: self._running.pop(key, None))
        return task

    async def reclaim(
        self,
        parts: Iterable[tuple[Cgroup, int]],
        size_bytes: int,
        go_on: Callable[[Cgroup], bool],
        swappiness: tuple[Swappiness, ...] = (None,),
    ) -> int:
        """Take up to `size_bytes` from these cgroups, one after the other; returns by how many
        bytes their use fell. `parts`: each with the most to take from it. `swappiness`: the first
        of these that the kernel knows. `go_on` is asked before each cgroup, and in a thread before
        each step. Cgroups that have gone are passed over, and those that refuse. Raises KnobError
        where one has refused and nothing was got."""
        got = 0
        refused: KnobError | None = None
        for cgroup, most_bytes in parts:
            if got >= size_bytes:
                break
            if not go_on(cgroup):
                continue
            try:
                got += await self._one(cgroup, min(size_bytes - got, most_bytes), go_on, swappiness)
            except CgroupGone:
                continue
            except KnobError as error:
                refused = error
        if refused is not None and not got:
            raise refused
        return got

    async def _one(
        self,
        cgroup: Cgroup,
        size_bytes: int,
        go_on: Callable[[Cgroup], bool],
        swappiness: tuple[Swappiness, ...],
    ) -> int:
        before = cgroup.read(knobs.MEMORY_CURRENT)
        # Opened here: a directory that is closed meanwhile would be another one in the thread.
        fd = cgroup.open_file(knobs.MEMORY_RECLAIM, os.O_WRONLY)
        cancelled = False

        def steps() -> None:
            try:
                _write_steps(fd, size_bytes, lambda: not cancelled and go_on(cgroup), swappiness)
            finally:
                os.close(fd)

        done = self._threads.submit(steps)
        try:
            await asyncio.wrap_future(done)
        except OSError as error:
            file = knobs.MEMORY_RECLAIM.file
            raise KnobError(error, str(cgroup.path), file, str(size_bytes)) from None
        except asyncio.CancelledError:
            cancelled = True
            if done.cancelled():  # it had not begun
                os.close(fd)
            raise
        # One that has been given back meanwhile is closed, and cannot be asked.
        return max(0, before - cgroup.read(knobs.MEMORY_CURRENT)) if go_on(cgroup) else 0


def _write_steps(
    fd: int, size_bytes: int, go_on: Callable[[], bool], swappiness: tuple[Swappiness, ...]
) -> None:
    left, choices = size_bytes, list(swappiness)
    while left > 0 and go_on():
        step = min(left, STEP_BYTES)
        try:
            os.write(fd, knobs.MEMORY_RECLAIM.format(Reclaim(step, choices[0])).encode())
        except OSError as error:
            if error.errno == errno.EINVAL and len(choices) > 1:
                del choices[0]
                continue
            if error.errno in _SPENT:
                return
            raise
        left -= step
