"""Daemon's side of memcg_ops.bpf.c: hooks by which reclaim spares sessions, and charges wait.

    hooks, states = load()
    if hooks is not None:
        hooks.attach(pool_fd)
        hooks.set(session, protect=True, stalled=True)

Only kernels with the struct_ops memcg_bpf_ops can have them, and no release has it yet. Versions of
that proposal differ in their callbacks, and in how a link names its cgroup; the kernel's types tell
which version it has.
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
"""The object's struct with the callbacks of all versions."""
VALUE = f"bpf_struct_ops_{STRUCT}"
"""The kernel's struct around it, the value of a struct_ops map."""
MAP = "hooks"

# include/uapi/linux/bpf.h; the flag as proposed.
BPF_STRUCT_OPS = 44
BPF_F_CGROUP_FD = 1 << 7


class _LinkOptions(ctypes.Structure):
    """struct bpf_link_create_opts of libbpf, up to the last member that is used here."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_void_p),
        ("iter_info_len", ctypes.c_uint32),
        ("target_btf_id", ctypes.c_uint32),
    )


class HooksObject(BpfObject):
    """The object of the hooks, with the callbacks that a kernel has."""

    def keep_callbacks(self, btf: Btf) -> tuple[str, ...]:
        """Before the load: leave out every program that is not a callback of the kernel's struct.
        Returns the names of the others. Raises BpfError."""
        types = self._types()
        flavor = types.find(FLAVOR, KIND_STRUCT)
        if flavor is None:
            raise BpfError(f"{self.path} has no struct {FLAVOR}", errno.EPROTO)
        value, _ = self._initial_value(MAP)
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
        """After the load: hand the struct to the kernel, so that links to it can be made. Libbpf
        does that only in bpf_map__attach_struct_ops(), which takes no cgroup. Raises BpfError."""
        outer, inner = btf.find(VALUE, KIND_STRUCT), btf.find(STRUCT, KIND_STRUCT)
        data = btf.member(outer, "data") if outer else None
        if inner is None or data is None:
            raise BpfError(f"the kernel has no struct {VALUE}.data", errno.EPROTO)
        value = ctypes.create_string_buffer(libbpf().call("bpf_map__value_size", self._map(MAP)))
        for name in callbacks:
            member = btf.member(inner, name)
            if member is None:
                raise BpfError(f"the kernel has no struct {STRUCT}.{name}", errno.EPROTO)
            # In the place of the pointer stands the program's descriptor.
            place = (data.offset_bits + member.offset_bits) // 8
            ctypes.c_uint64.from_buffer(value, place).value = self.program_fd(name)
        fd, key = self.map_fd(MAP), ctypes.byref(ctypes.c_uint32(0))
        libbpf().check(f"map {MAP}", "bpf_map_update_elem", fd, key, value, 0)

    def link(self, btf: Btf, cgroup_fd: int) -> int:
        """Attach the struct to a cgroup and all below it, for as long as the link's descriptor is
        open, which is returned. Raises BpfError; EBUSY: another one is attached there."""
        options = _LinkOptions(sz=ctypes.sizeof(_LinkOptions))
        target = 0
        match cgroup_place(btf):
            case "cgroup":
                options.flags, target = BPF_F_CGROUP_FD, cgroup_fd
            case "cgroup_id":
                # The kernel reads bpf_attr.link_create.cgroup.relative_fd, which libbpf does not
                # pass on for a struct_ops. This member is at the same place.
                options.target_btf_id = cgroup_fd
            case _:
                raise BpfError(_NO_CGROUPS, errno.EOPNOTSUPP)
        what, fd, place = f"attaching {self.name}", self.map_fd(MAP), ctypes.byref(options)
        return libbpf().check(what, "bpf_link_create", fd, target, BPF_STRUCT_OPS, place)


_NO_CGROUPS = "the kernel attaches a struct_ops to the whole system, not to a cgroup"


def cgroup_place(btf: Btf) -> str:
    """Name of the member in which the kernel's link keeps its cgroup: `cgroup_id` until v6 of the
    proposal, `cgroup` since v7; empty for a kernel that would ignore the cgroup."""
    for member in ("cgroup", "cgroup_id"):
        if btf.has_struct("bpf_struct_ops_link", member):
            return member
    return ""


class ReclaimHooks:
    """The loaded hooks: their links to cgroups, and what they do for each session."""

    def __init__(self, bpf: HooksObject, btf: Btf) -> None:
        """Take over a loaded and filled object. Raises BpfError."""
        self._bpf, self._btf = bpf, btf
        self._protections = bpf.map("protections", abi.Protection)
        self._links: list[int] = []
        self.counters = bpf.shared("counters", abi.MemcgOpsCounters)

    def attach(self, cgroup_fd: int) -> None:
        """Attach the hooks to a cgroup and all below it; the pool is the best. Raises BpfError."""
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
        """Set what the hooks do for a session and all below it. Reclaim spares a session that is
        both `protect` and `stalled`. In one that is not `protect`, a charge waits `delay_percent`
        ms for each percent above memory.high, up to `delay_cap_ms`. Raises BpfError."""
        self._protections[session] = abi.Protection(
            protect=protect,
            stalled=stalled,
            delay_percent=delay_percent,
            delay_cap_ms=delay_cap_ms,
        )

    def remove(self, session: CgroupId) -> None:
        """End `set` for a session; no error if it is not known. Raises BpfError."""
        self._protections.pop(session)

    def close(self) -> None:
        """Detach the hooks, the newest link first, and unload them; no error if that was done."""
        while self._links:
            os.close(self._links.pop())
        self._bpf.close()


def load(
    objects: Path | None = None, btf: Btf | None = None
) -> tuple[ReclaimHooks | None, list[FeatureState]]:
    """Load the hooks if this kernel can have them, without attaching them.

    Returns the hooks or None, and the state of the feature, like features.load. Raises no BpfError.
    `btf`: the kernel's types, where they are not those of its own image.
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
