"""Use by tenant from samples of devices; a number that the driver does not tell stays unknown."""

from __future__ import annotations

from typing import Any, cast

from agentcgroupd.gpu.nvml import DeviceSample, ProcessUse
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.gpu.usage import RoundUsage, UsageTracker

MINE, OTHER = 11, 12


def tenant() -> GpuTenant:
    """A tenant that has no devices: usage does not ask for them."""
    nobody = cast("Any", None)
    return GpuTenant("a", nobody, nobody, nobody, (), 10, 0, 50, 0)


def rounds(*samples: DeviceSample) -> tuple[GpuTenant, list[RoundUsage], UsageTracker]:
    """A tenant with the process MINE, sampled once a second."""
    owner = tenant()
    tracker = UsageTracker(lambda pid: owner if pid == MINE else None)
    usages = [tracker.take([s], second * 1_000_000)["a"] for second, s in enumerate(samples)]
    return owner, usages, tracker


def sample(use: ProcessUse, energy_mj: int | None = None, told: bool = True) -> DeviceSample:
    """A sample of GPU-0 with one process of the tenant's, and a stranger."""
    processes = (use, ProcessUse(OTHER, 5))
    return DeviceSample("GPU-0", energy_mj=energy_mj, processes=processes, tells_processors=told)


def test_use_adds_up() -> None:
    busy, rests = ProcessUse(MINE, 100, 40.0), ProcessUse(MINE, 60)
    owner, usages, tracker = rounds(sample(busy, 1000), sample(busy, 3000), sample(rests, 4000))
    assert [u.sm_percent for u in usages] == [40.0, 40.0, 0.0]
    assert [u.busy for u in usages] == [True, True, False]
    assert [u.memory_bytes for u in usages] == [100, 100, 60]
    assert owner.memory_peak_bytes == 100
    assert owner.sm_sum / owner.sm_usec == 20.0
    assert (owner.energy_known, owner.energy_mj) == (True, 2000)
    assert tracker.strangers == {"GPU-0": {OTHER}}


def test_unknown_is_not_zero() -> None:
    untold = sample(ProcessUse(MINE), told=False)
    owner, usages, _ = rounds(untold, untold)
    assert usages == [RoundUsage(None, None, 1)] * 2
    assert not usages[0].busy
    assert (owner.sm_usec, owner.memory_peak_bytes, owner.energy_known) == (0, None, False)
