"""Daemon's side of vram.bpf.c: quotas and accounts of GPU memory, and the probes on libcuda.

One link holds all the probes on a libcuda: a session of multi-probes (Linux 6.13). It is made with
bpf(2) itself, because the libbpf at hand may be too old to know such sessions.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.btf import KIND_ENUM, kernel_btf
from agentcgroupd.bpf.elf import first_export
from agentcgroupd.bpf.events import AnyEvent, RingBuffer
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.loader import BpfObject, why_refused
from agentcgroupd.errors import BpfError
from agentcgroupd.host import syscalls
from agentcgroupd.units import CgroupId

REFUSING, SEEING = "on_cuda", "on_cuda_seen"
"""The two programs for allocations: one refuses what is over the quota, one only reports it."""
NO_QUOTA = (1 << 64) - 1
# include/uapi/linux/bpf.h
BPF_LINK_CREATE = 28
BPF_TRACE_UPROBE_MULTI = 48
SESSION = "BPF_TRACE_UPROBE_SESSION"
"""A value of enum bpf_attach_type; its number is looked up in the kernel's types."""


class _LinkAttributes(ctypes.Structure):
    """union bpf_attr for BPF_LINK_CREATE of a uprobe_multi link."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("path", ctypes.c_uint64),
        ("offsets", ctypes.c_uint64),
        ("ref_ctr_offsets", ctypes.c_uint64),
        ("cookies", ctypes.c_uint64),
        ("cnt", ctypes.c_uint32),
        ("multi_flags", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


def session_type() -> int:
    """The kernel's number for a session of probes. Raises BpfError (EOPNOTSUPP: it has none)."""
    btf = kernel_btf()
    found = btf.find("bpf_attach_type", KIND_ENUM)
    number = btf.enumerators(found).get(SESSION) if found is not None else None
    if number is None:
        raise BpfError("the kernel has no sessions of user probes (Linux 6.13)", errno.EOPNOTSUPP)
    return number


class _VramObject(BpfObject):
    def expect(self, program: str, attach_type: int) -> None:
        """Before the load: set what a program will be attached to. Raises BpfError."""
        set_type = "bpf_program__set_expected_attach_type"
        libbpf().check(f"program {program}", set_type, self._program(program), attach_type)
        self._constant("may_refuse").value = program == REFUSING


