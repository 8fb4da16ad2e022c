"""What follows when a process opens a GPU's device file.

A process of a tenant's counts as working, and its libcuda is found and probed. A process that was
refused is told what to ask for.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import Executor

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu.activity import Activity
from agentcgroupd.gpu.enforcement import Enforcement
from agentcgroupd.gpu.feedback import GpuFeedback
from agentcgroupd.gpu.libraries import Libraries
from agentcgroupd.gpu.state import GpuState
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.state.session import Session

log = logging.getLogger(__name__)

PROBE_DELAYS_S = (0.0, 0.05, 0.25, 1.0)
"""When a process's mappings are read, each counted from the one before: a program opens the GPU
from within libcuda as a rule, and may also map it a moment later."""


class DeviceOpens:
    """Handles opens of devices, and probes the processes that did. Used on a running loop."""

    def __init__(
        self,
        state: GpuState,
        enforcement: Enforcement,
        activity: Activity,
        feedback: GpuFeedback,
        place_of: Callable[[int], tuple[Session, str] | None],
        executor: Executor,
    ) -> None:
        """`place_of`: from a pid to its session and the name of its leaf there. `executor`: for
        reading files."""
        self._state, self._enforcement = state, enforcement
        self._activity, self._feedback = activity, feedback
        self._place_of, self._executor = place_of, executor
        self._probing: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Give up all searches that are under way."""
        for task in self._probing:
            task.cancel()

    def handle(self, batch: list[AnyEvent]) -> None:
        """Take events of the gate: devices that were opened, or kept closed."""
        for event in batch:
            if not isinstance(event, abi.GpuDeviceEvent) or not event.pid:
                continue
            if event.event.type == abi.GpuEventType.CLOSED:
                place = self._place_of(event.pid)
                if place is not None:
                    self._feedback.open_refused(*place, event)
                continue
            tenant = self._state.owner(event.pid)
            if tenant is not None:
                self._activity.set_wants(tenant, True)
                self.probe(tenant, event.pid)

    def probe(self, tenant: GpuTenant, pid: int) -> None:
        """Begin to find and probe the libcuda that a process of a tenant's has mapped."""
        libraries = self._enforcement.libraries
        if libraries is None:
            return
        task = asyncio.get_running_loop().create_task(self._probe(libraries, tenant, pid))
        self._probing.add(task)
        task.add_done_callback(self._probing.discard)

    async def _probe(self, libraries: Libraries, tenant: GpuTenant, pid: int) -> None:
        loop = asyncio.get_running_loop()
        for delay_s in PROBE_DELAYS_S:
            await asyncio.sleep(delay_s)
            if tenant.id not in self._state.tenants:
                return
            used = await loop.run_in_executor(self._executor, libraries.probe_process, pid)
            if used:
                break
        else:
            return
        if not self._activity.probes_launches(tenant) or pid in tenant.launch_links:
            return
        tenant.launch_links[pid] = -1
        try:
            tenant.launch_links[pid] = await loop.run_in_executor(
                self._executor, libraries.watch_launches, used[0], pid
            )
        except BpfError as error:
            del tenant.launch_links[pid]
            log.warning("%s: the start of its work is not told: %s", tenant.name, error)
        if tenant.id not in self._state.tenants:
            self.forget(tenant)

    @staticmethod
    def forget(tenant: GpuTenant) -> None:
        """Take away the probes on a tenant's launches."""
        links = [fd for fd in tenant.launch_links.values() if fd >= 0]
        tenant.launch_links.clear()
        if links:
            # The kernel waits for a grace period before a probe is gone.
            asyncio.get_running_loop().run_in_executor(None, _close_all, links)


def _close_all(links: list[int]) -> None:
    for fd in links:
        os.close(fd)
