"""NVML behind a small interface: what devices there are, what they and their processes use, and
what goes wrong with them. Everything here may block and belongs into an executor.

Units as NVML has them: memory in bytes, energy in millijoules, use in percent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from agentcgroupd.errors import AgentcgroupdError

log = logging.getLogger(__name__)

T = TypeVar("T")

FAULT_WAIT_MS = 500


class NvmlUnavailable(AgentcgroupdError):
    """There is no NVML here, or it does not answer; the message says which."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A GPU as the driver describes it."""

    index: int
    uuid: str
    minor: int
    """Of /dev/nvidia<minor>."""
    name: str
    memory_bytes: int
    mig: bool = False
    """Split by its owner: not to be shared by us as a whole."""


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """A process on a device. None: the driver does not say."""

    pid: int
    memory_bytes: int | None = None
    sm_percent: float | None = None
    """Of the time since the last sample in which it had the processors busy; None: no news."""


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """A device now."""

    uuid: str
    memory_used_bytes: int = 0
    busy_percent: int = 0
    energy_mj: int | None = None
    """Since the driver was loaded."""
    processes: tuple[ProcessUse, ...] = ()
    lost: str = ""
    """Why it does not answer any more; empty: it does."""


@dataclass(frozen=True, slots=True)
class Fault:
    """An error that the driver reports (XID), or the loss of a device."""

    uuid: str
    xid: int


class Nvml(Protocol):
    """What the daemon asks of the driver."""

    driver: str
    """Its version."""

    def devices(self) -> list[DeviceInfo]:
        """All there are. Raises NvmlUnavailable."""

    def sample(self, uuids: Sequence[str]) -> list[DeviceSample]:
        """These, now. A device that is lost is said to be; others go on."""

    def wait_fault(self) -> Fault | None:
        """The next fault, or None after FAULT_WAIT_MS."""

    def close(self) -> None:
        """Give it up."""


class DriverNvml:
    """The driver's own, through nvidia-ml-py."""

    def __init__(self) -> None:
        """Raises NvmlUnavailable."""
        try:
            import pynvml
        except ImportError:
            raise NvmlUnavailable("nvidia-ml-py is not installed (agentcgroup[gpu])") from None
        self._nvml: Any = pynvml
        self._error: type[Exception] = pynvml.NVMLError
        try:
            pynvml.nvmlInit()
            self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
        except self._error as error:
            raise NvmlUnavailable(f"NVML: {error}") from None
        self._handles: dict[str, Any] = {}
        self._seen_usec: dict[str, int] = {}
        self._faults: Any = None

    def devices(self) -> list[DeviceInfo]:
        """See Nvml."""
        nvml, found = self._nvml, []
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = _text(nvml.nvmlDeviceGetUUID(handle))
                self._handles[uuid] = handle
                mig = self._maybe(lambda h=handle: nvml.nvmlDeviceGetMigMode(h)[0], 0)  # type: ignore[misc]
                found.append(DeviceInfo(
                    index, uuid, int(nvml.nvmlDeviceGetMinorNumber(handle)),
                    _text(nvml.nvmlDeviceGetName(handle)),
                    int(nvml.nvmlDeviceGetMemoryInfo(handle).total), bool(mig),
                ))  # fmt: skip
        except self._error as error:
            raise NvmlUnavailable(f"NVML: {error}") from None
        self._listen()
        return found

    def _listen(self) -> None:
        """Ask to be told of faults; a driver that cannot is done without."""
        nvml = self._nvml
        if self._faults is not None:
            return
        try:
            self._faults = nvml.nvmlEventSetCreate()
            for handle in self._handles.values():
                nvml.nvmlDeviceRegisterEvents(
                    handle, nvml.nvmlEventTypeXidCriticalError, self._faults
                )
        except self._error as error:
            log.warning("faults of GPUs are not told: NVML: %s", error)
            self._faults = None

    def _maybe(self, ask: Callable[[], T], default: T) -> T:
        """What a driver or device may not support."""
        try:
            return ask()
        except self._error:
            return default

    def sample(self, uuids: Sequence[str]) -> list[DeviceSample]:
        """See Nvml."""
        return [self._sample(uuid) for uuid in uuids]

    def _sample(self, uuid: str) -> DeviceSample:
        nvml, handle = self._nvml, self._handles[uuid]
        try:
            memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        except self._error as error:
            return DeviceSample(uuid, lost=f"NVML: {error}")
        used: dict[int, int | None] = {}
        running: list[Any] = self._maybe(
            lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle), []
        )
        for process in running:
            held = process.usedGpuMemory
            used[int(process.pid)] = None if held is None else int(held)
        busy = self._busy(uuid, handle)
        energy = self._maybe(lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)), None)
        whole = self._maybe(lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu), 0)
        processes = tuple(
            ProcessUse(pid, used.get(pid), busy.get(pid)) for pid in sorted({*used, *busy})
        )
        return DeviceSample(uuid, memory, whole, energy, processes)

    def _busy(self, uuid: str, handle: Any) -> dict[int, float]:
        """Percent by pid, mean of the driver's samples since the last time."""
        nvml = self._nvml
        since = self._seen_usec.get(uuid, int(time.time() * 1e6) - 1_000_000)
        samples: list[Any] = self._maybe(
            lambda: nvml.nvmlDeviceGetProcessUtilization(handle, since), []
        )
        sums: dict[int, list[float]] = {}
        for sample in samples:
            if sample.pid and sample.smUtil <= 100:
                sums.setdefault(int(sample.pid), []).append(float(sample.smUtil))
                self._seen_usec[uuid] = max(self._seen_usec.get(uuid, 0), int(sample.timeStamp))
        return {pid: sum(values) / len(values) for pid, values in sums.items()}

    def wait_fault(self) -> Fault | None:
        """See Nvml."""
        nvml = self._nvml
        if self._faults is None:
            time.sleep(FAULT_WAIT_MS / 1000)  # in an executor: nothing else waits for it
            return None
        try:
            event = nvml.nvmlEventSetWait_v2(self._faults, FAULT_WAIT_MS)
            return Fault(_text(nvml.nvmlDeviceGetUUID(event.device)), int(event.eventData))
        except nvml.NVMLError_Timeout:
            return None
        except self._error as error:
            log.error("faults of GPUs are not told any more: NVML: %s", error)
            self._faults = None
            return None

    def close(self) -> None:
        """See Nvml."""
        if self._faults is not None:
            self._maybe(lambda: self._nvml.nvmlEventSetFree(self._faults), None)
        self._maybe(self._nvml.nvmlShutdown, None)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
