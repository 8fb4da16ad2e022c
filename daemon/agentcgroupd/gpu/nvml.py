"""NVML behind a small interface: devices, what they and their processes use, their faults.

Every call may block and belongs into an executor. Units are those of NVML: memory in bytes, energy
in millijoules, use in percent.
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
    """Raised where there is no NVML, or where it does not answer; the message says which."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A GPU as the driver describes it."""

    index: int
    uuid: str
    minor: int
    """The number in /dev/nvidia<minor>."""
    name: str
    memory_bytes: int
    mig: bool = False
    """Whether its owner has split it; then it cannot be shared as a whole."""


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """A process on a device. None: the driver does not tell."""

    pid: int
    memory_bytes: int | None = None
    sm_percent: float | None = None
    """Part of the time since the last sample in which it had the processors busy; None: the driver
    has no sample of it since then."""


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """A device at one moment. None: the driver does not tell."""

    uuid: str
    memory_used_bytes: int | None = None
    busy_percent: int | None = None
    energy_mj: int | None = None
    """Taken since the driver was loaded."""
    processes: tuple[ProcessUse, ...] = ()
    tells_processors: bool = True
    """Whether the driver samples which processes have the processors busy; then a process without
    a sample had them busy for no time."""
    lost: str = ""
    """Why the device does not answer any more; empty: it does."""


@dataclass(frozen=True, slots=True)
class Fault:
    """An error that the driver reports (XID), or the loss of a device."""

    uuid: str
    xid: int


class Nvml(Protocol):
    """What the daemon asks of the driver."""

    driver: str
    """The driver's version."""

    def devices(self) -> list[DeviceInfo]:
        """List all devices, and listen to their faults from now on. Raises NvmlUnavailable."""

    def sample(self, uuids: Sequence[str]) -> list[DeviceSample]:
        """Sample devices that `devices` has listed. A lost one has a sample that says so."""

    def wait_fault(self) -> Fault | None:
        """Wait for the next fault; None after FAULT_WAIT_MS."""

    def close(self) -> None:
        """Give NVML up."""


class DriverNvml:
    """The driver's own NVML, through nvidia-ml-py."""

    def __init__(self) -> None:
        """Load and initialise NVML. Raises NvmlUnavailable."""
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
        self._said_untold = False
        self._faults: Any = None

    def devices(self) -> list[DeviceInfo]:
        """List the driver's devices in its own order. Raises NvmlUnavailable."""
        try:
            found = [self._describe(index) for index in range(self._nvml.nvmlDeviceGetCount())]
        except self._error as error:
            raise NvmlUnavailable(f"NVML: {error}") from None
        self._listen()
        return found

    def _describe(self, index: int) -> DeviceInfo:
        """Describe a device and keep its handle. Raises NVMLError."""
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        self._handles[uuid] = handle
        return DeviceInfo(
            index=index,
            uuid=uuid,
            minor=int(nvml.nvmlDeviceGetMinorNumber(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            # Devices that cannot be split do not know the question.
            mig=self._maybe(lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]), False),
        )

    def _listen(self) -> None:
        """Ask to be told of faults; without it where the driver cannot."""
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
        """The answer to a question, or `default` where driver or device do not support it."""
        try:
            return ask()
        except self._error:
            return default

    def sample(self, uuids: Sequence[str]) -> list[DeviceSample]:
        """Sample devices; one that fails at the first question counts as lost."""
        return [self._sample(uuid) for uuid in uuids]

    def _sample(self, uuid: str) -> DeviceSample:
        nvml, handle = self._nvml, self._handles[uuid]
        try:
            memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        except self._error as error:
            return DeviceSample(uuid, lost=f"NVML: {error}")
        held = self._held(handle)
        busy = self._busy(uuid, handle)
        pids = sorted({*held, *(busy or {})})
        return DeviceSample(
            uuid,
            memory_used_bytes=memory,
            busy_percent=self._maybe(
                lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu), None
            ),
            energy_mj=self._maybe(
                lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)), None
            ),
            processes=tuple(
                ProcessUse(pid, held.get(pid), busy.get(pid) if busy else None) for pid in pids
            ),
            tells_processors=busy is not None,
        )

    def _held(self, handle: Any) -> dict[int, int | None]:
        """Bytes of a device's memory by pid; None where the driver does not tell them."""
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._error as error:
            if not self._said_untold:
                self._said_untold = True
                log.warning("which processes use a GPU is not told: NVML: %s", error)
            return {}
        return {
            int(process.pid): None if process.usedGpuMemory is None else int(process.usedGpuMemory)
            for process in running
        }

    def _busy(self, uuid: str, handle: Any) -> dict[int, float] | None:
        """Percent by pid, mean of the driver's samples since the last time; None where the driver
        cannot tell."""
        nvml = self._nvml
        since = self._seen_usec.get(uuid, int(time.time() * 1e6) - 1_000_000)
        try:
            samples: list[Any] = nvml.nvmlDeviceGetProcessUtilization(handle, since)
        except self._error as error:
            # nvidia-ml-py raises what NVML returned, and that is success where no process was
            # sampled at all.
            none_busy = (nvml.NVML_SUCCESS, nvml.NVML_ERROR_NOT_FOUND)
            return {} if getattr(error, "value", None) in none_busy else None
        sums: dict[int, list[float]] = {}
        for sample in samples:
            if sample.pid and sample.smUtil <= 100:
                sums.setdefault(int(sample.pid), []).append(float(sample.smUtil))
                self._seen_usec[uuid] = max(self._seen_usec.get(uuid, 0), int(sample.timeStamp))
        return {pid: sum(values) / len(values) for pid, values in sums.items()}

    def wait_fault(self) -> Fault | None:
        """Wait for the next fault; None after FAULT_WAIT_MS, or where none can be told."""
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
        """Shut NVML down."""
        if self._faults is not None:
            self._maybe(lambda: self._nvml.nvmlEventSetFree(self._faults), None)
        self._maybe(self._nvml.nvmlShutdown, None)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
