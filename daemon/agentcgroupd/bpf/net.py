"""Daemon's side of net.bpf.c: what the sockets of cgroups receive and send, and may send."""

from __future__ import annotations

import os
import time
from pathlib import Path

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.bpf.loading import load_one
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId

OBJECT = "net"
NO_LEVEL = 1 << 16
"""Deeper than any tree of cgroups."""
# include/uapi/linux/bpf.h: enum bpf_attach_type
_PROGRAMS = {"on_receive": 0, "on_send": 1}


class NetPrograms:
    """The loaded programs, and an entry for each cgroup whose traffic is counted."""

    def __init__(self, bpf: BpfObject) -> None:
        """Take over a loaded object. Raises BpfError."""
        self._bpf = bpf
        self._traffic = bpf.map("traffic", abi.NetTraffic)
        self._control = bpf.shared("control", abi.NetControl)
        self._control.first_level = NO_LEVEL
        self._links: dict[CgroupId, list[int]] = {}

    def attach(self, cgroup: Cgroup) -> None:
        """Count below a cgroup from now on, beside other programs there, until `detach`, `close` or
        the end of this process. Raises BpfError; then nothing is attached."""
        links = self._links.setdefault(cgroup.id, [])
        try:
            fd = os.open(cgroup.proc_path(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise BpfError(f"opening {cgroup.path}", error.errno or 0) from None
        try:
            for name, kind in _PROGRAMS.items():
                program, what = self._bpf.program_fd(name), f"attaching net/{name}"
                link = libbpf().check(what, "bpf_link_create", program, fd, kind, None)
                links.append(link)
        except BpfError:
            self.detach(cgroup.id)
            raise
        finally:
            os.close(fd)

    def detach(self, cgroup: CgroupId) -> None:
        """Count below a cgroup no more; no error if that was not done."""
        for link in self._links.pop(cgroup, ()):
            os.close(link)

    def look_from(self, level: int) -> None:
        """Look for entries of cgroups at this level below the root too, and from now on. Each level
        costs time with each packet, and before this is called, none is looked at."""
        self._control.first_level = min(self._control.first_level, max(1, level))

    def follow(self, cgroup: CgroupId, send_bytes_per_s: int | None = None) -> None:
        """Count for a cgroup, from zero, and refuse what it sends above a rate. Raises BpfError."""
        self._traffic[cgroup] = abi.NetTraffic(send_bytes_per_s=send_bytes_per_s or 0)

    def limit(self, cgroup: CgroupId, send_bytes_per_s: int | None) -> None:
        """Change the rate of a cgroup, also of one that is not followed yet. What it sends or
        receives in this moment may not be counted. Raises BpfError."""
        found, rate = self._traffic.get(cgroup) or abi.NetTraffic(), send_bytes_per_s or 0
        before = found.send_bytes_per_s
        if rate == before:
            return
        now_ns = time.monotonic_ns()  # bpf_ktime_get_ns() has the same clock
        ahead_ns = max(0, found.paid_until_ns - now_ns)
        if rate and ahead_ns:  # so many bytes were sent too early, which take less time by now
            found.paid_until_ns = now_ns + ahead_ns * before // rate
        found.send_bytes_per_s = rate
        self._traffic[cgroup] = found

    def forget(self, cgroup: CgroupId) -> None:
        """Count for a cgroup no more; no error if that was not done. Raises BpfError."""
        self._traffic.pop(cgroup)

    def of(self, cgroup: CgroupId) -> abi.NetTraffic | None:
        """Give what was counted for a cgroup; None: it is not followed. Raises BpfError."""
        return self._traffic.get(cgroup)

    def close(self) -> None:
        """Detach and unload the programs."""
        for cgroup in list(self._links):
            self.detach(cgroup)
        self._bpf.close()


def load(objects: Path | None = None) -> tuple[NetPrograms | None, list[FeatureState]]:
    """Load the programs if this kernel can have them; returns like features.load, and raises no
    BpfError. They are attached to nothing yet."""
    return load_one(OBJECT, NetPrograms, objects)
