"""memcg_ops.bpf.c on the daemon's side: reclaim spares sessions, and charges wait.

    hooks, states = load()
    if hooks is not None:
        hooks.attach(pool_fd)
        hooks.set(session, protect=True, stalled=True)

For kernels with the struct_ops memcg_bpf_ops, of which there is no release yet. Its versions differ
in the callbacks that there are, and in how a link names its cgroup; which one a kernel has is asked
of its types.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import replace
from pathlib import Path

from agentcgroupd.bpf import abi, features
from agentcgroupd.bpf.btf import KIND_STRUCT, Btf, kernel_btf
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId

OBJECT = "memcg_ops"
STRUCT = "memcg_bpf_ops"
FLAVOR = f"{STRUCT}___v1"
"""The struct with the callbacks of all versions, in the object."""
VALUE = f"bpf_struct_ops_{STRUCT}"
"""The kernel's struct around it, the value of a struct_ops map."""
MAP = "hooks"

# include/uapi/linux/bpf.h; the flag as proposed.
BPF_STRUCT_OPS = 44
BPF_F_CGROUP_FD = 1 << 7


class _LinkOptions(ctypes.Structure):
    """struct bpf_link_create_opts of libbpf, up to what is given here."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_void_p),
        ("iter_info_len", ctypes.c_uint32),
        ("target_btf_id", ctypes.c_uint32),
    )


class HooksObject(BpfObject):
    """The object, with the callbacks that a kernel has."""

    def keep_callbacks(self, btf: Btf) -> tuple[str, ...]:
        """Before the load: leave out every program that is not a callback of the kernel's struct.
        Returns the names of the others. Raises BpfError."""
        types = Btf(libbpf().pointer("no types", "bpf_object__btf", self._handle))
        flavor = types.find(FLAVOR, KIND_STRUCT)
        if flavor is None:
            raise BpfError(f"{self.path} has no struct {FLAVOR}", errno.EPROTO)
        size = ctypes.c_size_t()
        value = libbpf().pointer(f"map {MAP}: no value", "bpf_map__initial_value",
                                 self._map(MAP), ctypes.byref(size))  # fmt: skip
        kept = []
        for member in types.members(flavor):
            if btf.has_struct(STRUCT, member.name):
                kept.append(member.name)
            else:
                # Libbpf refuses a member that the kernel lacks, unless it is all zero.
                ctypes.c_uint64.from_address(value + member.offset_bits // 8).value = 0
        for program in self.programs():
            if program not in kept:
                self.skip_program(program)
        libbpf().check(f"map {MAP}", "bpf_map__set_autocreate", self._map(MAP), True)
        return tuple(kept)

    def fill(self, btf: Btf, callbacks: tuple[str, ...]) -> None:
        """After the load: give the kernel its struct, so that links to it can be made. Libbpf does
        so only in bpf_map__attach_struct_ops(), which knows no cgroup. Raises BpfError."""
        outer, inner = btf.find(VALUE, KIND_STRUCT), btf.find(STRUCT, KIND_STRUCT)
        data = btf.member(outer, "data") if outer else None
        if inner is None or data is None:
            raise BpfError(f"the kernel has no struct {VALUE}.data", errno.EPROTO)
        value = ctypes.create_string_buffer(
            libbpf().call("bpf_map__value_size", self._map(MAP))
        )  # fmt: skip
        for name in callbacks:
            member = btf.member(inner, name)
            if member is None:
                raise BpfError(f"the kernel has no struct {STRUCT}.{name}", errno.EPROTO)
            # In the place of the pointer stands the program's descriptor.
            place = (data.offset_bits + member.offset_bits) // 8
            ctypes.c_uint64.from_buffer(value, place).value = self.program_fd(name)
        libbpf().check(f"map {MAP}", "bpf_map_update_elem", self.map_fd(MAP),
                       ctypes.byref(ctypes.c_uint32(0)), value, 0)  # fmt: skip

    def link(self, btf: Btf, cgroup_fd: int) -> int:
        """Attach the struct to a cgroup and all below it. Returns the link's descriptor, which
        keeps it attached. Raises BpfError; EBUSY: something is attached there already."""
        options = _LinkOptions(sz=ctypes.sizeof(_LinkOptions))
        target = 0
        match cgroup_place(btf):
            case "cgroup":
                options.flags, target = BPF_F_CGROUP_FD, cgroup_fd
            case "cgroup_id":
                # bpf_attr.link_create.cgroup.relative_fd, which libbpf does not pass on for a
                # struct_ops; this member goes to the same place.
                options.target_btf_id = cgroup_fd
            case _:
                raise BpfError(_NO_CGROUPS, errno.EOPNOTSUPP)
        return libbpf().check(f"attaching {self.name}", "bpf_link_create", self.map_fd(MAP),
                              target, BPF_STRUCT_OPS, ctypes.byref(options))  # fmt: skip


_NO_CGROUPS = "the kernel attaches a struct_ops to the whole system, not to a cgroup"


def cgroup_place(btf: Btf) -> str:
    """Where the kernel's link keeps its cgroup: `cgroup_id` until v6 of the proposal, `cgroup`
    since v7; nothing for a kernel that would ignore the cgroup."""
    for member in ("cgroup", "cgroup_id"):
        if btf.has_struct("bpf_struct_ops_link", member):
            return member
    return ""


class ReclaimHooks:
    """The loaded hooks, what they are attached to, and what they are to do for whom."""

    def __init__(self, bpf: HooksObject, btf: Btf) -> None:
        """Takes over a loaded and filled object. Raises BpfError."""
        self._bpf, self._btf = bpf, btf
        self._protections = bpf.map("protections", abi.Protection)
        self._links: list[int] = []
        self.counters = bpf.shared("counters", abi.MemcgOpsCounters)

    def attach(self, cgroup_fd: int) -> None:
        """To a cgroup, best the pool, and all below it. Raises BpfError."""
        self._links.append(self._bpf.link(self._btf, cgroup_fd))

    def set(
        self,
        session: CgroupId,
        *,
        protect: bool = False,
        stalled: bool = False,
        delay_percent: int = 0,
        delay_cap_ms: int = abi.ABI_DELAY_CAP_MS,
    ) -> None:
        """What to do for a session and all below it. Reclaim spares it while it is to be protected
        and stalled; charges of one that is not to be protected wait `delay_percent` ms for each
        percent above memory.high, up to `delay_cap_ms`. Raises BpfError."""
        self._protections[session] = abi.Protection(
            protect=protect, stalled=stalled, delay_percent=delay_percent,
            delay_cap_ms=delay_cap_ms,
        )  # fmt: skip

    def remove(self, session: CgroupId) -> None:
        """Do nothing more for a session; no error if it is not known. Raises BpfError."""
        self._protections.pop(session)

    def close(self) -> None:
        """Detach, newest first, and unload; no error if that was done."""
        while self._links:
            os.close(self._links.pop())
        self._bpf.close()


def load(
    objects: Path | None = None, btf: Btf | None = None
) -> tuple[ReclaimHooks | None, list[FeatureState]]:
    """Load the hooks if this kernel can have them, attached to nothing yet.

    Returns them, or None, and what became of the feature, like features.load. Never raises
    BpfError. `btf`: the kernel's types, where they are not its own image's.
    """
    (definition,) = features.definitions_of(OBJECT)
    try:
        btf = btf or kernel_btf()
        state = features.gate(definition, btf)
        if not state.works:
            return None, [state]
        if not cgroup_place(btf):
            return None, [features.missing(definition, _NO_CGROUPS)]
        bpf = HooksObject.open(OBJECT, objects / f"{OBJECT}.bpf.o" if objects else None)
        try:
            callbacks = bpf.keep_callbacks(btf)
            bpf.load()
            bpf.fill(btf, callbacks)
            return ReclaimHooks(bpf, btf), [replace(state, programs=callbacks)]
        except BaseException:
            bpf.close()
            raise
    except BpfError as error:
        return None, [features.missing(definition, features.one_line(error))]
