"""Daemon's side of lifecycle.bpf.c: the cgroups that are watched, and what happens in them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent, RingBuffer
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId

NO_EXIST = 1  # BPF_NOEXIST, include/uapi/linux/bpf.h


class Lifecycle:
    """Events of processes below managed cgroups: forks, execs, exits, OOM victims, leaving."""

    def __init__(self, bpf: BpfObject) -> None:
        """Take over a loaded and attached object. Raises BpfError."""
        self._bpf = bpf
        self._managed = bpf.map("managed", abi.Managed)
        self.counters = bpf.shared("counters", abi.LifecycleCounters)
        self._ring: RingBuffer | None = None

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Hand over events on the running loop from now on. Raises BpfError."""
        self._ring = RingBuffer(self._bpf.map_fd("events"), handle)
        self._ring.start()

    def manage(self, cgroup: CgroupId, kind: abi.CgroupKind) -> None:
        """Watch a cgroup and all below it. Raises BpfError; E2BIG: no room for another."""
        self._managed[cgroup] = abi.Managed(kind=kind)

    def unmanage(self, cgroup: CgroupId) -> None:
        """Stop watching; no error if it was not watched. Raises BpfError."""
        self._managed.pop(cgroup)

    def note(self, pid: int, call: CgroupId) -> None:
        """Have the programs know that a process is in a call, unless they know of one; no error for
        a process that has ended. Raises BpfError or OSError."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            key, value = ctypes.c_int(pidfd), ctypes.c_uint64(call)
            place, new = ctypes.byref(key), ctypes.byref(value)
            fd = self._bpf.map_fd("call_of")
            result = libbpf().call("bpf_map_update_elem", fd, place, new, NO_EXIST)
        finally:
            os.close(pidfd)
        if result < 0 and -result not in (errno.EEXIST, errno.ESRCH, errno.ENOENT):
            raise BpfError(f"map call_of: process {pid}", -result)

    def drain(self) -> None:
        """Hand over at once the events that are there, at most BATCH_EVENTS."""
        if self._ring is not None:
            self._ring.drain()

    def read(self, on: bool) -> None:
        """Go on handing over events, or leave them in the ring buffer for the time being."""
        if self._ring is not None:
            self._ring.read(on)

    def lost(self) -> dict[str, int]:
        """Number of events without room since the load, by type; those of processes that leave
        calls include processes whose call could not be kept."""
        counts = zip(abi.EventType, self.counters.lost, strict=False)
        return {kind.name.lower(): count for kind, count in counts if count}

    def missed(self) -> dict[str, int]:
        """Number of events for which a program was left out, because another task had interrupted
        it on that CPU, by type. A type that the kernel does not count is absent. Raises
        BpfError."""
        programs = {"fork": "on_fork", "exec": "on_exec", "exit": "on_exit", "left": "on_move"}
        attached = self._bpf.attached()
        counts = {k: self._bpf.missed(name) for k, name in programs.items() if name in attached}
        return {kind: count for kind, count in counts.items() if count is not None}

    def close(self) -> None:
        """Detach the programs and unload them."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._bpf.close()
