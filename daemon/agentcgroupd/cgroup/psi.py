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
    """Calls `on_fire` on the event loop; `start` and `stop` on a running one.

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
        """Fires when some task, or (`full`) all that could run, stalled for `stall_usec` within
        `window_usec`, at most 10 s. Nothing is opened yet."""
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
        CAP_SYS_RESOURCE other than a multiple of 2 s), EACCES where it may not be written.
        """
        assert self._epoll is None, "it is started already"
        # The trigger lives as long as the descriptor through which it was written.
        self._fd = self._cgroup.open_file(self._knob, os.O_RDWR | os.O_NONBLOCK, self._text)
        self._epoll = select.epoll()
        self._epoll.register(self._fd, select.EPOLLPRI)
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._ready)

    def stop(self) -> None:
        """No more callbacks; no error if it is not started."""
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _ready(self) -> None:
        """The loop's own look at the inner epoll has taken the event from the file
        (kernel/sched/psi.c: psi_trigger_poll), so being called at all means that it fired; only an
        error, which stays, can still be seen here."""
        assert self._epoll is not None
        if any(events & select.EPOLLERR for _, events in self._epoll.poll(0)):
            log.debug("%s is gone, and its pressure trigger", self._cgroup.path)
            self.stop()
            return
        self.fired += 1
        self._on_fire()
