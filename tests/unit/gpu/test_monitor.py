"""The monitor's gauges: a number that is not known is NaN, never zero and never an old one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentcgroupd.config import GpuConfig
from agentcgroupd.gpu.activity import Activity
from agentcgroupd.gpu.device_opens import DeviceOpens
from agentcgroupd.gpu.enforcement import Enforcement, GpuSources
from agentcgroupd.gpu.feedback import GpuFeedback
from agentcgroupd.gpu.monitor import Monitor
from agentcgroupd.gpu.nvml import DeviceInfo, DeviceSample, Fault
from agentcgroupd.gpu.state import GpuState
from agentcgroupd.intents.gpu import Device, GpuCeiling
from agentcgroupd.telemetry.metrics import Metrics

UUID = "GPU-00000001"


class Nvml:
    """Shows one sample again and again, and no faults."""

    driver = "none"

    def __init__(self, sample: DeviceSample) -> None:
        self._sample = sample

    def devices(self) -> list[DeviceInfo]:
        """Tell of none: the state has them already."""
        return []

    def sample(self, uuids: Sequence[str]) -> list[DeviceSample]:
        """The sample, if its device is asked for."""
        return [self._sample] if self._sample.uuid in uuids else []

    def wait_fault(self) -> Fault | None:
        """Tell at once that there is no fault."""
        return None

    def close(self) -> None:
        """Do nothing."""


def gauges(sample: DeviceSample, pause: bool = False) -> tuple[float, float, GpuState]:
    """Busy percent and bytes in use that the gauges show after two rounds of this sample, and, with
    `pause`, after the last tenant has gone; and the state."""
    metrics, state = Metrics(), GpuState(lambda pid: None)
    state.ceiling = GpuCeiling((Device(0, UUID, 0, "A GPU", 1 << 30),))
    notices: Any = SimpleNamespace(metrics=metrics, audit=SimpleNamespace(write=lambda *a, **k: 0))

    async def watch() -> None:
        config = GpuConfig.model_validate({"sample": "10ms"})
        enforcement = Enforcement(config, None, False, GpuSources())
        feedback = GpuFeedback(state, notices)
        activity = Activity("off", enforcement)
        with ThreadPoolExecutor(2) as executor:
            opens = DeviceOpens(state, enforcement, activity, feedback, lambda pid: None, executor)
            monitor = Monitor(
                config,
                Nvml(sample),
                None,
                state,
                activity,
                feedback,
                opens,
                cast("Any", SimpleNamespace(notices=notices)),
                executor,
            )
            monitor.start()
            monitor.wake()
            await until(lambda: monitor.rounds >= 2)
            if pause:
                monitor.pause()
            await monitor.stop()

    asyncio.run(watch())
    shown = (metrics.gpu_busy, metrics.gpu_memory)
    busy, memory = (gauge.labels("0")._value.get() for gauge in shown)
    return busy, memory, state


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds, for ten seconds at most."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("nothing was sampled")


def test_what_is_told_is_shown() -> None:
    assert gauges(DeviceSample(UUID, 5, 70))[:2] == (0.7, 5)


def test_what_is_not_told_is_nan() -> None:
    busy, memory, _ = gauges(DeviceSample(UUID, memory_used_bytes=5))
    assert math.isnan(busy) and memory == 5


def test_a_lost_device_shows_nothing() -> None:
    busy, memory, state = gauges(DeviceSample(UUID, 5, 70, lost="it is gone"))
    assert math.isnan(busy) and math.isnan(memory)
    assert state.device(UUID).lost


def test_nothing_is_known_while_nobody_samples() -> None:
    busy, memory, _ = gauges(DeviceSample(UUID, 5, 70), pause=True)
    assert math.isnan(busy) and math.isnan(memory)
