"""Type information (BTF) of the kernel and of objects: is there a type, a member, a function?

The layout of a type's record is that of include/uapi/linux/btf.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from agentcgroupd.bpf.libbpf import libbpf

KIND_INT, KIND_PTR, KIND_ARRAY, KIND_STRUCT, KIND_UNION, KIND_ENUM = 1, 2, 3, 4, 5, 6
KIND_TYPEDEF, KIND_VOLATILE, KIND_CONST, KIND_RESTRICT = 8, 9, 10, 11
KIND_FUNC, KIND_VAR, KIND_DATASEC, KIND_TYPE_TAG = 12, 14, 15, 18
_TRANSPARENT = (KIND_TYPEDEF, KIND_VOLATILE, KIND_CONST, KIND_RESTRICT, KIND_TYPE_TAG)
VMLINUX = Path("/sys/kernel/btf/vmlinux")


class _Type(ctypes.Structure):
    _fields_ = (
        ("name_off", ctypes.c_uint32),
        ("info", ctypes.c_uint32),
        ("size_or_type", ctypes.c_uint32),
    )


class _Member(ctypes.Structure):
    _fields_ = (
        ("name_off", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
    )


class _Array(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("index_type", ctypes.c_uint32),
        ("nelems", ctypes.c_uint32),
    )


class _Enum(ctypes.Structure):
    _fields_ = (("name_off", ctypes.c_uint32), ("val", ctypes.c_int32))


class _SectionVariable(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct or union; `name` is empty for an anonymous one."""

    name: str
    type_id: int
    offset_bits: int


class Btf:
    """A set of types. Give it up with `close`; `kernel_btf` is kept for good."""

    def __init__(self, handle: int) -> None:
        """Wrap a struct btf of libbpf. Whoever calls `close` gives up `handle`; an object's own
        types belong to the object."""
        self._handle = handle
        self._call = libbpf().call

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """The types in an object or raw BTF file. Raises BpfError."""
        return cls(libbpf().pointer(f"types of {path}", "btf__parse", str(path).encode(), None))

    def close(self) -> None:
        """Free the types."""
        self._call("btf__free", self._handle)

    def find(self, name: str, *kinds: int) -> int | None:
        """Id of the type with that name and the first of the kinds that there is; None: none."""
        for kind in kinds:
            found = self._call("btf__find_by_name_kind", self._handle, name.encode(), kind)
            if found > 0:
                return int(found)
        return None

    def record(self, type_id: int) -> tuple[str, int, int, int]:
        """Record of a type: (name, kind, number of members or values, size in bytes or type id)."""
        record = _Type.from_address(self._call("btf__type_by_id", self._handle, type_id))
        kind, count = record.info >> 24 & 0x1F, record.info & 0xFFFF
        return self._name(record.name_off), kind, count, record.size_or_type

    def ids(self) -> range:
        """All type ids."""
        return range(1, int(self._call("btf__type_cnt", self._handle)))

    def _name(self, offset: int) -> str:
        return str(self._call("btf__name_by_offset", self._handle, offset).decode())

    def _tail(self, type_id: int) -> int:
        return int(self._call("btf__type_by_id", self._handle, type_id)) + ctypes.sizeof(_Type)

    def strip(self, type_id: int) -> int:
        """Id of the type behind typedefs and qualifiers; 0: void."""
        while type_id:
            _, kind, _, other = self.record(type_id)
            if kind not in _TRANSPARENT:
                break
            type_id = other
        return type_id

    def members(self, type_id: int) -> Iterator[Member]:
        """The direct members of a struct or union."""
        _, _, count, _ = self.record(type_id)
        bitfields = _Type.from_address(self._call("btf__type_by_id", self._handle, type_id)).info
        for member in (_Member * count).from_address(self._tail(type_id)):
            offset = member.offset & 0xFFFFFF if bitfields >> 31 else member.offset
            yield Member(self._name(member.name_off), member.type, offset)

    def member(self, type_id: int, name: str) -> Member | None:
        """The member of that name, looked for in anonymous structs and unions too; None: none."""
        for found in self.members(type_id):
            if found.name == name:
                return found
            inner = self.strip(found.type_id)
            if not found.name and inner and self.record(inner)[1] in (KIND_STRUCT, KIND_UNION):
                deeper = self.member(inner, name)
                if deeper is not None:
                    return Member(name, deeper.type_id, found.offset_bits + deeper.offset_bits)
        return None

    def array(self, type_id: int) -> tuple[int, int]:
        """Type of an array: (id of the elements' type, number of elements)."""
        array = _Array.from_address(self._tail(type_id))
        return array.type, array.nelems

    def enumerators(self, type_id: int) -> dict[str, int]:
        """Names and values of an enum of 32 bits."""
        count = self.record(type_id)[2]
        entries = (_Enum * count).from_address(self._tail(type_id))
        return {self._name(entry.name_off): entry.val for entry in entries}

    def variables(self, section: str) -> dict[str, tuple[int, int]]:
        """Places of the variables in a data section of an object: (offset, size) in bytes."""
        type_id = self.find(section, KIND_DATASEC)
        if type_id is None:
            return {}
        entries = (_SectionVariable * self.record(type_id)[2]).from_address(self._tail(type_id))
        return {self.record(e.type)[0]: (e.offset, e.size) for e in entries}

    # Questions about the kernel that a program is to run on

    def has_struct(self, name: str, member: str = "") -> bool:
        """Whether there is a struct (or union) of that name, with that member if one is given."""
        found = self.find(name, KIND_STRUCT, KIND_UNION)
        return found is not None and (not member or self.member(found, member) is not None)

    def has_function(self, name: str) -> bool:
        """Whether there is a function that a program can attach to or call."""
        return self.find(name, KIND_FUNC) is not None

    def has_tracepoint(self, name: str) -> bool:
        """Whether there is a tracepoint with typed arguments."""
        return self.find(f"btf_trace_{name}", KIND_TYPEDEF) is not None


@cache
def kernel_btf() -> Btf:
    """The running kernel's types, read once. Raises BpfError where it has none."""
    return Btf(libbpf().pointer("types of the running kernel", "btf__load_vmlinux_btf"))
