"""From samples of devices to what each tenant does: memory, processors, energy. Pure but for
finding out whose a process is, which is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agentcgroupd.gpu.nvml import DeviceSample
from agentcgroupd.gpu.tenant import GpuTenant

BUSY_PERCENT = 1.0
"""A tenant that had the processors busy for less does not want the device."""


@dataclass(slots=True)
class Seen:
    """What one round of samples says of a tenant."""

    memory_bytes: int | None = None
    sm_percent: float = 0.0
    """Sum over its processes, of all its devices."""
    sampled: bool = False
    """The driver had news of what its processes keep busy."""
    processes: int = 0


@dataclass(slots=True)
class Accounts:
    """Keeps what is needed from one round to the next."""

    owner: Callable[[int], GpuTenant | None]
    """Whose a process is; None: nobody's that has a part."""
    _energy_mj: dict[str, int] = field(default_factory=dict)
    _at_usec: int | None = None
    strangers: dict[str, set[int]] = field(default_factory=dict)
    """Processes on a device that are no tenant's, by its UUID."""

    def take(self, samples: Iterable[DeviceSample], now_usec: int) -> dict[str, Seen]:
        """Add a round of samples to the tenants; what it says of each, by id."""
        passed = 0 if self._at_usec is None else max(0, now_usec - self._at_usec)
        self._at_usec = now_usec
        seen: dict[str, Seen] = {}
        whose: dict[str, GpuTenant] = {}
        for sample in samples:
            if sample.lost:
                continue
            shares: list[tuple[GpuTenant, float]] = []
            strangers = set()
            for process in sample.processes:
                tenant = self.owner(process.pid)
                if tenant is None:
                    strangers.add(process.pid)
                    continue
                tenant.pids.add(process.pid)
                whose[tenant.id] = tenant
                entry = seen.setdefault(tenant.id, Seen())
                entry.processes += 1
                if process.memory_bytes is not None:
                    entry.memory_bytes = (entry.memory_bytes or 0) + process.memory_bytes
                if process.sm_percent is not None:
                    entry.sm_percent += process.sm_percent
                    entry.sampled = True
                    shares.append((tenant, process.sm_percent))
            self.strangers[sample.uuid] = strangers
            self._share_energy(sample, shares)
        for tenant_id, entry in seen.items():
            self._add(whose[tenant_id], entry, passed, now_usec)
        return seen

    def _share_energy(self, sample: DeviceSample, shares: list[tuple[GpuTenant, float]]) -> None:
        """What a device took since the last round goes to whom had it busy, in proportion; what it
        takes when idle goes to nobody."""
        if sample.energy_mj is None:
            return
        before = self._energy_mj.get(sample.uuid)
        self._energy_mj[sample.uuid] = sample.energy_mj
        total = sum(percent for _, percent in shares)
        if before is None or total <= 0:
            return
        for tenant, percent in shares:
            tenant.energy_mj += (sample.energy_mj - before) * percent / total
            tenant.energy_known = True

    @staticmethod
    def _add(tenant: GpuTenant, entry: Seen, passed_usec: int, now_usec: int) -> None:
        if entry.memory_bytes is not None:
            tenant.memory_now_bytes = entry.memory_bytes
            tenant.memory_peak_bytes = max(tenant.memory_peak_bytes or 0, entry.memory_bytes)
        tenant.sm_sum += entry.sm_percent * passed_usec
        tenant.sm_usec += passed_usec
        if entry.sm_percent >= BUSY_PERCENT:
            tenant.uses(now_usec)

    def forget(self) -> None:
        """Nobody is sampled for a while: what comes next is no difference to what was."""
        self._energy_mj.clear()
        self._at_usec = None
