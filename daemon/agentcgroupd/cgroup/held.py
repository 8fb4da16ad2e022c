"""Interface files that are read again and again, through a descriptor that stays open."""

from __future__ import annotations

import os
from typing import Generic, TypeVar

from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import KnobError

T = TypeVar("T")

_READ_BYTES = 4096
"""The kernel gives no more of such a file at once (fs/seq_file.c), and all files that are read like
this are shorter."""


class HeldKnob(Generic[T]):
    """An interface file of a cgroup that stays. Where it has gone all the same, as when its
    controller was switched off, it is opened anew."""

    __slots__ = ("_cgroup", "_data", "_fd", "_knob", "_value")

    def __init__(self, cgroup: Cgroup, knob: Knob[T]) -> None:
        self._cgroup, self._knob = cgroup, knob
        self._fd = -1
        self._data: bytes | None = None
        self._value: T | None = None

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor up."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read_if(self) -> T | None:
        """Read the file, as `Cgroup.read_if` does; the value is shared with whoever reads the same
        again. Raises KnobError, or CgroupGone."""
        try:
            if self._fd < 0:
                self._fd = self._cgroup.open_file(self._knob, os.O_RDONLY)
            data = os.pread(self._fd, _READ_BYTES, 0)
        except (OSError, KnobError):
            self.close()
            return self._cgroup.read_if(self._knob)
        if data != self._data:
            self._value, self._data = self._knob.parse(data.decode()), data
        return self._value