class VramPrograms:
    """Quotas and accounts of cgroups, and the probes that fill the accounts."""

    def __init__(self, bpf: BpfObject, program: str, session: int) -> None:
        """Take over a loaded object with one of the two programs. Raises BpfError."""
        self._bpf, self._program, self._session = bpf, program, session
        self.refuses = program == REFUSING
        """Whether an allocation over the quota is refused; else it is only reported."""
        self._quotas = bpf.map("quotas", abi.VramQuota)
        self._accounts = bpf.map("accounts", abi.VramAccount)
        self._processes = bpf.map("processes", abi.VramProcess)
        self._ring: RingBuffer | None = None

    @classmethod
    def load(cls, objects: Path | None = None, refuse: bool = True) -> VramPrograms:
        """Load the object with the program that refuses allocations, or, where the kernel does not
        take that one or `refuse` is false, with the one that only reports them. Raises BpfError, of
        the last one tried."""
        session = session_type()
        path = objects / "vram.bpf.o" if objects else None
        wanted = (REFUSING, SEEING) if refuse else (SEEING,)
        for program in wanted:
            bpf = _VramObject.open("vram", path)
            try:
                for other in {REFUSING, SEEING} - {program}:
                    bpf.skip_program(other)
                bpf.expect(program, session)
                bpf.load()
                bpf.attach("on_end")
                made = cls(bpf, program, session)
                if program == REFUSING:
                    made.try_on()
                return made
            except BpfError:
                bpf.close()
                if program == wanted[-1]:
                    raise
            except BaseException:
                bpf.close()
                raise
        raise AssertionError("one of the two was tried last")

    def try_on(self) -> None:
        """Attach to a function of some library of Python's, and detach: there are kernels that load
        a program which writes registers, but refuse to attach it. Raises BpfError."""
        path = Path(os.__file__).with_name("lib-dynload")
        library = next(iter(sorted(path.glob("*.so"))), None)
        if library is None:
            return
        os.close(self.attach(str(library), {first_export(library): abi.CudaCall.NONE}))

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Hand over events on the running loop from now on. Raises BpfError."""
        self._ring = RingBuffer(self._bpf.map_fd("events"), handle)
        self._ring.start()

    def attach(self, path: str, offsets: Mapping[int, abi.CudaCall]) -> int:
        """Probe functions of a library, by offset in its file. Returns the link's descriptor; the
        probes stay until the caller closes it. Raises BpfError."""
        return self._link(self._program, self._session, path, offsets, 0)

    def attach_launches(self, path: str, offsets: Mapping[int, abi.CudaCall], pid: int = 0) -> int:
        """Probe the functions that give work to the GPU, in one process (0: in all). Returns a
        descriptor like `attach`. Raises BpfError."""
        return self._link("on_launch", BPF_TRACE_UPROBE_MULTI, path, offsets, pid)

    def _link(
        self, program: str, kind: int, path: str, offsets: Mapping[int, abi.CudaCall], pid: int
    ) -> int:
        count = len(offsets)
        places = (ctypes.c_uint64 * count)(*offsets)
        cookies = (ctypes.c_uint64 * count)(*offsets.values())
        name = ctypes.create_string_buffer(path.encode())
        attributes = _LinkAttributes(
            prog_fd=self._bpf.program_fd(program),
            attach_type=kind,
            path=ctypes.addressof(name),
            offsets=ctypes.addressof(places),
            cookies=ctypes.addressof(cookies),
            cnt=count,
            pid=pid,
        )
        try:
            fd = syscalls.bpf(BPF_LINK_CREATE, attributes)
        except OSError as error:
            number = error.errno or errno.EINVAL
            why = why_refused(number)
            raise BpfError(f"probing {path}" + (f" ({why})" if why else ""), number) from None
        os.set_inheritable(fd, False)
        return fd

    # Accounts

    def set_quota(self, cgroup: CgroupId, quota_bytes: int | None, watch: bool = False) -> None:
        """Account the GPU memory of a cgroup and all below it, and hold it to a quota (None: to
        none). `watch`: report once that the cgroup gives work to the GPU. Raises BpfError."""
        quota = NO_QUOTA if quota_bytes is None else quota_bytes
        self._quotas[cgroup] = abi.VramQuota(quota_bytes=quota, watch=watch)

    def drop(self, cgroup: CgroupId) -> None:
        """Drop a cgroup's quota and account; no error if it has none. Raises BpfError."""
        self._quotas.pop(cgroup)
        self._accounts.pop(cgroup)

    def account(self, cgroup: CgroupId) -> abi.VramAccount:
        """Account of a cgroup; all zero if nothing of it has been seen. Raises BpfError."""
        return self._accounts.get(cgroup) or abi.VramAccount()

    def prune(self) -> int:
        """Drop the handles of processes that have ended. Returns how many. Raises BpfError."""
        removed = 0
        for name in ("allocations", "mappings", "contexts", "primaries"):
            for key in list(self._keys(name)):
                process = self._processes.get(key.tgid)
                if process is None or process.start_ns != key.start_ns:
                    libbpf().call("bpf_map_delete_elem", self._bpf.map_fd(name), ctypes.byref(key))
                    removed += 1
        return removed

    def handles(self, name: str = "allocations") -> int:
        """Number of handles in a map. Raises BpfError."""
        return sum(1 for _ in self._keys(name))

    def _keys(self, name: str) -> Iterator[abi.VramKey]:
        fd, before = self._bpf.map_fd(name), None
        while True:
            key = abi.VramKey()
            last = ctypes.byref(before) if before else None
            result = libbpf().call("bpf_map_get_next_key", fd, last, ctypes.byref(key))
            if result == -errno.ENOENT:
                return
            if result < 0:
                raise BpfError(f"map {name}: keys", -result)
            yield key
            before = key

    def close(self) -> None:
        """Unload the programs. The callers of `attach` close their links before."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._bpf.close()
