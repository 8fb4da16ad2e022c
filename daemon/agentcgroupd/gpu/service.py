"""GPU sharing as the daemon has it: devices, who has a part of them, and what holds them to it.

A host without GPUs, or without a driver, works as ever: whoever asks for a part is told why there
is none. What holds a quota or a share is chosen at the start, the strongest that can be had, and
said in the log, by `doctor` and in every report.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.device import DevicePrograms
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.bpf.vram import VramPrograms
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.config import GpuConfig
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu.arbiter import Settings
from agentcgroupd.gpu.device_opens import Openings
from agentcgroupd.gpu.gate import Gate
from agentcgroupd.gpu.libraries import Libraries
from agentcgroupd.gpu.monitor import Watch
from agentcgroupd.gpu.mps import Control, ControlDaemon, Mps, MpsUnavailable
from agentcgroupd.gpu.nvml import DriverNvml, Nvml, NvmlUnavailable
from agentcgroupd.gpu.placement import Grants
from agentcgroupd.gpu.resource import GpuResource
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.gpu.time_slicing import Turns
from agentcgroupd.intents.gpu import Device, GpuCeiling
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.session import Call, Session, boottime_usec
from agentcgroupd.units import show_bytes

log = logging.getLogger(__name__)

SWITCH_S = 0.0005
"""Between threads of the interpreter, where there are GPUs."""


class Gpus:
    """All of it. Made on a running loop; `start` before the first session is found again."""

    def __init__(
        self,
        config: GpuConfig,
        run_dir: Path,
        objects: Path | None,
        sessions: Callable[[], Sessions],
        actions: Callable[[], Actions],
        programs: bool = True,
    ) -> None:
        """Nothing is touched yet. `sessions` and `actions` are asked from `start` on. `programs`:
        whether any may be loaded into the kernel (bpf.enabled)."""
        self.config = config
        self._programs = programs
        self._run_dir, self._objects = run_dir, objects
        self._sessions, self._actions = sessions, actions
        self.ceiling = GpuCeiling(why_none="switched off in the configuration (gpu.enabled)")
        self.tenants: dict[str, GpuTenant] = {}
        self.gate: Gate | None = None
        self.vram: VramPrograms | None = None
        self.libraries: Libraries | None = None
        self.mps: Mps | None = None
        self.turns: Turns | None = None
        self.watch: Watch | None = None
        self.make_nvml: Callable[[], Nvml] = DriverNvml
        self.read_majors: Callable[[], Mapping[int, abi.GpuMajorKind]] | None = None
        self.make_control: Callable[[Path, Path, list[str]], Control] = ControlDaemon
        self.grants = Grants(self)
        self.resource = GpuResource(
            lambda: self.ceiling.devices,
            lambda: [t.holding for t in self.tenants.values()],
            config.wait,
            self.grants.environment,
        )
        self._pool: Cgroup | None = None
        self._executor: ThreadPoolExecutor | None = None
        self.openings = Openings(self, sessions, actions)

    # Starting and stopping

    async def start(self, pool: Cgroup) -> None:
        """Find the devices, close the gate, choose what holds quotas and shares. Never raises for
        what a host lacks."""
        if not self.config.enabled:
            return
        self._pool = pool
        self._executor = ThreadPoolExecutor(3, thread_name_prefix="gpu")
        self._close_gate()
        try:
            nvml = await self.run(self.make_nvml)
            infos = await self.run(nvml.devices)
        except NvmlUnavailable as error:
            self.ceiling = GpuCeiling(why_none=str(error))
            log.info("no GPUs for calls: %s", error)
            return
        devices = tuple(
            Device(i.index, i.uuid, i.minor, i.name, max(0, i.memory_bytes - self.config.reserve))
            for i in infos
            if not i.mig
        )
        why = "its owner has split every GPU (MIG)" if infos else "the driver has no device"
        self.ceiling = GpuCeiling(devices, why)
        if not devices:
            nvml.close()
            return
        for device in devices:
            log.info("GPU %d: %s, %s to grant, %s", device.index, device.name,
                     show_bytes(device.memory_bytes), device.uuid)  # fmt: skip
        # A thread that has the interpreter keeps it for 5 ms by default: too long for a loop that
        # gives the GPU to an important call while another thread asks NVML.
        sys.setswitchinterval(SWITCH_S)
        self._load_probes()
        await self._choose_share(devices)
        self.watch = Watch(self, nvml, self.owner, self._actions)
        self.watch.start()
        log.info("GPU memory is held by %s, shares by %s", self.memory_held_by, self.share_held_by)

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In the executor."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, function, *arguments
        )

    def _close_gate(self) -> None:
        if not self.config.gate or not self._programs or self._pool is None:
            return
        try:
            gate = Gate(DevicePrograms.load(self._objects), self.read_majors)
            gate.close_for(self._pool)
            gate.start(self.openings.events)
        except (BpfError, OSError) as error:
            log.error("device files of GPUs are open to everyone: %s", error)
            return
        self.gate = gate

    def _load_probes(self) -> None:
        if self.config.quota not in ("auto", "probes") or not self._programs:
            return
        try:
            self.vram = VramPrograms.load(self._objects)
        except BpfError as error:
            log.warning("GPU memory is not seen by probes: %s", error)
            return
        self.libraries = Libraries(self.vram)
        found = self.libraries.probe_host(self.config.libraries)
        if not found:
            log.info("no libcuda of the host's own; those of containers are found when they open "
                     "a GPU")  # fmt: skip
        self.vram.start(self._memory_events)

    async def _choose_share(self, devices: tuple[Device, ...]) -> None:
        wanted = self.config.share
        if wanted in ("auto", "mps"):
            pipes, logs = self._run_dir / "agent/mps", self._run_dir / "private/mps"
            control = self.make_control(pipes, logs, [d.uuid for d in devices])
            mps = Mps(control, pipes, self._mps_ended)
            try:
                await mps.start()
                self.mps = mps
                return
            except MpsUnavailable as error:
                level = logging.ERROR if wanted == "mps" else logging.INFO
                log.log(level, "shares are held by turns: MPS cannot be had: %s", error)
        if wanted != "none":
            config = self.config
            settings = Settings(config.period, config.least_turn, config.batch_percent)
            self.turns = Turns(settings, self.tenants)

    def let_go(self) -> None:
        """Hold nobody back any more; may be called again."""
        if self.turns is not None:
            self.turns.stop()

    async def stop(self) -> None:
        """Let go: nobody is held back, the gate stays closed, calls go on."""
        if self.turns is not None:
            self.turns.stop()
        self.openings.stop()
        if self.watch is not None:
            await self.watch.stop()
        if self.mps is not None:
            await self.mps.stop(leave=bool(self.tenants))
        if self.libraries is not None:
            self.libraries.close()
        if self.vram is not None:
            self.vram.close()
        if self.gate is not None:
            self.gate.close()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    # What holds what

    @property
    def memory_held_by(self) -> str:
        """`probes`, `mps` or `counting`."""
        if self.vram is not None and self.vram.refuses and self.libraries and self.libraries.probed:
            return "probes"
        if self.mps is not None and self.config.quota in ("auto", "mps"):
            return "mps"
        return "counting"

    @property
    def share_held_by(self) -> str:
        """`mps`, `turns` or `nothing`."""
        return "mps" if self.mps else "turns" if self.turns else "nothing"

    def _mps_ended(self) -> None:
        if self.watch is not None:
            self.watch.mps_ended()

    # Sessions and calls

    def session_opened(self, session: Session) -> None:
        """Its cgroup is there, with its agent leaf. Its own part is never held back by turns: an
        agent that is paused cannot even hear why."""
        limits = session.limits
        if limits.gpu_percent is not None:
            memory = limits.gpu_memory_bytes or 0
            session.environment = tuple(
                self.grants.environment(limits.gpu_percent, memory, limits.gpu_devices)
            )
            self._add(GpuTenant(
                f"session:{session.id}", session, None, session.agent,
                self._known(limits.gpu_devices), limits.gpu_percent, memory,
                limits.gpu_priority or 0, boottime_usec(),
            ))  # fmt: skip
        if session.adopted and self.gate is not None:
            try:
                self.gate.close_for(session.cgroup)
            except BpfError as error:
                log.error("session %s: device files of GPUs are open to it: %s", session.id, error)

    def session_closed(self, session: Session) -> None:
        """Its cgroup is gone, or given back."""
        self._remove(f"session:{session.id}")
        if session.adopted and self.gate is not None:
            try:
                self.gate.open_for(session.cgroup)
            except (BpfError, OSError) as error:
                log.debug("session %s: %s", session.id, error)

    def call_opened(self, call: Call) -> None:
        """Its cgroup is there, with no process in it or, after a restart, with some. Raises
        BpfError where it cannot be given what it was granted."""
        grant = call.grant
        if grant.gpu_percent is None or call.id in self.tenants:
            return
        self._add(GpuTenant(
            call.id, call.session, call, call.cgroup, self._known(grant.gpu_devices),
            grant.gpu_percent, grant.gpu_memory_bytes or 0, grant.gpu_priority or 0,
            boottime_usec(),
        ))  # fmt: skip

    def _known(self, uuids: tuple[str, ...]) -> tuple[Device, ...]:
        known = {d.uuid: d for d in self.ceiling.devices}
        for uuid in uuids:
            if uuid not in known:
                log.error("GPU %s was granted, and is not there any more", uuid)
        return tuple(known[uuid] for uuid in uuids if uuid in known)

    def _add(self, tenant: GpuTenant) -> None:
        self.tenants[tenant.id] = tenant
        try:
            self.set_quota(tenant)
            if self.gate is not None:
                self.gate.admit(tenant.cgroup.id, [d.minor for d in tenant.devices])
        except BpfError:
            self._remove(tenant.id)
            raise
        if self.turns is not None and tenant.call is not None:
            self.turns.add(tenant)
        if self.watch is not None:
            self.watch.wake()

    def set_quota(self, tenant: GpuTenant) -> None:
        """Its quota, and whether its next work is told, as they are now. Raises BpfError."""
        if self.vram is not None:
            self.vram.set_quota(tenant.cgroup.id, tenant.quota_bytes, self._watched(tenant))

    def _watched(self, tenant: GpuTenant) -> bool:
        """Whether the next work that it begins is to be told at once."""
        if self.turns is None or self.config.watch_launches == "off":
            return False
        arbiter = self.turns.arbiter.tenants.get(tenant.id)
        important = arbiter is None or arbiter.important
        wanted = self.config.watch_launches == "all" or important
        return wanted and (arbiter is None or not arbiter.wants)

    def want(self, tenant: GpuTenant, wants: bool) -> None:
        """It begins or stops to use its devices."""
        if self.turns is None:
            return
        if wants:
            tenant.uses(boottime_usec())
        self.turns.want(tenant, wants)
        if not wants and self._watched(tenant):
            try:
                self.set_quota(tenant)
                # What it has launched since it was looked at, before that was to be told.
                if self.launches(tenant) != tenant.launches:
                    self.want(tenant, True)
            except BpfError as error:
                log.error("%s: %s", tenant.name, error)

    def launches(self, tenant: GpuTenant) -> int:
        """How many have been seen; 0 where none are. Raises BpfError."""
        return 0 if self.vram is None else int(self.vram.account(tenant.cgroup.id).launches)

    def call_ending(self, call: Call) -> None:
        """It is empty, and its report is to be made."""
        tenant = self.tenants.get(call.id)
        if tenant is None:
            return
        account = self.vram.account(call.cgroup.id) if self.vram is not None else abi.VramAccount()
        peaks = [p for p in (tenant.memory_peak_bytes, account.peak_bytes or None) if p]
        held = tenant.held_usec
        if tenant.held_since_usec is not None:
            held += boottime_usec() - tenant.held_since_usec
        call.gpu_feedback = tuple(tenant.feedback)
        call.gpu_usage = pb.GpuUsage(
            memory_peak_bytes=max(peaks, default=None),
            sm_percent=tenant.sm_sum / tenant.sm_usec if tenant.sm_usec else None,
            energy_mj=int(tenant.energy_mj) if tenant.energy_known else None,
            held_back_usec=held,
            refused=account.refused,
            memory_held_by=self.memory_held_by,
            share_held_by=self.share_held_by,
        )

    def call_closed(self, call: Call) -> None:
        """Its cgroup is gone or given up; what it had is given back."""
        self._remove(call.id)

    def _remove(self, tenant_id: str) -> None:
        tenant = self.tenants.pop(tenant_id, None)
        if tenant is None:
            return
        if self.turns is not None:
            self.turns.remove(tenant)
        try:
            if self.gate is not None:
                self.gate.expel(tenant.cgroup.id)
            if self.vram is not None:
                self.vram.drop(tenant.cgroup.id)
        except BpfError as error:
            log.error("%s: %s", tenant.name, error)
        if self.watch is not None:
            self.watch.gone(tenant)
        self.resource.freed()

    def sweep(self) -> None:
        """Now and then: a driver that was loaded, handles of processes that have ended."""
        try:
            if self.gate is not None:
                self.gate.refresh()
            if self.vram is not None and not self.tenants:
                self.vram.prune()
        except (BpfError, OSError) as error:
            log.error("GPUs: %s", error)

    def owner(self, pid: int) -> GpuTenant | None:
        """Whose a process is; None: nobody's that has a part."""
        place = self._sessions().place_of(pid)
        if place is None:
            return None
        session, leaf = place
        return self.tenants.get(leaf.removeprefix("call-") if leaf.startswith("call-")
                                else f"session:{session.id}")  # fmt: skip

    # Events

    def _memory_events(self, batch: Iterable[AnyEvent]) -> None:
        by_cgroup = {t.cgroup.id: t for t in self.tenants.values()}
        for event in batch:
            tenant = by_cgroup.get(event.event.cgroup_id)  # type: ignore[call-overload]
            if tenant is None or not isinstance(event, abi.VramEvent):
                continue
            if event.event.type == abi.GpuEventType.ACTIVE:
                self.want(tenant, True)
            elif self.watch is not None:
                self.watch.over_quota(tenant, event)
