"""Stand-ins for NVML and MPS that behave as the real ones do, told what to show by a file.

Faithful where the daemon depends on it: a lost device says so instead of showing numbers, use of
the processors is that since the last sample, a process that has ended is not shown, and the MPS
control daemon is a process that can die.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentcgroupd.bpf.abi import GpuMajorKind
from agentcgroupd.gpu.mps import MpsUnavailable
from agentcgroupd.gpu.nvml import DeviceInfo, DeviceSample, Fault, NvmlUnavailable, ProcessUse

LOCAL_MAJORS = (*range(240, 255), *range(120, 128), *range(60, 64))
"""Majors for local use (Documentation/admin-guide/devices.txt). Drivers are given those from 254
down, so on a machine with a real GPU some are taken."""


def unanswered(proc_devices: str) -> list[int]:
    """Local majors that no driver has, by the text of /proc/devices: an open that the gate lets
    through fails with ENXIO, and one that it refuses with EPERM."""
    characters = proc_devices.partition("Block devices:")[0].split("\n")
    taken = {int(line.split()[0]) for line in characters if line[:4].strip().isdigit()}
    return [major for major in LOCAL_MAJORS if major not in taken]


DEVICES_MAJOR, SHARED_MAJOR, OTHER_MAJOR = unanswered(
    Path("/proc/devices").read_text(encoding="ascii")
)[:3]
MAJORS = {DEVICES_MAJOR: GpuMajorKind.DEVICES, SHARED_MAJOR: GpuMajorKind.SHARED}
GIB = 1 << 30


def uuid_of(index: int) -> str:
    """The UUID of a fake device."""
    return f"GPU-{index:08x}-0000-0000-0000-000000000000"


def write_state(path: Path, **state: Any) -> None:
    """Set what the fakes show from now on.

    devices: how many, -1 for no driver; memory_gib: of each; processes: [[pid, device, bytes,
    percent], ...]; lost: indices; faults: [[device, xid], ...], each told once; mps: whether it can
    be had; clients: pids that are on MPS; untold: whether NVML cannot tell use of the processors.
    """
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state))
    part.replace(path)


class FakeNvml:
    """Stands in for nvml.DriverNvml."""

    driver = "fake"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = 0
        self._energy = 0.0
        self._at = time.monotonic()
        if self._state().get("devices", 0) < 0:
            raise NvmlUnavailable("NVML: driver not loaded")

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self._path.read_text())
        return state

    def devices(self) -> list[DeviceInfo]:
        """All devices of the state."""
        state = self._state()
        size = int(state.get("memory_gib", 80)) * GIB
        return [DeviceInfo(i, uuid_of(i), i, "Fake 100", size) for i in range(state["devices"])]

    def sample(self, uuids: Sequence[str]) -> list[DeviceSample]:
        """Samples of these devices, with the processes that are still there."""
        state = self._state()
        told = not state.get("untold", False)
        now = time.monotonic()
        passed, self._at = now - self._at, now
        found = []
        for index in range(state["devices"]):
            if uuid_of(index) not in uuids:
                continue
            if index in state.get("lost", ()):
                found.append(DeviceSample(uuid_of(index), lost="NVML: GPU is lost"))
                continue
            processes = tuple(
                ProcessUse(pid, memory, percent if told else None)
                for pid, device, memory, percent in state.get("processes", ())
                if device == index and os.path.exists(f"/proc/{pid}")
            )
            busy = sum(p.sm_percent or 0 for p in processes)
            self._energy += passed * (60_000 + 6_000 * busy)  # mW
            sample = DeviceSample(
                uuid_of(index),
                memory_used_bytes=sum(p.memory_bytes or 0 for p in processes),
                busy_percent=int(min(100, busy)) if told else None,
                energy_mj=int(self._energy),
                processes=processes,
                tells_processors=told,
            )
            found.append(sample)
        return found

    def wait_fault(self) -> Fault | None:
        """The next fault of the state, after a short wait."""
        time.sleep(0.05)
        faults = self._state().get("faults", ())
        if self._told >= len(faults):
            return None
        device, xid = faults[self._told]
        self._told += 1
        return Fault(uuid_of(device), xid)

    def close(self) -> None:
        """Do nothing: there is nothing to give up."""


class FakeMpsControl:
    """Stands in for mps.MpsControlDaemon; its process only sleeps, and a test may kill it."""

    def __init__(self, path: Path, pipes: Path) -> None:
        self._path, self._pipes = path, pipes
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Start the sleeping process, if the state has MPS. Raises MpsUnavailable."""
        if not json.loads(self._path.read_text()).get("mps"):
            raise MpsUnavailable("nvidia-cuda-mps-control is not installed")
        self._pipes.mkdir(parents=True, exist_ok=True)
        code = "import signal; signal.pause()"
        self._process = subprocess.Popen([sys.executable, "-S", "-c", code])
        (self._pipes / "nvidia-cuda-mps-control.pid").write_text(str(self._process.pid))
        return self._process.pid

    def ask(self, command: str) -> str:
        """Answer as the control daemon's shell does. Raises MpsUnavailable."""
        state = json.loads(self._path.read_text())
        if self._process is None or self._process.poll() is not None:
            raise MpsUnavailable("Cannot find MPS control daemon process")
        if command == "get_server_list":
            return "1"
        if command.startswith("get_client_list"):
            return "\n".join(map(str, state.get("clients", ())))
        return "100.0"

    def stop(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
