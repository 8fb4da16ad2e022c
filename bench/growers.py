"""A program that takes memory in one of several ways, for benchmarks of what holds it back."""

from __future__ import annotations

import sys
from pathlib import Path

from agentcgroupd.policy.load import load_policy
from agentcgroupd.policy.scale import scaled
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.toml import to_toml
from tests.harness import DaemonProcess

GIB = 1 << 30
SMALL_BYTES, LARGE_BYTES = 4 * GIB, 8 * GIB
"""The policy's own sizes are for pools of this size."""
WAYS = ("touch", "populate", "mlock", "tmpfs")
"""Touching page by page; and three ways that take all inside one system call."""
CODE = """
import ctypes, mmap, os, sys, time
way, size, hold_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
c = ctypes.CDLL(None, use_errno=True)
c.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
c.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
def address(m):
    return ctypes.addressof(ctypes.c_char.from_buffer(m))
os.read(0, 1)
began = time.monotonic()
if way == "populate":
    m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x8000)
elif way == "tmpfs":
    m = os.memfd_create("m")
    os.posix_fallocate(m, 0, size)
else:
    m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if way == "mlock":
        if c.mlock(address(m), size):
            raise OSError(ctypes.get_errno(), "mlock")
    else:
        c.madvise(address(m), size, 15)  # MADV_NOHUGEPAGE: page by page, as most programs do
        ctypes.memset(address(m), 1, size)
print(time.monotonic() - began, flush=True)
time.sleep(hold_s)
"""
"""Begins when its standard input gives a byte or ends; says how many seconds it took; holds what it
has for a while."""


def grower(way: str, size_bytes: int, hold_s: float) -> list[str]:
    """Return the command line of a grower."""
    assert way in WAYS, way
    return [sys.executable, "-S", "-c", CODE, way, str(size_bytes), str(hold_s)]


def policy_for(pool_bytes: int) -> Policy:
    """Return the default policy. In a pool that is smaller than its sizes are meant for, they are
    smaller in proportion."""
    policy = load_policy(None, None).policy
    if pool_bytes >= SMALL_BYTES:
        return policy
    return scaled(policy, pool_bytes / LARGE_BYTES)


def daemon_with_pool(directory: Path, pool_bytes: int, config: str = "") -> DaemonProcess:
    """Make a daemon, not started yet, with a pool of this size and the policy for it."""
    path = directory / "policy.toml"
    path.write_text(to_toml(policy_for(pool_bytes)))
    pool = f'[pool]\nmemory_max = "{pool_bytes}"\n[policy]\npath = "{path}"\n'
    return DaemonProcess(directory, pool + config)
