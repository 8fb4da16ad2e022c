"""`python -m agentcgroupd.gpu.probe_cuda LIBCUDA`: what cuGetProcAddress gives out, as JSON.

A process of its own, because it maps the driver's library and runs it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from agentcgroupd.gpu.cuda import _FLAGS, _VERSIONS, CALLS, LAUNCHES, base_name


def _file_offset(address: int, inode: int) -> int | None:
    """Offset in the library's file of an address of this process; None outside of it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, found, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return address - start + int(offset, 16) if int(found) == inode else None
    return None


def main(path: str) -> int:
    """Print {name: [offset, ...]}."""
    library = ctypes.CDLL(path)
    inode = os.stat(path).st_ino
    try:
        ask = library.cuGetProcAddress_v2
    except AttributeError:
        print("{}")
        return 0
    ask.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64,
                    ctypes.c_void_p)  # fmt: skip
    answer = _ask_all(ask, inode)
    if not answer and library.cuInit(0) == 0:
        # A driver that says nothing before it is started.
        answer = _ask_all(ask, inode)
    print(json.dumps(answer))
    return 0


def _ask_all(ask: Any, inode: int) -> dict[str, list[int]]:
    bases: dict[str, set[int]] = {}
    for base in {base_name(name) for name in (*CALLS, *LAUNCHES)}:
        for version in _VERSIONS:
            for flags in _FLAGS:
                pointer, status = ctypes.c_void_p(), ctypes.c_int()
                result = ask(base.encode(), ctypes.byref(pointer), version, flags,
                             ctypes.byref(status))  # fmt: skip
                place = _file_offset(pointer.value, inode) if pointer.value else None
                if result == 0 and place is not None:
                    bases.setdefault(base, set()).add(place)
    # A base has one function for each version of it; which is which the arguments do not say, but
    # those with other arguments than ours are older than the versions asked for.
    answer = {name: sorted(bases.get(base_name(name), ())) for name in (*CALLS, *LAUNCHES)}
    return {name: places for name, places in answer.items() if places}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
