"""The driver's NVML where it cannot tell something: unknown is not zero."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.gpu.nvml import DeviceSample, DriverNvml, ProcessUse

NVML_SUCCESS, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND = 0, 3, 6
PID = 4242


class NVMLError(Exception):
    """Carries NVML's own number, as nvidia-ml-py's does."""

    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


def failing(value: int) -> Any:
    """A function that raises NVMLError."""

    def function(*_: Any) -> Any:
        raise NVMLError(value)

    return function


def sampled(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> DeviceSample:
    """The sample of one device, by a module that has these functions instead of its own."""
    module = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_SUCCESS=NVML_SUCCESS,
        NVML_ERROR_NOT_FOUND=NVML_ERROR_NOT_FOUND,
        nvmlEventTypeXidCriticalError=8,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetMinorNumber=lambda handle: handle,
        nvmlDeviceGetName=lambda handle: "A GPU",
        nvmlDeviceGetMigMode=failing(NVML_ERROR_NOT_SUPPORTED),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=100, used=30),
        nvmlEventSetCreate=failing(NVML_ERROR_NOT_SUPPORTED),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=PID, usedGpuMemory=None)
        ],
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=7),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1234,
        nvmlDeviceGetProcessUtilization=lambda handle, since: [
            SimpleNamespace(pid=PID, smUtil=20, timeStamp=since + 1),
            SimpleNamespace(pid=PID, smUtil=40, timeStamp=since + 2),
        ],
    )
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    nvml = DriverNvml()
    (device,) = nvml.devices()
    assert not device.mig
    (sample,) = nvml.sample([device.uuid])
    return sample


def test_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = sampled(monkeypatch)
    assert (sample.memory_used_bytes, sample.busy_percent, sample.energy_mj) == (30, 7, 1234)
    assert sample.processes == (ProcessUse(PID, None, 30.0),)
    assert sample.tells_processors


@pytest.mark.parametrize("value", [NVML_SUCCESS, NVML_ERROR_NOT_FOUND])
def test_no_process_was_busy(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    sample = sampled(monkeypatch, nvmlDeviceGetProcessUtilization=failing(value))
    assert sample.processes == (ProcessUse(PID, None, None),)
    assert sample.tells_processors


def test_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    untold = failing(NVML_ERROR_NOT_SUPPORTED)
    sample = sampled(
        monkeypatch,
        nvmlDeviceGetComputeRunningProcesses=untold,
        nvmlDeviceGetUtilizationRates=untold,
        nvmlDeviceGetTotalEnergyConsumption=untold,
        nvmlDeviceGetProcessUtilization=untold,
    )
    assert (sample.memory_used_bytes, sample.busy_percent, sample.energy_mj) == (30, None, None)
    assert sample.processes == () and not sample.tells_processors


def test_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([SimpleNamespace(total=100, used=30)])

    def memory(_: Any) -> Any:
        found = next(answers, None)
        if found is None:
            raise NVMLError(15)
        return found

    sample = sampled(monkeypatch, nvmlDeviceGetMemoryInfo=memory)
    assert sample == DeviceSample("GPU-0", lost="NVML: error 15")
