"""Daemon's side of device.bpf.c: the cgroups, and the GPUs that each may open.

The program is attached without a link, so that it stays in force when the daemon is killed. The
next daemon fills the maps of its own program with the sessions and calls that it finds, attaches
that program, and only then detaches the old one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent, RingBuffer
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId

PROGRAM = "on_device"
# include/uapi/linux/bpf.h
BPF_CGROUP_DEVICE = 6
BPF_F_ALLOW_MULTI = 1 << 1
PROGRAMS_MOST = 64
"""BPF_CGROUP_MAX_PROGS, include/linux/bpf-cgroup-defs.h."""


class _ProgramInfo(ctypes.Structure):
    """struct bpf_prog_info, up to the member `name`."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("lengths", ctypes.c_uint32 * 2),
        ("pointers", ctypes.c_uint64 * 2),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


class DevicePrograms:
    """The gate in front of the GPUs' device files: its program and maps."""

    def __init__(self, bpf: BpfObject) -> None:
        """Take over a loaded object. Raises BpfError."""
        self._bpf = bpf
        self._majors = bpf.map("majors", abi.GpuMajor)
        self._access = bpf.map("access", abi.GpuAccess)
        self.counters = bpf.shared("counters", abi.DeviceCounters)
        self._ring: RingBuffer | None = None

    @classmethod
    def load(cls, objects: Path | None = None) -> DevicePrograms:
        """Load the object. Raises BpfError."""
        bpf = BpfObject.open("device", objects / "device.bpf.o" if objects else None)
        try:
            bpf.load()
            return cls(bpf)
        except BaseException:
            bpf.close()
            raise

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Hand over events on the running loop from now on. Raises BpfError."""
        self._ring = RingBuffer(self._bpf.map_fd("events"), handle)
        self._ring.start()

    def set_majors(self, majors: Mapping[int, abi.GpuMajorKind]) -> None:
        """Set the major numbers of the devices that the gate guards; devices with others are let
        through. Raises BpfError."""
        for major in list(self._majors.keys()):
            if major not in majors:
                self._majors.pop(major)
        for major, kind in majors.items():
            self._majors[major] = abi.GpuMajor(kind=kind)

    def allow(self, cgroup: CgroupId, minors: Iterable[int]) -> None:
        """Let processes in a cgroup, or below it, open the GPUs with these minor numbers, and no
        others. Raises BpfError."""
        entry = abi.GpuAccess()
        for minor in minors:
            entry.minors[minor >> 6] |= 1 << (minor & 63)
        self._access[cgroup] = entry

    def forbid(self, cgroup: CgroupId) -> None:
        """Take back what `allow` gave a cgroup; no error if that was nothing. Files that are open
        stay open. Raises BpfError."""
        self._access.pop(cgroup)

    def attach(self, cgroup: Cgroup) -> None:
        """Put the gate on a cgroup and all below it, beside other programs, in place of an earlier
        daemon's. Raises BpfError."""
        fd = os.open(cgroup.proc_path(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            before = _ours(fd)
            what, gate = f"attaching device/{PROGRAM} to {cgroup.path}", BPF_CGROUP_DEVICE
            program = self._bpf.program_fd(PROGRAM)
            libbpf().check(what, "bpf_prog_attach", program, fd, gate, BPF_F_ALLOW_MULTI)
            _detach(fd, before)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Unload everything except an attached program and its maps, which the kernel keeps."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._bpf.close()


def detach(cgroup: Cgroup) -> None:
    """Take the gate off a cgroup; no error if there is none. Raises BpfError."""
    fd = os.open(cgroup.proc_path(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _detach(fd, _ours(fd))
    finally:
        os.close(fd)


def attached(cgroup: Cgroup) -> list[str]:
    """Names of the device programs on a cgroup itself. Raises BpfError."""
    fd = os.open(cgroup.proc_path(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return [name for _, name in _programs(fd)]
    finally:
        os.close(fd)


def _programs(cgroup_fd: int) -> list[tuple[int, str]]:
    ids = (ctypes.c_uint32 * PROGRAMS_MOST)()
    count, flags = ctypes.c_uint32(PROGRAMS_MOST), ctypes.c_uint32()
    places = ctypes.byref(flags), ids, ctypes.byref(count)
    what = "device programs of a cgroup"
    libbpf().check(what, "bpf_prog_query", cgroup_fd, BPF_CGROUP_DEVICE, 0, *places)
    found = []
    for program in ids[: count.value]:
        fd = libbpf().call("bpf_prog_get_fd_by_id", program)
        if fd == -errno.ENOENT:
            continue  # unloaded since the query
        if fd < 0:
            raise BpfError(f"program {program}", -fd)
        info, size = _ProgramInfo(), ctypes.c_uint32(ctypes.sizeof(_ProgramInfo))
        what, to_info, to_size = f"program {program}", ctypes.byref(info), ctypes.byref(size)
        try:
            libbpf().check(what, "bpf_obj_get_info_by_fd", fd, to_info, to_size)
        finally:
            os.close(fd)
        found.append((program, info.name.decode("utf-8", "replace")))
    return found


def _ours(cgroup_fd: int) -> list[int]:
    return [program for program, name in _programs(cgroup_fd) if name == PROGRAM]


def _detach(cgroup_fd: int, programs: list[int]) -> None:
    for program in programs:
        fd = libbpf().check(f"program {program}", "bpf_prog_get_fd_by_id", program)
        what = f"detaching program {program}"
        try:
            libbpf().check(what, "bpf_prog_detach2", fd, cgroup_fd, BPF_CGROUP_DEVICE)
        finally:
            os.close(fd)
