"""PSI triggers: a callback when tasks of a cgroup have stalled for too long.

The kernel counts the stalls itself and wakes the daemon at most once in each window
(Documentation/accounting/psi.rst: Monitoring for pressure thresholds).
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections.abc import Callable
from typing import Literal

from agentcgroupd.cgroup.knobs import MEMORY_PRESSURE, Knob, Pressure
from agentcgroupd.cgroup.tree import Cgroup

log = logging.getLogger(__name__)

Kind = Literal["some", "full"]


class PressureTrigger:
    """A trigger of a cgroup, which calls `on_fire` on the event loop that `start` ran on.

    The asyncio loop cannot wait for POLLPRI, so the file is in an epoll of its own, whose
    descriptor the loop waits for.
    """

    def __init__(
        self,
        cgroup: Cgroup,
        kind: Kind,
        stall_usec: int,
        window_usec: int,
        on_fire: Callable[[], None],
        knob: Knob[dict[str, Pressure]] = MEMORY_PRESSURE,
    ) -> None:
        """Describe a trigger, without opening anything yet. It fires when some task, or (`full`)
        every task that could run, stalled for `stall_usec` within `window_usec` (at most 10 s)."""
        self._cgroup = cgroup
        self._knob = knob
        self._text = f"{kind} {stall_usec} {window_usec}"
        self._on_fire = on_fire
        self._fd = -1
        self._epoll: select.epoll | None = None
        self.fired = 0

    def start(self) -> None:
        """Have the kernel watch from now on.

        Raises CgroupGone, or KnobError: ENOENT or EOPNOTSUPP without PSI (psi=0), EINVAL for a
        window that this kernel does not take (below 500 ms before Linux 6.5, 519fabc7aaba; without
        CAP_SYS_RESOURCE any but a multiple of 2 s), EACCES where the file may not be written.
        """
        assert self._epoll is None, "the trigger is started already"
        # The trigger lives as long as the descriptor through which it was written.
        self._fd = self._cgroup.open_file(self._knob, os.O_RDWR | os.O_NONBLOCK, self._text)
        self._epoll = select.epoll()
        self._epoll.register(self._fd, select.EPOLLPRI)
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._ready)

    def stop(self) -> None:
        """End the callbacks; no error if the trigger is not started."""
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _ready(self) -> None:
        """Tell a firing from the cgroup's end.

        The loop has polled the inner epoll, and that poll took the event from the file
        (kernel/sched/psi.c: psi_trigger_poll). So being called means that the trigger fired, unless
        the file is in error, which a second poll still shows.
        """
        assert self._epoll is not None
        if any(events & select.EPOLLERR for _, events in self._epoll.poll(0)):
            log.debug("%s is gone, and its pressure trigger with it", self._cgroup.path)
            self.stop()
            return
        self.fired += 1
        self._on_fire()
