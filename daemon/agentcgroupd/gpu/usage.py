"""What each tenant uses, from samples of devices: memory, processors, energy.

Pure, except that the given `owner` is asked to whom a process belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agentcgroupd.gpu.nvml import DeviceSample
from agentcgroupd.gpu.tenant import GpuTenant

BUSY_PERCENT = 1.0
"""A tenant that had the processors busy for less does not want the device."""


@dataclass(slots=True)
class RoundUsage:
    """What one round of samples says of a tenant."""

    memory_bytes: int | None = None
    """None: the driver tells of none of its processes."""
    sm_percent: float | None = None
    """Sum over its processes, of all its devices; None: the driver does not tell."""
    processes: int = 0

    @property
    def busy(self) -> bool:
        """Whether it is seen to use a device."""
        return self.sm_percent is not None and self.sm_percent >= BUSY_PERCENT


@dataclass(slots=True)
class UsageTracker:
    """Adds rounds of samples up; keeps what is needed from one round to the next."""

    owner: Callable[[int], GpuTenant | None]
    """From a pid to its tenant; None: the process has no part of a GPU."""
    strangers: dict[str, set[int]] = field(default_factory=dict)
    """Processes on a device that are no tenant's, by its UUID."""
    _energy_mj: dict[str, int] = field(default_factory=dict)
    _at_usec: int | None = None

    def take(self, samples: Iterable[DeviceSample], now_usec: int) -> dict[str, RoundUsage]:
        """Add a round of samples to the tenants; returns what it says of each, by id."""
        passed = 0 if self._at_usec is None else max(0, now_usec - self._at_usec)
        self._at_usec = now_usec
        usages: dict[str, RoundUsage] = {}
        seen: dict[str, GpuTenant] = {}
        for sample in samples:
            if not sample.lost:
                self._take_device(sample, usages, seen)
        for tenant_id, usage in usages.items():
            self._add(seen[tenant_id], usage, passed, now_usec)
        return usages

    def _take_device(
        self, sample: DeviceSample, usages: dict[str, RoundUsage], seen: dict[str, GpuTenant]
    ) -> None:
        """Add one device's processes to `usages`, and their tenants to `seen`."""
        busy: list[tuple[GpuTenant, float]] = []
        strangers = set()
        for process in sample.processes:
            tenant = self.owner(process.pid)
            if tenant is None:
                strangers.add(process.pid)
                continue
            tenant.pids.add(process.pid)
            seen[tenant.id] = tenant
            usage = usages.setdefault(tenant.id, RoundUsage())
            usage.processes += 1
            if process.memory_bytes is not None:
                usage.memory_bytes = (usage.memory_bytes or 0) + process.memory_bytes
            if process.sm_percent is not None:
                busy.append((tenant, process.sm_percent))
            if sample.tells_processors:
                usage.sm_percent = (usage.sm_percent or 0.0) + (process.sm_percent or 0.0)
        self.strangers[sample.uuid] = strangers
        self._share_energy(sample, busy)

    def _share_energy(self, sample: DeviceSample, busy: list[tuple[GpuTenant, float]]) -> None:
        """Divide what a device took since the last round among the tenants that had it busy, in
        proportion; what it takes when idle goes to nobody."""
        if sample.energy_mj is None:
            return
        before = self._energy_mj.get(sample.uuid)
        self._energy_mj[sample.uuid] = sample.energy_mj
        total = sum(percent for _, percent in busy)
        if before is None or total <= 0:
            return
        for tenant, percent in busy:
            tenant.energy_mj += (sample.energy_mj - before) * percent / total
            tenant.energy_known = True

    @staticmethod
    def _add(tenant: GpuTenant, usage: RoundUsage, passed_usec: int, now_usec: int) -> None:
        """Add a round to a tenant's sums."""
        if usage.memory_bytes is not None:
            tenant.memory_peak_bytes = max(tenant.memory_peak_bytes or 0, usage.memory_bytes)
        if usage.sm_percent is not None:
            tenant.sm_sum += usage.sm_percent * passed_usec
            tenant.sm_usec += passed_usec
        if usage.busy:
            tenant.note_use(now_usec)

    def forget(self) -> None:
        """Begin anew: sampling pauses, and what comes next is no difference to what was."""
        self._energy_mj.clear()
        self._at_usec = None
