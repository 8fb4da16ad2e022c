"""`python -m tests.gpu.facts`: what this machine's kernel and driver do, one line for each thing
that the rest builds on. Nothing here is a test: it is what to read when a test fails."""

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
from agentcgroupd.gpu.gate import DEVICES, read_majors
from agentcgroupd.gpu.libraries import Libraries, _host_paths
from agentcgroupd.gpu.mps import ControlDaemon
from agentcgroupd.gpu.nvml import DriverNvml


def kernel() -> str:
    """Kernel, cgroups, tools."""
    tools = {name: shutil.which(name) for name in ("nvcc", "cc", "nvidia-cuda-mps-control")}
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if "cgroup2" in line]
    return f"{os.uname().release} {sys.version.split()[0]} {mounts} {tools}"


def majors() -> str:
    """Device files."""
    nodes = sorted(p.name for p in Path("/dev").glob("nvidia*"))
    return f"{read_majors(DEVICES.read_text())} {nodes}"


def devices() -> str:
    """NVML."""
    nvml = DriverNvml()
    found = nvml.devices()
    began = time.perf_counter()
    sample = nvml.sample([d.uuid for d in found])
    took = time.perf_counter() - began
    fault = nvml.wait_fault()
    nvml.close()
    return f"driver {nvml.driver} {found} sample in {took * 1e3:.1f} ms: {sample} fault: {fault}"


def gate() -> str:
    """cgroup_device."""
    DevicePrograms.load().close()
    return "loads"


def probes() -> str:
    """Uprobes: which program, and on what."""
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
    return (f"refuses={programs.refuses} {found} {places} in {took:.2f} s, away in "
            f"{time.perf_counter() - began:.2f} s, failures {failures}")  # fmt: skip


def addresses() -> str:
    """Whether cuGetProcAddress gives out what the symbol table has."""
    lines = []
    for path in dict.fromkeys(map(os.path.realpath, _host_paths())):
        given = cuda.ask(Path(path))
        with Library(path) as library:
            own = dict(library.exports({*cuda.CALLS, *cuda.LAUNCHES}))
        missing = [n for n in (*cuda.CALLS, *cuda.LAUNCHES) if n not in own]
        apart = {n: (hex(own[n]), [hex(p) for p in given[n]]) for n in own
                 if n in given and own[n] not in given[n]}  # fmt: skip
        lines.append(f"{path}: {len(own)} exported, {len(given)} given out, not exported: "
                     f"{missing}, elsewhere: {apart}")  # fmt: skip
    return "; ".join(lines)


def mps() -> str:
    """Start, ask, stop."""
    with tempfile.TemporaryDirectory(prefix="mps-") as directory:
        base = Path(directory)
        control = ControlDaemon(base / "p", base / "l", ["0"])
        began = time.perf_counter()
        pid = control.start()
        started = time.perf_counter() - began
        said = [control.ask(c) for c in ("get_default_active_thread_percentage",
                                         "get_server_list", "lscli", "help")]  # fmt: skip
        files = sorted(p.name for p in (base / "p").iterdir())
        began = time.perf_counter()
        control.stop()
        return (f"pid {pid} in {started:.2f} s, stopped in {time.perf_counter() - began:.2f} s, "
                f"{files}, said {said[:3]} {said[3][:700]!r}")  # fmt: skip


def smi() -> str:
    """The driver's own words."""
    done = subprocess.run(["nvidia-smi", "--query-gpu=name,uuid,compute_mode,mig.mode.current,"
                           "persistence_mode", "--format=csv,noheader"],
                          capture_output=True, text=True, timeout=30, check=False)  # fmt: skip
    return (done.stdout + done.stderr).strip()


def main() -> int:
    """All of them, whatever becomes of each."""
    facts: tuple[Callable[[], str], ...] = (
        kernel, majors, smi, devices, gate, probes, addresses, mps,
    )  # fmt: skip
    for fact in facts:
        try:
            print(f"{fact.__name__}: {fact()}", flush=True)
        except Exception:  # noqa: BLE001  # the next one may still say something
            print(f"{fact.__name__}: FAILED: {traceback.format_exc(limit=3)[-800:]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
