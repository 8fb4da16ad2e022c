"""Which device files are a GPU's, and who may open them.

Major numbers are data: they are read from /proc/devices, where the driver's have names that begin
with `nvidia`; those of all GPUs are looked after, whoever may open them.
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

DEVICES = Path("/proc/devices")
PREFIX = "nvidia"
_GPU_NAMES = ("nvidia", "nvidia-frontend", "nvidiactl", "nvidia-modeset")
"""Names under which a driver registers the major of /dev/nvidia<n>; others, as nvidia-uvm and
nvidia-caps, are of no single GPU."""


def read_majors(text: str) -> dict[int, abi.GpuMajorKind]:
    """The driver's character devices in the text of /proc/devices (proc(5))."""
    found: dict[int, abi.GpuMajorKind] = {}
    for line in text.partition("Block devices:")[0].splitlines():
        number, _, name = line.strip().partition(" ")
        if not number.isdigit() or not name.startswith(PREFIX):
            continue
        kind = abi.GpuMajorKind.DEVICES if name in _GPU_NAMES else abi.GpuMajorKind.SHARED
        # One major has several names; that of single GPUs decides.
        if found.get(int(number)) != abi.GpuMajorKind.DEVICES:
            found[int(number)] = kind
    return found


class Gate:
    """Closed for everyone below a cgroup that it is put on, but for those let through."""

    def __init__(
        self,
        programs: DevicePrograms,
        majors: Callable[[], Mapping[int, abi.GpuMajorKind]] | None = None,
    ) -> None:
        """`majors`: where they are known from; None: /proc/devices. Raises BpfError or OSError."""
        self._programs = programs
        self._read = majors or (lambda: read_majors(DEVICES.read_text(encoding="ascii")))
        self._majors: dict[int, abi.GpuMajorKind] = {}
        self.refresh()

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Tell of devices that were opened or refused, on the running loop."""
        self._programs.start(handle)

    def refresh(self) -> None:
        """Look again which devices there are: a driver may be loaded later. Raises BpfError or
        OSError."""
        majors = dict(self._read())
        if majors != self._majors:
            self._programs.set_majors(majors)
            self._majors = majors

    @property
    def majors(self) -> Mapping[int, abi.GpuMajorKind]:
        """Those looked after."""
        return self._majors

    @property
    def refused(self) -> int:
        """How often something was refused."""
        return int(self._programs.counters.refused)

    def close_for(self, cgroup: Cgroup) -> None:
        """Put it on the pool or on an adopted session. Raises BpfError."""
        try:
            self._programs.attach(cgroup)
        except BpfError as error:
            if error.errno == errno.EPERM:
                raise BpfError(
                    f"{error.what}: a program above it admits no others (it was attached without "
                    "BPF_F_ALLOW_MULTI)", error.errno,
                ) from None  # fmt: skip
            raise

    def open_for(self, cgroup: Cgroup) -> None:
        """Take it off. Raises BpfError; no error for a cgroup that is gone."""
        try:
            device.detach(cgroup)
        except (CgroupGone, FileNotFoundError):
            log.debug("%s is gone, and its gate with it", cgroup.path)

    def admit(self, cgroup: CgroupId, minors: Iterable[int]) -> None:
        """Let what is in a cgroup, or below it, open these GPUs. Raises BpfError."""
        self._programs.allow(cgroup, minors)

    def expel(self, cgroup: CgroupId) -> None:
        """As if it had never been admitted; files that are open stay open. Raises BpfError."""
        self._programs.forbid(cgroup)

    def close(self) -> None:
        """Give up the maps; what is attached stays in force."""
        self._programs.close()
