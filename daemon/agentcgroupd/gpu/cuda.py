"""The functions of libcuda that are probed, and where they are in a library's file.

The symbol table does not list all of them: the CUDA runtime asks cuGetProcAddress, which may give
out other addresses. The host's own library is asked too, in a process of its own. A library that
somebody else brought is only read, never run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from agentcgroupd.bpf.abi import CudaCall
from agentcgroupd.bpf.elf import Library

ASK_TIMEOUT_S = 20.0

CALLS: dict[str, CudaCall] = {
    "cuMemAlloc_v2": CudaCall.ALLOC,
    "cuMemAllocManaged": CudaCall.ALLOC,
    "cuMemAllocAsync": CudaCall.ALLOC,
    "cuMemAllocAsync_ptsz": CudaCall.ALLOC,
    "cuMemAllocFromPoolAsync": CudaCall.ALLOC,
    "cuMemAllocFromPoolAsync_ptsz": CudaCall.ALLOC,
    "cuMemAllocPitch_v2": CudaCall.ALLOC_PITCH,
    "cuMemCreate": CudaCall.CREATE,
    "cuArrayCreate_v2": CudaCall.ARRAY,
    "cuArray3DCreate_v2": CudaCall.ARRAY_3D,
    "cuMipmappedArrayCreate": CudaCall.MIPMAP,
    "cuMemFree_v2": CudaCall.FREE,
    "cuMemFreeAsync": CudaCall.FREE,
    "cuMemFreeAsync_ptsz": CudaCall.FREE,
    "cuMemRelease": CudaCall.RELEASE,
    "cuArrayDestroy": CudaCall.ARRAY_DESTROY,
    "cuMipmappedArrayDestroy": CudaCall.MIPMAP_DESTROY,
    "cuMemMap": CudaCall.MAP,
    "cuMemUnmap": CudaCall.UNMAP,
    "cuMemRetainAllocationHandle": CudaCall.RETAIN,
    "cuCtxCreate_v2": CudaCall.CTX_CREATE,
    "cuCtxCreate_v3": CudaCall.CTX_CREATE,
    "cuCtxCreate_v4": CudaCall.CTX_CREATE,
    "cuCtxSetCurrent": CudaCall.CTX_SET,
    "cuCtxPushCurrent_v2": CudaCall.CTX_PUSH,
    "cuCtxPopCurrent_v2": CudaCall.CTX_POP,
    "cuCtxDestroy_v2": CudaCall.CTX_DESTROY,
    "cuDevicePrimaryCtxRetain": CudaCall.PRIMARY_RETAIN,
    "cuDevicePrimaryCtxReset_v2": CudaCall.PRIMARY_RESET,
}
"""Functions by their names in cuda.h. Those with the same CudaCall have the same arguments, as far
as the probes read them."""

LAUNCHES: tuple[str, ...] = (
    "cuLaunchKernel",
    "cuLaunchKernel_ptsz",
    "cuLaunchKernelEx",
    "cuLaunchKernelEx_ptsz",
    "cuLaunchCooperativeKernel",
    "cuLaunchCooperativeKernel_ptsz",
    "cuGraphLaunch",
    "cuGraphLaunch_ptsz",
)
"""Functions that give work to the GPU, except copies."""

SIGNATURE = "cuMemAlloc_v2"
"""A library that has this function is libcuda, whatever it is called."""

VERSIONS = (3020, 4000, 6000, 7000, 8000, 10020, 11020, 11040, 12000, 12050, 13000)
"""Versions of the interface at which a name got another function (cuda.h, cudaTypedefs.h)."""
STREAM_FLAGS = (0, 1, 2)
"""CU_GET_PROC_ADDRESS_*: which default stream the function is to use (cuda.h)."""


def base_name(name: str) -> str:
    """A function's name as cuGetProcAddress takes it: without version and stream."""
    name = name.removesuffix("_ptsz")
    stem, _, version = name.rpartition("_v")
    return stem if stem and version.isdigit() else name


def offsets(
    library: Library, given_out: Mapping[str, list[int]], names: Mapping[str, CudaCall]
) -> dict[int, CudaCall]:
    """Offsets in the file of the functions that it has, with the kind of each. `given_out`: offsets
    by name from `ask`. Raises NotElf."""
    found = {offset: names[name] for name, offset in library.exports(names)}
    for name, places in given_out.items():
        if name in names:
            for place in places:
                found.setdefault(place, names[name])
    return found


def ask(path: Path) -> dict[str, list[int]]:
    """Ask cuGetProcAddress of a trusted library: offsets in the file, by the names in CALLS and
    LAUNCHES. Runs the library, in a process of its own. Raises OSError or ValueError."""
    argv = [sys.executable, "-m", "agentcgroupd.gpu.probe_cuda", str(path)]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{path} did not answer within {ASK_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise OSError(f"{path} could not be asked: {last[0]}")
    answer = json.loads(done.stdout)
    return {str(name): [int(place) for place in places] for name, places in answer.items()}
