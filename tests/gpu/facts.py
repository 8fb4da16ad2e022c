"""`python -m tests.gpu.facts`: what this machine's kernel and driver do, one line for each thing
that GPU sharing builds on. For reading when a test fails; there is no test in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from agentcgroupd.bpf.device import DevicePrograms
from agentcgroupd.bpf.elf import Library
from agentcgroupd.bpf.vram import VramPrograms
from agentcgroupd.gpu import cuda
from agentcgroupd.gpu.gate import driver_majors
from agentcgroupd.gpu.libraries import Libraries, host_paths
from agentcgroupd.gpu.mps import MpsControlDaemon
from agentcgroupd.gpu.nvml import DriverNvml


def kernel() -> str:
    """Kernel, cgroup mounts, tools."""
    tools = {name: shutil.which(name) for name in ("nvcc", "cc", "nvidia-cuda-mps-control")}
    mounts = [line for line in Path("/proc/mounts").read_text().split("\n") if "cgroup2" in line]
    return f"{os.uname().release} {sys.version.split()[0]} {mounts} {tools}"


def majors() -> str:
    """Majors of the driver, and device files."""
    nodes = sorted(p.name for p in Path("/dev").glob("nvidia*"))
    return f"{driver_majors()} {nodes}"


def devices() -> str:
    """Devices, a sample and a fault, as NVML tells them."""
    nvml = DriverNvml()
    found = nvml.devices()
    began = time.perf_counter()
    sample = nvml.sample([d.uuid for d in found])
    took = time.perf_counter() - began
    fault = nvml.wait_fault()
    nvml.close()
    return f"driver {nvml.driver} {found} sample in {took * 1e3:.1f} ms: {sample} fault: {fault}"


def gate() -> str:
    """Whether the gate's program loads."""
    DevicePrograms.load().close()
    return "loads"


def probes() -> str:
    """Which program probes libcuda, at how many places, and how long that takes."""
    programs = VramPrograms.load()
    libraries = Libraries(programs)
    began = time.perf_counter()
    found = libraries.probe_host()
    took = time.perf_counter() - began
    places = {p.path: (len(p.calls), len(p.launches)) for p in libraries.probed.values()}
    failures = libraries.failures
    began = time.perf_counter()
    libraries.close()
    programs.close()
    away = time.perf_counter() - began
    return (
        f"refuses={programs.refuses} {found} {places} in {took:.2f} s, away in {away:.2f} s, "
        f"failures {failures}"
    )


def addresses() -> str:
    """Whether cuGetProcAddress gives out what the symbol table has."""
    lines = []
    for path in dict.fromkeys(map(os.path.realpath, host_paths())):
        given = cuda.ask(Path(path))
        with Library(path) as library:
            own = dict(library.exports({*cuda.CALLS, *cuda.LAUNCHES}))
        missing = [n for n in (*cuda.CALLS, *cuda.LAUNCHES) if n not in own]
        apart = {
            name: (hex(own[name]), list(map(hex, offsets)))
            for name, offsets in given.items()
            if name in own and own[name] not in offsets
        }
        counts = f"{len(own)} exported, {len(given)} given out"
        lines.append(f"{path}: {counts}, not exported: {missing}, elsewhere: {apart}")
    return "; ".join(lines)


def mps() -> str:
    """How long MPS takes to start and stop, and what its shell says."""
    with tempfile.TemporaryDirectory(prefix="mps-") as directory:
        base = Path(directory)
        control = MpsControlDaemon(base / "p", base / "l", ["0"])
        began = time.perf_counter()
        pid = control.start()
        started = time.perf_counter() - began
        commands = ("get_default_active_thread_percentage", "get_server_list", "lscli", "help")
        said = list(map(control.ask, commands))
        files = sorted(p.name for p in (base / "p").iterdir())
        began = time.perf_counter()
        control.stop()
        stopped = time.perf_counter() - began
        times = f"pid {pid} in {started:.2f} s, stopped in {stopped:.2f} s"
        return f"{times}, {files}, said {said[:3]} {said[3][:700]!r}"


def smi() -> str:
    """What nvidia-smi says of each device."""
    fields = "name,uuid,compute_mode,mig.mode.current,persistence_mode"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout + done.stderr).strip()


FACTS: tuple[Callable[[], str], ...] = (
    kernel,
    majors,
    smi,
    devices,
    gate,
    probes,
    addresses,
    mps,
)


def main() -> int:
    """Print all facts, whatever becomes of each."""
    for fact in FACTS:
        try:
            print(f"{fact.__name__}: {fact()}", flush=True)
        except Exception:  # noqa: BLE001  # the next one may still say something
            print(f"{fact.__name__}: FAILED: {traceback.format_exc(limit=3)[-800:]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
