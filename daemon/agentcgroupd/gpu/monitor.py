"""Looks at the devices while someone has a part of one, and says what they show: in an executor,
because NVML may block; not at all while nobody has."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import BpfError, KnobError
from agentcgroupd.gpu.idle import rests
from agentcgroupd.gpu.mps import MpsUnavailable
from agentcgroupd.gpu.nvml import DeviceSample, Fault, Nvml
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.gpu.usage import BUSY_PERCENT, Accounts, Seen
from agentcgroupd.state.session import boottime_usec
from agentcgroupd.units import show_bytes

if TYPE_CHECKING:
    from agentcgroupd.gpu.service import Gpus

log = logging.getLogger(__name__)

CLIENTS_S = 5.0
"""Between looks at who is on MPS."""
FELL_OFF_THE_BUS = 79
"""XID of a GPU that is gone (NVIDIA's catalogue of XID errors)."""


class Watch:
    """On a running loop."""

    def __init__(
        self,
        gpus: Gpus,
        nvml: Nvml,
        owner: Callable[[int], GpuTenant | None],
        actions: Callable[[], Actions],
    ) -> None:
        self._gpus, self._nvml, self._actions = gpus, nvml, actions
        self._accounts = Accounts(owner)
        self._needed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._clients_at = 0.0
        self.rounds = 0

    def start(self) -> None:
        """Look from now on, when there is someone to look after."""
        loop = asyncio.get_running_loop()
        for coroutine in (self._sample_forever(), self._faults_forever()):
            task = loop.create_task(coroutine)
            task.add_done_callback(_say_end)
            self._tasks.append(task)

    async def stop(self) -> None:
        """Look no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._gpus.run(self._nvml.close)

    def wake(self) -> None:
        """Someone has a part."""
        self._needed.set()

    def gone(self, tenant: GpuTenant) -> None:
        """It has none any more."""
        links = [fd for fd in tenant.launch_links.values() if fd >= 0]
        tenant.launch_links.clear()
        if links:
            # Taking a probe away waits for a grace period.
            asyncio.get_running_loop().run_in_executor(None, _close_all, links)
        if not self._gpus.tenants:
            self._needed.clear()
            self._accounts.forget()

    async def _sample_forever(self) -> None:
        while True:
            await self._needed.wait()
            uuids = [d.uuid for d in self._gpus.ceiling.devices if not d.lost]
            samples = await self._gpus.run(self._nvml.sample, uuids)
            try:
                self._take(samples)
                await self._check_clients()
            except (BpfError, KnobError) as error:
                log.debug("GPUs: %s", error)
            await asyncio.sleep(self._gpus.config.sample / 1e6)

    async def _faults_forever(self) -> None:
        while True:
            await self._needed.wait()
            fault = await self._gpus.run(self._nvml.wait_fault)
            if fault is not None:
                self.fault(fault)

    # Samples

    def _take(self, samples: list[DeviceSample]) -> None:
        now = boottime_usec()
        self.rounds += 1
        metrics = self._actions().notices.metrics
        for sample in samples:
            index = str(self._index(sample.uuid))
            if sample.lost:
                self._lost(sample.uuid, sample.lost)
                continue
            metrics.gpu_busy.labels(index).set(sample.busy_percent)
            metrics.gpu_memory.labels(index).set(sample.memory_used_bytes)
        seen = self._accounts.take(samples, now)
        strangers = sum(len(pids) for pids in self._accounts.strangers.values())
        metrics.gpu_strangers.set(strangers)
        for tenant in list(self._gpus.tenants.values()):
            entry = seen.get(tenant.id, Seen())
            account = self._account(tenant)
            self._quota(tenant, entry, account.used_bytes, now)
            self._wanting(tenant, entry, account.launches, now)

    def _account(self, tenant: GpuTenant) -> abi.VramAccount:
        """What probes have seen of it; zeros where there are none."""
        vram = self._gpus.vram
        return abi.VramAccount() if vram is None else vram.account(tenant.cgroup.id)

    def _index(self, uuid: str) -> int:
        return next((d.index for d in self._gpus.ceiling.devices if d.uuid == uuid), -1)

    def _wanting(self, tenant: GpuTenant, entry: Seen, launches: int, now: int) -> None:
        turns = self._gpus.turns
        if turns is None or tenant.id not in turns.arbiter.tenants:
            return
        for pid in tenant.pids - tenant.launch_links.keys() - tenant.looked_at:
            # It was there before this daemon, or has mapped its libcuda late.
            tenant.looked_at.add(pid)
            self._gpus.openings.look(tenant, pid)
        launched, tenant.launches = launches != tenant.launches, launches
        if launched:
            tenant.uses(now)
        wants = turns.arbiter.tenants[tenant.id].wants
        if not wants and (launched or entry.sm_percent >= BUSY_PERCENT):
            self._gpus.want(tenant, True)
        ran = tenant.ran_usec(now) - tenant.ran_before_usec
        if wants and rests(tenant.watched, now - tenant.busy_usec, ran):
            self._gpus.want(tenant, False)

    def _quota(self, tenant: GpuTenant, entry: Seen, asked_bytes: int, now: int) -> None:
        """The last rung: what is held by the driver's account or by that of the probes, whichever
        is more. The driver's leaves managed memory out, the probes' what graphs allocate."""
        config = self._gpus.config
        own = config.context_allowance * entry.processes
        held = max(entry.memory_bytes or 0, asked_bytes)
        if max((entry.memory_bytes or 0) - own, asked_bytes) <= tenant.quota_bytes:
            tenant.over_since_usec = None
            return
        if tenant.over_since_usec is None:
            tenant.over_since_usec = now
        stops = config.over_quota == "stop" and tenant.call is not None
        then = "; it is ended if it does not give that back" if stops else ""
        self._tell_once(
            tenant, pb.FEEDBACK_CODE_GPU_MEMORY_OVER,
            f"The call holds {show_bytes(held)} of GPU memory; its quota is "
            f"{show_bytes(tenant.quota_bytes)}, and {show_bytes(own)} are allowed for the driver's "
            f"own{then}. Ask for more gpu_memory, or use smaller batches.",
            gpu_memory_bytes=held, gpu_quota_bytes=tenant.quota_bytes,
        )  # fmt: skip
        call = tenant.call
        late = now - tenant.over_since_usec >= config.over_quota_after
        if stops and late and call is not None and call.state != pb.CALL_STATE_ENDING:
            self._actions().stop(call, (
                f"It held {show_bytes(held)} of GPU memory with a quota of "
                f"{show_bytes(tenant.quota_bytes)}, and did not give it back. Ask for more "
                "gpu_memory, or use smaller batches."
            ))  # fmt: skip

    def over_quota(self, tenant: GpuTenant, event: abi.VramEvent) -> None:
        """A probe has refused, or seen, an allocation over the quota."""
        metrics = self._actions().notices.metrics
        metrics.gpu_refused.labels("refused" if event.refused else "seen").inc()
        asked, used = show_bytes(event.size_bytes), show_bytes(event.used_bytes)
        quota = show_bytes(event.quota_bytes)
        if event.refused:
            self._tell_once(
                tenant, pb.FEEDBACK_CODE_GPU_MEMORY_DENIED,
                f"{asked} of GPU memory were refused: the call holds {used} of its quota of "
                f"{quota}. Ask for more gpu_memory, or use smaller batches.",
                asked_bytes=event.size_bytes, used_bytes=event.used_bytes,
                gpu_quota_bytes=event.quota_bytes,
            )  # fmt: skip

    # What goes wrong

    def fault(self, fault: Fault) -> None:
        """The driver told an error of a device."""
        log.error("GPU %s: XID %d", fault.uuid, fault.xid)
        self._actions().notices.metrics.gpu_faults.labels(str(fault.xid)).inc()
        self._actions().notices.audit.write("gpu_fault", device=fault.uuid, xid=fault.xid)
        if fault.xid == FELL_OFF_THE_BUS:
            self._lost(fault.uuid, "it has fallen off the bus (XID 79)")
            return
        for tenant in self._on(fault.uuid):
            self._tell(
                tenant, pb.FEEDBACK_CODE_GPU_FAULT,
                f"The driver reports error XID {fault.xid} on GPU {self._index(fault.uuid)}; if it "
                "was this call's, its next CUDA call fails and a new process is needed.",
                xid=fault.xid,
            )  # fmt: skip

    def _lost(self, uuid: str, why: str) -> None:
        ceiling = self._gpus.ceiling
        if all(d.lost for d in ceiling.devices if d.uuid == uuid):
            return
        log.error("GPU %s is lost: %s", uuid, why)
        self._actions().notices.audit.write("gpu_lost", device=uuid, why=why)
        index = self._index(uuid)
        self._gpus.ceiling = replace(ceiling, devices=tuple(
            replace(d, lost=True) if d.uuid == uuid else d for d in ceiling.devices
        ))  # fmt: skip
        for tenant in self._on(uuid):
            self._tell(tenant, pb.FEEDBACK_CODE_GPU_LOST,
                       f"GPU {index} does not answer any more: {why}. What runs on it fails; begin "
                       "the call again on another device.", device=index)  # fmt: skip

    def _on(self, uuid: str) -> list[GpuTenant]:
        return [t for t in self._gpus.tenants.values() if any(d.uuid == uuid for d in t.devices)]

    def mps_ended(self) -> None:
        """MPS has ended under its clients."""
        for tenant in self._gpus.tenants.values():
            self._tell(tenant, pb.FEEDBACK_CODE_GPU_FAULT,
                       "MPS has ended, and with it what the call had on the GPU: its next CUDA "
                       "call fails and a new process is needed.")  # fmt: skip

    async def _check_clients(self) -> None:
        """Who uses a device past MPS is not held by it."""
        mps, loop = self._gpus.mps, asyncio.get_running_loop()
        if mps is None or not mps.works or loop.time() - self._clients_at < CLIENTS_S:
            return
        self._clients_at = loop.time()
        try:
            clients = await mps.clients()
        except MpsUnavailable as error:
            log.warning("%s", error)
            return
        for tenant in self._gpus.tenants.values():
            past = sorted(pid for pid in tenant.pids if pid not in clients and _exists(pid))
            if past:
                self._tell_once(
                    tenant, pb.FEEDBACK_CODE_GPU_UNSHARED,
                    f"Process {past[0]} uses the GPU past MPS, so neither its share nor a limit of "
                    "its memory is held there: leave CUDA_MPS_PIPE_DIRECTORY as it was set.",
                    pid=past[0],
                )  # fmt: skip

    def _tell_once(
        self, tenant: GpuTenant, code: pb.FeedbackCode.ValueType, sentence: str, **numbers: float
    ) -> None:
        key = pb.FeedbackCode.Name(code)
        if key not in tenant.told:
            tenant.told.add(key)
            self._tell(tenant, code, sentence, **numbers)

    def _tell(
        self, tenant: GpuTenant, code: pb.FeedbackCode.ValueType, sentence: str, **numbers: float
    ) -> None:
        call = tenant.call.id if tenant.call else ""
        feedback = pb.Feedback(code=code, sentence=sentence,
                               numbers={k: float(v) for k, v in numbers.items()})  # fmt: skip
        self._actions().notices.tell(tenant.session, call, feedback)
        tenant.feedback.append(feedback)


def _say_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("GPUs are not looked at any more", exc_info=task.exception())


def _exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def _close_all(links: list[int]) -> None:
    for fd in links:
        os.close(fd)
