"""What follows when a process opens a GPU's device file: its libcuda is probed, and its launches
where turns depend on them; or it was refused, and is told what to ask for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.sessions.registry import Sessions

if TYPE_CHECKING:
    from agentcgroupd.gpu.service import Gpus

log = logging.getLogger(__name__)

LOOK_AGAIN_S = (0.0, 0.05, 0.25, 1.0)
"""After a process has opened a GPU: its libcuda may be mapped by now, or a moment later."""


class Openings:
    """On a running loop."""

    def __init__(
        self, gpus: Gpus, sessions: Callable[[], Sessions], actions: Callable[[], Actions]
    ) -> None:
        self._gpus, self._sessions, self._actions = gpus, sessions, actions
        self._probing: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Look at nothing more."""
        for task in self._probing:
            task.cancel()

    def events(self, batch: list[AnyEvent]) -> None:
        """Devices were opened, or refused."""
        for event in batch:
            if not isinstance(event, abi.GpuDeviceEvent) or not event.pid:
                continue
            if event.event.type == abi.GpuEventType.CLOSED:
                self._refused(event)
                continue
            tenant = self._gpus.owner(event.pid)
            if tenant is not None:
                self._gpus.want(tenant, True)
                self.look(tenant, event.pid)

    def look(self, tenant: GpuTenant, pid: int) -> None:
        """Find and probe what a process of a tenant's has mapped."""
        task = asyncio.get_running_loop().create_task(self._probe(tenant, pid))
        self._probing.add(task)
        task.add_done_callback(self._probing.discard)

    def _refused(self, event: abi.GpuDeviceEvent) -> None:
        place = self._sessions().place_of(event.pid)
        if place is None:
            return
        session, leaf = place
        call = session.calls.get(leaf.removeprefix("call-"))
        comm = event.comm.decode("utf-8", "replace")
        granted = call is not None and call.grant.gpu_percent is not None
        how = "another GPU than it was granted" if granted else "a GPU, which needs a grant"
        ask = "ask for it with gpu_device." if granted else 'begin the call with gpu="10%".'
        self._actions().notices.tell(session, call.id if call else "", pb.Feedback(
            code=pb.FEEDBACK_CODE_GPU_CLOSED, sentence=f"{comm} tried to open {how}: {ask}",
            numbers={"major": float(event.major), "minor": float(event.minor)},
        ))  # fmt: skip

    async def _probe(self, tenant: GpuTenant, pid: int) -> None:
        if self._gpus.libraries is None or self._gpus.vram is None:
            return
        for pause_s in LOOK_AGAIN_S:
            await asyncio.sleep(pause_s)
            if tenant.id not in self._gpus.tenants:
                return
            used = await self._gpus.run(self._gpus.libraries.probe_process, pid)
            if used:
                break
        else:
            return
        arbiter = self._gpus.turns.arbiter.tenants.get(tenant.id) if self._gpus.turns else None
        watch = self._gpus.config.watch_launches
        if arbiter is None or watch == "off" or (watch == "important" and not arbiter.important):
            return
        if self._gpus.watch is not None and pid not in tenant.launch_links:
            tenant.launch_links[pid] = -1
            try:
                tenant.launch_links[pid] = await self._gpus.run(
                    self._gpus.libraries.watch_launches, used[0], pid
                )
            except BpfError as error:
                del tenant.launch_links[pid]
                log.warning("%s: the start of its work is not told: %s", tenant.name, error)
            if tenant.id not in self._gpus.tenants:
                self._gpus.watch.gone(tenant)
