"""Device files of GPUs: which they are, and who may open them.

Major numbers are read from /proc/devices, where the driver registers its own under names that begin
with `nvidia`. The gate decides on every open of such a device; all others are none of its business.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from agentcgroupd.bpf import abi, device
from agentcgroupd.bpf.device import DevicePrograms
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import BpfError, CgroupGone
from agentcgroupd.units import CgroupId

log = logging.getLogger(__name__)

PROC_DEVICES = Path("/proc/devices")
PREFIX = "nvidia"
_GPU_NAMES = ("nvidia", "nvidia-frontend", "nvidiactl", "nvidia-modeset")
"""Names under which a driver registers the major of /dev/nvidia<n>; others, as nvidia-uvm and
nvidia-caps, are of no single GPU."""


def read_majors(text: str) -> dict[int, abi.GpuMajorKind]:
    """Find the driver's character devices in the text of /proc/devices (proc(5))."""
    found: dict[int, abi.GpuMajorKind] = {}
    for line in text.partition("Block devices:")[0].split("\n"):
        number, _, name = line.strip().partition(" ")
        if not number.isdigit() or not name.startswith(PREFIX):
            continue
        kind = abi.GpuMajorKind.DEVICES if name in _GPU_NAMES else abi.GpuMajorKind.SHARED
        # One major has several names; that of single GPUs decides.
        if found.get(int(number)) != abi.GpuMajorKind.DEVICES:
            found[int(number)] = kind
    return found


def driver_majors() -> dict[int, abi.GpuMajorKind]:
    """The majors that the driver has now; none where no driver is loaded. Raises OSError."""
    return read_majors(PROC_DEVICES.read_text(encoding="ascii"))


class Gate:
    """Keeps GPUs closed to all processes below a cgroup, except in the cgroups let through."""

    def __init__(
        self,
        programs: DevicePrograms,
        majors: Callable[[], Mapping[int, abi.GpuMajorKind]] = driver_majors,
    ) -> None:
        """`majors`: asked now and at each refresh. Raises BpfError or OSError."""
        self._programs = programs
        self._read = majors
        self._majors: dict[int, abi.GpuMajorKind] = {}
        self.refresh()

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Hand over events of devices that were opened or refused, on the running loop. Raises
        BpfError."""
        self._programs.start(handle)

    def refresh(self) -> None:
        """Read the majors anew, for a driver may be loaded later. Raises BpfError or OSError."""
        majors = dict(self._read())
        if majors != self._majors:
            self._programs.set_majors(majors)
            self._majors = majors

    @property
    def majors(self) -> Mapping[int, abi.GpuMajorKind]:
        """The majors that the gate decides on."""
        return self._majors

    @property
    def refused(self) -> int:
        """How many opens were refused."""
        return int(self._programs.counters.refused)

    def close_for(self, cgroup: Cgroup) -> None:
        """Put the gate on the pool or on an adopted session. Raises BpfError."""
        try:
            self._programs.attach(cgroup)
        except BpfError as error:
            if error.errno != errno.EPERM:
                raise
            what = (
                f"{error.what}: a program above it admits no others (it was attached without "
                "BPF_F_ALLOW_MULTI)"
            )
            raise BpfError(what, error.errno) from None

    def open_for(self, cgroup: Cgroup) -> None:
        """Take the gate off a cgroup; no error for one that is gone. Raises BpfError."""
        try:
            device.detach(cgroup)
        except (CgroupGone, FileNotFoundError):
            log.debug("%s is gone, and its gate with it", cgroup.path)

    def admit(self, cgroup: CgroupId, minors: Iterable[int]) -> None:
        """Let what is in a cgroup, or below it, open these GPUs. Raises BpfError."""
        self._programs.allow(cgroup, minors)

    def expel(self, cgroup: CgroupId) -> None:
        """Let a cgroup open nothing any more; files that are open stay open. Raises BpfError."""
        self._programs.forbid(cgroup)

    def close(self) -> None:
        """Give up the maps; programs that are attached stay in force."""
        self._programs.close()
