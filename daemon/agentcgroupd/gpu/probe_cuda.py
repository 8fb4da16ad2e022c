"""`python -m agentcgroupd.gpu.probe_cuda LIBCUDA`: what cuGetProcAddress gives out, as JSON.

Run as a process of its own, because it maps the driver's library and runs it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from agentcgroupd.gpu.cuda import CALLS, LAUNCHES, STREAM_FLAGS, VERSIONS, base_name


def _file_offset(address: int, inode: int) -> int | None:
    """Offset in the library's file of an address of this process; None outside of it."""
    for line in Path("/proc/self/maps").read_text().rstrip("\n").split("\n"):
        span, _, offset, _, found, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return address - start + int(offset, 16) if int(found) == inode else None
    return None


def main(path: str) -> int:
    """Print {name: [offset, ...]} for the library at `path`."""
    library = ctypes.CDLL(path)
    inode = os.stat(path).st_ino
    try:
        ask = library.cuGetProcAddress_v2
    except AttributeError:
        print("{}")
        return 0
    ask.argtypes = (
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_void_p,
    )
    answer = _ask_all(ask, inode)
    if not answer and library.cuInit(0) == 0:
        # A driver that says nothing before it is started.
        answer = _ask_all(ask, inode)
    print(json.dumps(answer))
    return 0


def _ask_all(ask: Any, inode: int) -> dict[str, list[int]]:
    """Offsets by the names in CALLS and LAUNCHES.

    Names that differ in version or stream only have one base, for which cuGetProcAddress gives out
    a function for each version; it does not say which of the names each of them has. So all names
    of a base get all its offsets. Functions with other arguments than CALLS knows are older than
    the versions that are asked for.
    """
    names = (*CALLS, *LAUNCHES)
    bases = {base: _offsets(ask, base, inode) for base in sorted(set(map(base_name, names)))}
    answer = {name: sorted(bases[base_name(name)]) for name in names}
    return {name: offsets for name, offsets in answer.items() if offsets}


def _offsets(ask: Any, base: str, inode: int) -> set[int]:
    """Offsets in the library's file of all functions that are given out for a name."""
    found = set()
    for version, flags in itertools.product(VERSIONS, STREAM_FLAGS):
        pointer, status = ctypes.c_void_p(), ctypes.c_int()
        result = ask(base.encode(), ctypes.byref(pointer), version, flags, ctypes.byref(status))
        offset = _file_offset(pointer.value, inode) if pointer.value else None
        if result == 0 and offset is not None:
            found.add(offset)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
