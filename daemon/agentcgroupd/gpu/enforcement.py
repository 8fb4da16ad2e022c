"""What holds parts of GPUs on this host: the gate, probes on libcuda, MPS or time slices.

Each is tried once, when the daemon starts. What cannot be had is left out, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentcgroupd.bpf.abi import GpuMajorKind
from agentcgroupd.bpf.device import DevicePrograms
from agentcgroupd.bpf.vram import VramPrograms
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.config import GpuConfig
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu.arbiter import Settings
from agentcgroupd.gpu.gate import Gate, driver_majors
from agentcgroupd.gpu.libraries import Libraries
from agentcgroupd.gpu.mps import Mps, MpsControl, MpsControlDaemon, MpsUnavailable
from agentcgroupd.gpu.nvml import DriverNvml, Nvml
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.gpu.time_slicing import TimeSlicing
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.intents.gpu import Device
from agentcgroupd.state.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuSources:
    """Where the driver, its device files and MPS are reached: the real ones, or a test's."""

    nvml: Callable[[], Nvml] = DriverNvml
    majors: Callable[[], Mapping[int, GpuMajorKind]] = driver_majors
    mps: Callable[[Path, Path, Sequence[str]], MpsControl] = MpsControlDaemon
    """From the directories for pipes and logs, and the devices' UUIDs."""


class Enforcement:
    """The gate, the probes and the sharing of this host. Each attribute is None until it is loaded,
    and stays so where that is switched off or not possible here."""

    def __init__(
        self, config: GpuConfig, objects: Path | None, programs: bool, sources: GpuSources
    ) -> None:
        """Load nothing yet. `objects`: where compiled programs are, None: the daemon's own.
        `programs`: whether any may be loaded into the kernel (bpf.enabled)."""
        self._config, self._objects = config, objects
        self._programs, self._sources = programs, sources
        self.gate: Gate | None = None
        self.vram: VramPrograms | None = None
        self.libraries: Libraries | None = None
        self.mps: Mps | None = None
        self.time_slicing: TimeSlicing | None = None

    @property
    def memory_held_by(self) -> str:
        """`probes`, `mps` or `counting`."""
        probed = self.libraries is not None and bool(self.libraries.probed)
        if self.vram is not None and self.vram.refuses and probed:
            return "probes"
        if self.mps is not None and self._config.quota in ("auto", "mps"):
            return "mps"
        return "counting"

    @property
    def share_held_by(self) -> str:
        """`mps`, `turns` (time slices, by the name that the configuration has for them) or
        `nothing`."""
        if self.mps is not None:
            return "mps"
        return "nothing" if self.time_slicing is None else "turns"

    # The gate

    def close_gate(self, pool: Cgroup) -> None:
        """Close device files of GPUs to everything in the pool."""
        if not self._config.gate or not self._programs:
            return
        try:
            gate = Gate(DevicePrograms.load(self._objects), self._sources.majors)
            gate.close_for(pool)
        except (BpfError, OSError) as error:
            self._say_open(error)
            return
        self.gate = gate

    def _say_open(self, error: BpfError | OSError) -> None:
        """Say that there is no gate: an error where there is a GPU, else one of many things that
        `agentcg doctor` tells."""
        words = ("device files of GPUs are open to everyone: %s", error)
        try:
            has_driver = bool(self._sources.majors())
        except OSError:
            has_driver = True
        if has_driver:
            log.error(*words)
        else:
            log.info(*words, extra=DETAIL)

    def session_opened(self, session: Session) -> None:
        """Put the gate on an adopted session: its cgroup is outside the pool."""
        if not session.adopted or self.gate is None:
            return
        try:
            self.gate.close_for(session.cgroup)
        except BpfError as error:
            log.error("session %s: device files of GPUs are open to it: %s", session.id, error)

    def session_closed(self, session: Session) -> None:
        """Take the gate off an adopted session's cgroup, if that is still there."""
        if not session.adopted or self.gate is None:
            return
        try:
            self.gate.open_for(session.cgroup)
        except (BpfError, OSError) as error:
            log.debug("session %s: %s", session.id, error)

    # Memory and shares

    def load_probes(self) -> None:
        """Load the programs that account for GPU memory, and probe the host's libcuda."""
        if self._config.quota not in ("auto", "probes") or not self._programs:
            return
        try:
            self.vram = VramPrograms.load(self._objects)
        except BpfError as error:
            log.warning("GPU memory is not seen by probes: %s", error)
            return
        self.libraries = Libraries(self.vram)
        if not self.libraries.probe_host(self._config.libraries):
            log.info("the host has no libcuda; a container's is found when it opens a GPU")

    async def choose_sharing(
        self,
        devices: Sequence[Device],
        run_dir: Path,
        tenants: Mapping[str, GpuTenant],
        on_mps_end: Callable[[], None],
    ) -> None:
        """Start MPS, or time slices where there is no MPS, as the configuration wants it.
        `tenants`: those there will be, by id."""
        config = self._config
        if config.share in ("auto", "mps"):
            pipes, logs = run_dir / "agent/mps", run_dir / "private/mps"
            control = self._sources.mps(pipes, logs, [device.uuid for device in devices])
            mps = Mps(control, pipes, on_mps_end)
            try:
                await mps.start()
            except MpsUnavailable as error:
                level = logging.ERROR if config.share == "mps" else logging.INFO
                log.log(level, "shares are held by turns: MPS cannot be had: %s", error)
            else:
                self.mps = mps
                return
        if config.share != "none":
            settings = Settings(config.period, config.least_turn, config.batch_percent)
            self.time_slicing = TimeSlicing(settings, tenants)

    # A tenant's part

    def environment(self, percent: int, memory: int, devices: tuple[str, ...]) -> list[str]:
        """Make NAME=value for a tool: its devices by UUID and, where MPS works, what puts it
        there. `memory`: bytes of each device."""
        found = {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        if self.mps is not None and self.mps.works:
            found.update(self.mps.environment(percent, memory, len(devices)))
            if self.memory_held_by != "mps":
                del found["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]
        return [f"{name}={value}" for name, value in found.items()]

    def admit(self, tenant: GpuTenant) -> None:
        """Let a tenant open its devices. Raises BpfError."""
        if self.gate is not None:
            self.gate.admit(tenant.cgroup.id, [device.minor for device in tenant.devices])

    def expel(self, tenant: GpuTenant) -> None:
        """Close its devices to a tenant and forget what it held; errors are logged."""
        try:
            if self.gate is not None:
                self.gate.expel(tenant.cgroup.id)
            if self.vram is not None:
                self.vram.drop(tenant.cgroup.id)
        except BpfError as error:
            log.error("%s: %s", tenant.name, error)

    def sweep(self, idle: bool) -> None:
        """Find a driver that was loaded meanwhile and, where nobody has a part (`idle`), forget
        what processes that have ended had allocated."""
        try:
            if self.gate is not None:
                self.gate.refresh()
            if self.vram is not None and idle:
                self.vram.prune()
        except (BpfError, OSError) as error:
            log.error("GPUs: %s", error)

    def release(self) -> None:
        """Hold nobody back any more."""
        if self.time_slicing is not None:
            self.time_slicing.stop()

    async def close(self, leave_mps: bool) -> None:
        """Stop MPS, or leave it to calls that go on, then take the probes away and give up the
        programs. The gate stays closed in the kernel."""
        if self.mps is not None:
            await self.mps.stop(leave=leave_mps)
        if self.libraries is not None:
            self.libraries.close()
        if self.vram is not None:
            self.vram.close()
        if self.gate is not None:
            self.gate.close()
