"""GPU sharing as the daemon uses it: finds the devices, and follows sessions and calls with a part.

A host without GPUs or without a driver works all the same: whoever asks for a part is told why
there is none. What holds a quota or a share is chosen at the start, the strongest that can be had,
and named in the log, by `agentcg doctor` and in every report.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.config import GpuConfig
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu.activity import Activity
from agentcgroupd.gpu.device_opens import DeviceOpens
from agentcgroupd.gpu.enforcement import Enforcement, GpuSources
from agentcgroupd.gpu.feedback import GpuFeedback
from agentcgroupd.gpu.monitor import Monitor
from agentcgroupd.gpu.nvml import DeviceInfo, Nvml, NvmlUnavailable
from agentcgroupd.gpu.placement import Grants
from agentcgroupd.gpu.resource import GpuResource
from agentcgroupd.gpu.state import GpuState
from agentcgroupd.gpu.tenant import GpuTenant, session_tenant_id
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.intents.gpu import Device, GpuCeiling
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.session import Call, Session, boottime_usec
from agentcgroupd.units import CgroupId, show_bytes

log = logging.getLogger(__name__)

THREADS = 3
"""Samples, waiting for faults, and reading of mapped files may each block one."""
THREAD_SWITCH_S = 0.0005
"""A thread that has the interpreter keeps it for 5 ms by default: too long for a loop that gives
the GPU to an important call while another thread asks NVML."""


class Gpus:
    """Shares the GPUs of this host. Made on a running loop, after the sessions' registry and before
    sessions are found again."""

    def __init__(
        self,
        config: GpuConfig,
        run_dir: Path,
        sessions: Sessions,
        actions: Actions,
        objects: Path | None = None,
        programs: bool = True,
        sources: GpuSources | None = None,
    ) -> None:
        """Touch nothing yet. `objects`: where compiled BPF programs are, None: the daemon's
        own; `programs`: whether any may be loaded into the kernel (bpf.enabled)."""
        self._config, self._run_dir, self._actions = config, run_dir, actions
        self._sources = sources or GpuSources()
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="gpu")
        self._state = GpuState(sessions.place_of)
        self._enforcement = Enforcement(config, objects, programs, self._sources)
        self._feedback = GpuFeedback(self._state, actions.notices)
        self._activity = Activity(config.watch_launches, self._enforcement)
        self._device_opens = DeviceOpens(
            self._state,
            self._enforcement,
            self._activity,
            self._feedback,
            sessions.place_of,
            self._executor,
        )
        self._monitor: Monitor | None = None
        self.resource = GpuResource(
            lambda: self._state.devices,
            self._state.holdings,
            config.wait,
            self._enforcement.environment,
        )
        self.grants = Grants(self._state, self.resource, self._enforcement, self._activity)

    @property
    def ceiling(self) -> GpuCeiling:
        """What calls may ask for; without devices, why there are none."""
        return self._state.ceiling

    @property
    def tenants(self) -> Mapping[str, GpuTenant]:
        """Calls and sessions that have a part, by id."""
        return self._state.tenants

    # Starting and stopping

    async def start(self, pool: Cgroup) -> None:
        """Close the gate, find the devices, choose what holds quotas and shares. Never raises for
        what a host lacks."""
        if not self._config.enabled:
            return
        enforcement = self._enforcement
        enforcement.close_gate(pool)
        nvml = await self._find_devices()
        if nvml is not None:
            sys.setswitchinterval(THREAD_SWITCH_S)
            enforcement.load_probes()
            await enforcement.choose_sharing(
                self._state.devices, self._run_dir, self._state.tenants, self._feedback.mps_ended
            )
            self._start_monitor(nvml)
            log.info(
                "GPU memory is held by %s, shares by %s",
                enforcement.memory_held_by,
                enforcement.share_held_by,
            )
        self._listen()

    async def _find_devices(self) -> Nvml | None:
        """Set what there is to ask for; returns NVML, or None where nothing can be granted."""
        loop = asyncio.get_running_loop()
        try:
            nvml = await loop.run_in_executor(self._executor, self._sources.nvml)
            infos = await loop.run_in_executor(self._executor, nvml.devices)
        except NvmlUnavailable as error:
            self._state.ceiling = GpuCeiling(why_none=str(error))
            log.info("no GPUs for calls: %s", error, extra=DETAIL)
            return None
        devices = tuple(self._grantable(info) for info in infos if not info.mig)
        why_none = "its owner has split every GPU (MIG)" if infos else "the driver has no device"
        self._state.ceiling = GpuCeiling(devices, why_none)
        if not devices:
            nvml.close()
            return None
        for device in devices:
            memory = show_bytes(device.memory_bytes)
            log.info("GPU %d: %s, %s to grant, %s", device.index, device.name, memory, device.uuid)
        return nvml

    def _grantable(self, info: DeviceInfo) -> Device:
        """A device less the memory that is granted to nobody."""
        memory_bytes = max(0, info.memory_bytes - self._config.reserve)
        return Device(info.index, info.uuid, info.minor, info.name, memory_bytes)

    def _start_monitor(self, nvml: Nvml) -> None:
        self._monitor = Monitor(
            self._config,
            nvml,
            self._enforcement.mps,
            self._state,
            self._activity,
            self._feedback,
            self._device_opens,
            self._actions,
            self._executor,
        )
        self._monitor.start()

    def _listen(self) -> None:
        """Take events of the gate and of the probes."""
        gate, vram = self._enforcement.gate, self._enforcement.vram
        try:
            if gate is not None:
                gate.start(self._device_opens.handle)
            if vram is not None:
                vram.start(self._handle_memory_events)
        except BpfError as error:
            log.error("opens of GPUs and use of their memory are not told: %s", error)

    def let_go(self) -> None:
        """Hold nobody back any more; may be called again."""
        self._enforcement.release()

    async def stop(self) -> None:
        """Let go: nobody is held back, the gate stays closed, calls go on."""
        self.let_go()
        self._device_opens.stop()
        if self._monitor is not None:
            await self._monitor.stop()
        await self._enforcement.close(leave_mps=bool(self.tenants))
        self._executor.shutdown(wait=True, cancel_futures=True)

    # Sessions and calls

    def session_opened(self, session: Session) -> None:
        """Give a session's agent its own part, now that its cgroup is there. It is never held back
        by time slices: a paused agent could not even hear why. Raises BpfError."""
        limits = session.limits
        if limits.gpu_percent is not None:
            memory_bytes = limits.gpu_memory_bytes or 0
            environment = self._enforcement.environment(
                limits.gpu_percent, memory_bytes, limits.gpu_devices
            )
            session.environment = tuple(environment)
            tenant = GpuTenant(
                id=session_tenant_id(session),
                session=session,
                call=None,
                cgroup=session.agent,
                devices=self._granted(limits.gpu_devices),
                percent=limits.gpu_percent,
                memory_bytes=memory_bytes,
                priority=limits.gpu_priority or 0,
                since_usec=boottime_usec(),
            )
            self._add(tenant)
        self._enforcement.session_opened(session)

    def session_closed(self, session: Session) -> None:
        """Take a session's own part back; its cgroup is gone, or given back."""
        self._remove(session_tenant_id(session))
        self._enforcement.session_closed(session)

    def call_opened(self, call: Call) -> None:
        """Give a call the part that it was granted; its cgroup is empty or, after a restart of the
        daemon, has processes. A call inside another one uses that one's part: gate, quota and time
        slices hold for all that is below its cgroup. Raises BpfError."""
        grant = call.grant
        if grant.gpu_percent is None or call.id in self.tenants or call.parent is not None:
            return
        tenant = GpuTenant(
            id=call.id,
            session=call.session,
            call=call,
            cgroup=call.cgroup,
            devices=self._granted(grant.gpu_devices),
            percent=grant.gpu_percent,
            memory_bytes=grant.gpu_memory_bytes or 0,
            priority=grant.gpu_priority or 0,
            since_usec=boottime_usec(),
        )
        self._add(tenant)

    def _granted(self, uuids: tuple[str, ...]) -> tuple[Device, ...]:
        """Devices by UUID; those that are not there any more are left out."""
        known = {device.uuid: device for device in self._state.devices}
        for uuid in uuids:
            if uuid not in known:
                log.error("GPU %s was granted, and is not there any more", uuid)
        return tuple(known[uuid] for uuid in uuids if uuid in known)

    def _add(self, tenant: GpuTenant) -> None:
        self._state.tenants[tenant.id] = tenant
        try:
            self._activity.set_quota(tenant)
            self._enforcement.admit(tenant)
        except BpfError:
            self._remove(tenant.id)
            raise
        if self._enforcement.time_slicing is not None and tenant.call is not None:
            self._enforcement.time_slicing.add(tenant)
        if self._monitor is not None:
            self._monitor.wake()

    def call_ending(self, call: Call) -> None:
        """Note what a call used of GPUs, for its report; the call's cgroup is empty by now. Raises
        BpfError."""
        tenant = self.tenants.get(call.id)
        if tenant is None:
            return
        account = self._activity.account(tenant)
        probed_peak = account.peak_bytes if account is not None else 0
        peaks = [peak for peak in (tenant.memory_peak_bytes, probed_peak) if peak]
        call.gpu_feedback = tuple(tenant.feedback)
        call.gpu_usage = pb.GpuUsage(
            memory_peak_bytes=max(peaks, default=None),
            sm_percent=tenant.sm_sum / tenant.sm_usec if tenant.sm_usec else None,
            energy_mj=int(tenant.energy_mj) if tenant.energy_known else None,
            held_back_usec=tenant.held_back_usec(boottime_usec()),
            refused=account.refused if account is not None else 0,
            memory_held_by=self._enforcement.memory_held_by,
            share_held_by=self._enforcement.share_held_by,
        )

    def call_closed(self, call: Call) -> None:
        """Take a call's part back; its cgroup is gone or given up."""
        self._remove(call.id)

    def _remove(self, tenant_id: str) -> None:
        tenant = self._state.tenants.pop(tenant_id, None)
        if tenant is None:
            return
        if self._enforcement.time_slicing is not None:
            self._enforcement.time_slicing.remove(tenant)
        self._enforcement.expel(tenant)
        self._device_opens.forget(tenant)
        if self._monitor is not None and not self.tenants:
            self._monitor.pause()
        self.resource.freed()

    def sweep(self) -> None:
        """Every few seconds: find a driver that was loaded, forget processes that have ended."""
        self._enforcement.sweep(idle=not self.tenants)

    def _handle_memory_events(self, batch: Iterable[AnyEvent]) -> None:
        """Take events of the probes: work that begins, memory over the quota."""
        by_cgroup = {tenant.cgroup.id: tenant for tenant in self.tenants.values()}
        for event in batch:
            if not isinstance(event, abi.VramEvent):
                continue
            tenant = by_cgroup.get(CgroupId(event.event.cgroup_id))
            if tenant is None:
                continue
            if event.event.type == abi.GpuEventType.ACTIVE:
                self._activity.set_wants(tenant, True)
            else:
                self._feedback.over_quota(tenant, event)
