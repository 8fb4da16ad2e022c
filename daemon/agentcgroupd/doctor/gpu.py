"""What of GPU sharing works on this host, found out by trying; for `agentcg doctor`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from agentcgroupd.bpf import features
from agentcgroupd.bpf.device import DevicePrograms
from agentcgroupd.bpf.vram import VramPrograms
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu.gate import driver_majors
from agentcgroupd.gpu.mps import PROGRAM
from agentcgroupd.gpu.nvml import DriverNvml, NvmlUnavailable
from agentcgroupd.units import show_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One thing. `works` None: it was not tried."""

    name: str
    works: bool | None
    reason: str
    remedy: str = ""
    fallback: str = ""


def rows() -> Iterator[Row]:
    """All of them; a host without GPUs has one row that says so, and those of the kernel."""
    yield from _driver()
    if os.geteuid() != 0:
        for name in ("GPU gate", "GPU memory by probes"):
            yield Row(name, None, "only root can try", "run `agentcg doctor` as root")
        return
    yield _gate()
    yield _probes()


def _driver() -> Iterator[Row]:
    try:
        nvml = DriverNvml()
        devices = nvml.devices()
    except NvmlUnavailable as error:
        yield Row("GPUs", False, str(error), "install NVIDIA's driver and agentcgroup[gpu], where "
                  "there is a GPU", "calls that ask for a part of one are refused")  # fmt: skip
        return
    names = ", ".join(f"{d.index}: {d.name}, {show_bytes(d.memory_bytes)}"
                      + (" (split: MIG)" if d.mig else "") for d in devices)  # fmt: skip
    yield Row("GPUs", bool(devices), f"driver {nvml.driver}; {names or 'no device'}")
    nvml.close()
    if shutil.which(PROGRAM):
        yield Row("GPU shares by MPS", True, f"{PROGRAM} is there")
    else:
        yield Row(
            "GPU shares by MPS", False, f"{PROGRAM} is not in PATH",
            "install it (it comes with the driver)", "turns: calls are frozen and thawed",
        )  # fmt: skip


def _gate() -> Row:
    fallback = "device files of GPUs are open to every session that can see them"
    try:
        DevicePrograms.load().close()
    except BpfError as error:
        return Row("GPU gate", False, features.one_line(error), features.remedy_of(error), fallback)
    majors = driver_majors()
    seen = f"majors {', '.join(map(str, sorted(majors)))}" if majors else "no driver is loaded"
    return Row("GPU gate", True, f"the kernel takes device programs; {seen}")


def _probes() -> Row:
    name = "GPU memory by probes"
    try:
        programs = VramPrograms.load()
    except BpfError as error:
        return Row(name, False, features.one_line(error), "use Linux 6.19 or newer",
                   "MPS' limit where it runs, and counting by NVML")  # fmt: skip
    refuses = programs.refuses
    programs.close()
    if refuses:
        return Row(name, True, "allocations over the quota are refused before the driver is asked")
    return Row(
        name, False, "probes account, but this kernel does not let them refuse",
        "use Linux 6.19 or newer", "MPS' limit where it runs, and counting by NVML",
    )  # fmt: skip
