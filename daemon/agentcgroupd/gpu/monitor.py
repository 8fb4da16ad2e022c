"""Samples devices while someone has a part of one: gauges, use by tenant, memory over the quota.

NVML may block, so it is asked in an executor; while nobody has a part it is not asked at all.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from concurrent.futures import Executor

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.abi import VramAccount
from agentcgroupd.config import GpuConfig
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import BpfError, KnobError
from agentcgroupd.gpu.activity import Activity
from agentcgroupd.gpu.device_opens import DeviceOpens
from agentcgroupd.gpu.feedback import GpuFeedback
from agentcgroupd.gpu.idle import is_idle
from agentcgroupd.gpu.mps import Mps, MpsUnavailable
from agentcgroupd.gpu.nvml import DeviceSample, Nvml
from agentcgroupd.gpu.state import GpuState
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.gpu.usage import RoundUsage, UsageTracker
from agentcgroupd.state.session import boottime_usec
from agentcgroupd.units import show_bytes

log = logging.getLogger(__name__)

CLIENTS_INTERVAL_S = 5.0
"""Between two questions to MPS who its clients are."""


class Monitor:
    """Asks NVML and MPS, and acts on what they show. Used on a running loop."""

    def __init__(
        self,
        config: GpuConfig,
        nvml: Nvml,
        mps: Mps | None,
        state: GpuState,
        activity: Activity,
        feedback: GpuFeedback,
        device_opens: DeviceOpens,
        actions: Actions,
        executor: Executor,
    ) -> None:
        self._config, self._nvml, self._mps = config, nvml, mps
        self._state, self._activity, self._feedback = state, activity, feedback
        self._device_opens, self._actions, self._executor = device_opens, actions, executor
        self._usage = UsageTracker(state.owner)
        self._needed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._clients_at = 0.0
        self.rounds = 0

    def start(self) -> None:
        """Begin to sample and to wait for faults, whenever there is a tenant."""
        loop = asyncio.get_running_loop()
        for coroutine in (self._sample_forever(), self._faults_forever()):
            task = loop.create_task(coroutine)
            task.add_done_callback(_say_end)
            self._tasks.append(task)

    async def stop(self) -> None:
        """End sampling and close NVML."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._nvml.close)

    def wake(self) -> None:
        """Go on sampling: there is a tenant."""
        self._needed.set()

    def pause(self) -> None:
        """Stop sampling until there is a tenant again; nothing is known of devices till then."""
        self._needed.clear()
        self._usage.forget()
        for device in self._state.devices:
            self._set_gauges(DeviceSample(device.uuid))

    async def _sample_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._needed.wait()
            uuids = [device.uuid for device in self._state.devices if not device.lost]
            samples = await loop.run_in_executor(self._executor, self._nvml.sample, uuids)
            if not self._needed.is_set():
                continue  # the last tenant has gone meanwhile
            try:
                self._take(samples)
                await self._check_mps_clients()
            except (BpfError, KnobError) as error:
                log.debug("GPUs: %s", error)
            await asyncio.sleep(self._config.sample / 1e6)

    async def _faults_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._needed.wait()
            fault = await loop.run_in_executor(self._executor, self._nvml.wait_fault)
            if fault is not None:
                self._feedback.fault(fault)

    # Samples

    def _take(self, samples: list[DeviceSample]) -> None:
        """Act on a round of samples. Raises BpfError or KnobError."""
        now = boottime_usec()
        self.rounds += 1
        for sample in samples:
            if sample.lost:
                self._feedback.device_lost(sample.uuid, sample.lost)
            else:
                self._set_gauges(sample)
        usages = self._usage.take(samples, now)
        strangers = sum(len(pids) for pids in self._usage.strangers.values())
        self._actions.notices.metrics.gpu_strangers.set(strangers)
        for tenant in list(self._state.tenants.values()):
            usage = usages.get(tenant.id, RoundUsage())
            account = self._activity.account(tenant)
            self._check_quota(tenant, usage, account, now)
            self._update_wants(tenant, usage, account, now)

    def _set_gauges(self, sample: DeviceSample) -> None:
        """Show a sample's numbers, NaN for those that it has not; none of a lost device."""
        device = self._state.device(sample.uuid)
        if device.lost:
            return
        metrics, index = self._actions.notices.metrics, str(device.index)
        metrics.gpu_busy.labels(index).set(_or_nan(sample.busy_percent) / 100)
        metrics.gpu_memory.labels(index).set(_or_nan(sample.memory_used_bytes))

    def _update_wants(
        self, tenant: GpuTenant, usage: RoundUsage, account: VramAccount | None, now: int
    ) -> None:
        """Find out whether a time-sliced tenant has begun or stopped to work."""
        if self._activity.wants(tenant) is None:
            return
        for pid in tenant.pids - tenant.launch_links.keys() - tenant.searched_pids:
            # Older than this daemon, or it has mapped its libcuda late.
            tenant.searched_pids.add(pid)
            self._device_opens.probe(tenant, pid)
        launched = account is not None and account.launches != tenant.launches
        if account is not None and launched:
            tenant.launches = account.launches
            tenant.note_use(now)
        if not self._activity.wants(tenant):
            if launched or usage.busy:
                self._activity.set_wants(tenant, True)
            return
        quiet_usec = now - tenant.busy_usec
        ran_usec = tenant.ran_usec(now) - tenant.ran_before_usec
        if is_idle(tenant.watched, quiet_usec, ran_usec):
            self._activity.set_wants(tenant, False)

    def _check_quota(
        self, tenant: GpuTenant, usage: RoundUsage, account: VramAccount | None, now: int
    ) -> None:
        """Tell a tenant that holds more than its quota, and end it if it keeps that.

        The larger of two accounts counts: the driver's leaves out managed memory, that of the
        probes leaves out what graphs allocate. Where one is not to be had the other decides.
        """
        quota_bytes = tenant.quota_bytes
        driver_bytes = usage.memory_bytes or 0
        probed_bytes = 0 if account is None else account.used_bytes
        allowance_bytes = self._config.context_allowance * usage.processes
        if max(driver_bytes - allowance_bytes, probed_bytes) <= quota_bytes:
            tenant.over_since_usec = None
            return
        if tenant.over_since_usec is None:
            tenant.over_since_usec = now
        held_bytes = max(driver_bytes, probed_bytes)
        held, quota = show_bytes(held_bytes), show_bytes(quota_bytes)
        call = tenant.call
        stops = self._config.over_quota == "stop" and call is not None
        threat = "; it is ended if it does not give that back" if stops else ""
        self._feedback.tell_once(
            tenant,
            pb.FEEDBACK_CODE_GPU_MEMORY_OVER,
            f"The call holds {held} of GPU memory; its quota is {quota}, and "
            f"{show_bytes(allowance_bytes)} are allowed for the driver's own{threat}. Ask for more "
            "gpu_memory, or use smaller batches.",
            gpu_memory_bytes=held_bytes,
            gpu_quota_bytes=quota_bytes,
        )
        if not stops or call is None or call.state == pb.CALL_STATE_ENDING:
            return
        if now - tenant.over_since_usec >= self._config.over_quota_after:
            why = (
                f"It held {held} of GPU memory with a quota of {quota}, and did not give it back. "
                "Ask for more gpu_memory, or use smaller batches."
            )
            self._actions.kill(call, why)

    async def _check_mps_clients(self) -> None:
        """Tell tenants that use a device past MPS: neither share nor memory is held there."""
        mps, now = self._mps, asyncio.get_running_loop().time()
        if mps is None or not mps.works or now - self._clients_at < CLIENTS_INTERVAL_S:
            return
        self._clients_at = now
        try:
            clients = await mps.clients()
        except MpsUnavailable as error:
            log.warning("%s", error)
            return
        for tenant in self._state.tenants.values():
            past = sorted(pid for pid in tenant.pids - clients if _exists(pid))
            if past:
                sentence = (
                    f"Process {past[0]} uses the GPU past MPS, so neither its share nor a limit of "
                    "its memory is held there: leave CUDA_MPS_PIPE_DIRECTORY as it was set."
                )
                code = pb.FEEDBACK_CODE_GPU_UNSHARED
                self._feedback.tell_once(tenant, code, sentence, pid=past[0])


def _say_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("GPUs are not sampled any more", exc_info=task.exception())


def _or_nan(number: int | None) -> float:
    """What a gauge shows where a number is not known."""
    return math.nan if number is None else number


def _exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
