"""Daemon's side of look.bpf.c: what all calls hold, in one system call."""

from __future__ import annotations

import ctypes
from pathlib import Path

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.btf import Btf
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.bpf.loading import load_one
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId

OBJECT = "look"
STEP_BYTES = 1 << 20
"""A call whose use has moved by less since it was listed is not listed again."""
WORD_BYTES = 8
WORDS = ctypes.sizeof(abi.LookCall) // WORD_BYTES


def _word(name: str) -> int:
    return int(getattr(abi.LookCall, name).offset) // WORD_BYTES


USAGE, BEFORE = _word("usage_bytes"), _word("before_bytes")


class _NoContext(ctypes.Structure):
    """Context of a program that needs none: the kernel takes no empty one."""

    _fields_ = (("unused", ctypes.c_uint64),)


class LookProgram:
    """The loaded program, and a slot for each call that it looks at."""

    def __init__(self, bpf: BpfObject) -> None:
        """Take over a loaded object. Raises BpfError."""
        self._bpf = bpf
        self._places = bpf.map("places", abi.LookPlace)
        self._control = bpf.shared("control", abi.LookControl)
        self._control.step_bytes = STEP_BYTES
        kind: type[ctypes.Array[abi.LookCall]] = abi.LookCall * abi.ABI_LOOK_CALLS
        self.entries = bpf.shared("calls", kind)
        """What the last look has found, by slot."""
        self._words = memoryview(self.entries).cast("B").cast("Q")
        self._list = memoryview(self._control.list).cast("B").cast("I")
        self._free = list(range(abi.ABI_LOOK_CALLS - 1, -1, -1))
        self._context = _NoContext()

    def add(self, cgroup: CgroupId) -> int | None:
        """Look at a cgroup from now on, which is listed once it holds STEP_BYTES. Returns its slot;
        None: no slot is free. Raises BpfError."""
        if not self._free:
            return None
        slot = self._free[-1]
        self.entries[slot] = abi.LookCall()
        self._places[cgroup] = abi.LookPlace(slot=slot)
        return self._free.pop()

    def remove(self, cgroup: CgroupId, slot: int) -> None:
        """Look at a cgroup no more. Raises BpfError; the slot is not used again then."""
        self._places.pop(cgroup)
        self._free.append(slot)

    def look(self, root: CgroupId) -> list[int]:
        """Read what all cgroups with a slot hold that lie below `root`. Returns the slots of those
        that have moved. Raises BpfError; ENOENT: there is no such root."""
        self._control.root_id = root
        if self._bpf.run("look", self._context):
            raise BpfError(f"there is no cgroup {root} to look below", 2)
        return self._list[: self._control.listed].tolist()

    def usage_bytes(self, slot: int) -> int:
        """Bytes that a cgroup held at the last look."""
        return self._words[slot * WORDS + USAGE]

    def before_bytes(self, slot: int) -> int:
        """Bytes that a cgroup held at the look before that."""
        return self._words[slot * WORDS + BEFORE]

    @property
    def rounds(self) -> int:
        """Number of looks so far."""
        return int(self._control.round)

    def seen_in(self, slot: int) -> int:
        """Number of the last look that found the cgroup."""
        return int(self.entries[slot].round)

    def close(self) -> None:
        """Unload the program."""
        self._bpf.close()


def load(
    objects: Path | None = None, btf: Btf | None = None
) -> tuple[LookProgram | None, list[FeatureState]]:
    """Load the program if this kernel can have it; returns like features.load, and raises no
    BpfError. `btf`: the kernel's types, where they are not those of its own image."""
    return load_one(OBJECT, LookProgram, objects, btf)
