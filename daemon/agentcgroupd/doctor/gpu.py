"""What of GPU sharing works on this host, found out by trying."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from agentcgroupd.bpf import features
from agentcgroupd.bpf.device import DevicePrograms
from agentcgroupd.bpf.vram import VramPrograms
from agentcgroupd.doctor.diagnosis import AS_ROOT, ONLY_ROOT, Check, Feature, State
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu.gate import driver_majors
from agentcgroupd.gpu.mps import PROGRAM
from agentcgroupd.gpu.nvml import DeviceInfo, DriverNvml, NvmlUnavailable
from agentcgroupd.units import show_bytes

GATE = "GPU gate"
GATE_FALLBACK = "device files of GPUs are open to every session that can see them"

MPS = Check(
    name="GPU shares by MPS",
    yes=f"{PROGRAM} is there",
    no=f"{PROGRAM} is not in PATH",
    remedy="install it (it comes with the driver)",
    fallback="turns: calls are frozen and thawed",
)
PROBES = Check(
    name="GPU memory by probes",
    yes="allocations over the quota are refused before the driver is asked",
    no="probes account, but this kernel does not let them refuse",
    remedy="use Linux 6.19 or newer",
    fallback="MPS' limit where it runs, and counting by NVML",
)


def gpu_features() -> Iterator[Feature]:
    """The driver, MPS where there is one, the gate and the probes."""
    yield from _driver_features()
    if os.geteuid() != 0:
        for name in (GATE, PROBES.name):
            yield Feature(name, State.UNKNOWN, ONLY_ROOT, AS_ROOT)
        return
    yield _gate()
    yield _probes()


def _driver_features() -> Iterator[Feature]:
    try:
        nvml = DriverNvml()
        devices = nvml.devices()
    except NvmlUnavailable as error:
        remedy = "install NVIDIA's driver and agentcgroup[gpu], where there is a GPU"
        fallback = "calls that ask for a part of one are refused"
        yield Feature("GPUs", State.MISSING, str(error), remedy, fallback)
        return
    state = State.WORKS if devices else State.MISSING
    names = ", ".join(map(_describe, devices)) or "no device"
    yield Feature("GPUs", state, f"driver {nvml.driver}; {names}")
    nvml.close()
    yield MPS.answered(shutil.which(PROGRAM) is not None)


def _describe(device: DeviceInfo) -> str:
    text = f"{device.index}: {device.name}, {show_bytes(device.memory_bytes)}"
    return f"{text} (split: MIG)" if device.mig else text


def _gate() -> Feature:
    try:
        DevicePrograms.load().close()
    except BpfError as error:
        reason, remedy = features.one_line(error), features.remedy_of(error)
        return Feature(GATE, State.MISSING, reason, remedy, GATE_FALLBACK)
    majors = ", ".join(map(str, sorted(driver_majors())))
    seen = f"majors {majors}" if majors else "no driver is loaded"
    return Feature(GATE, State.WORKS, f"the kernel takes device programs; {seen}")


def _probes() -> Feature:
    try:
        programs = VramPrograms.load()
    except BpfError as error:
        return PROBES.missing(features.one_line(error))
    refuses = programs.refuses
    programs.close()
    return PROBES.answered(refuses)
