"""Quota and accounting of GPU memory by probes, with a stand-in for libcuda, on this kernel.

Where the kernel does not let a probe refuse, what is over the quota is accounted and reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.elf import Library, NotElf
from agentcgroupd.bpf.vram import VramPrograms
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu import cuda
from agentcgroupd.gpu.libraries import Libraries
from tests.harness import ROOT, SLOW, wait_until
from tests.standin import build

pytestmark = pytest.mark.programs

QUOTA = 256 << 20
STEPS = 4000 if SLOW == 1 else 1500


@pytest.fixture(scope="module")
def programs() -> Iterator[VramPrograms]:
    """Probes on the stand-in."""
    try:
        loaded = VramPrograms.load()
    except BpfError as error:
        pytest.skip(f"this kernel does not take the probes: {error}")
    path = build()
    with Library(path) as library:
        offsets = cuda.offsets(library, cuda.ask(path), cuda.CALLS)
    link = loaded.attach(str(path), offsets)
    try:
        yield loaded
    finally:
        os.close(link)
        loaded.close()


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    """A cgroup of the test's own."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    try:
        yield made
    finally:
        made.kill_and_remove()
        root.close()


@contextlib.contextmanager
def worker(cgroup: Cgroup, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process in the cgroup."""
    process = subprocess.Popen(
        [sys.executable, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        cgroup.attach(process.pid)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def say(process: subprocess.Popen[str]) -> None:
    """Write a line to the process, which waits for one."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> Any:
    """Next line of the process's output, as JSON."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"it ended with {process.wait()}"
    return json.loads(line)


@pytest.mark.parametrize("seed", (1, 2) if SLOW == 1 else (3,))
def test_thousands_in_random_order(programs: VramPrograms, cgroup: Cgroup, seed: int) -> None:
    """Call every function, and give memory back in every way, beside a model in the process."""
    programs.set_quota(cgroup.id, QUOTA)
    numbers = (seed, STEPS, QUOTA, int(programs.refuses))
    argv = ("-m", "tests.standin.worker", str(build()), *map(str, numbers))
    with worker(cgroup, *argv) as process:
        say(process)
        expected = hear(process)
        account = programs.account(cgroup.id)
        members = {"used": "used_bytes", "peak": "peak_bytes"}
        counted = {name: getattr(account, members.get(name, name)) for name in expected}
        assert counted == expected
        assert account.untracked == 0
        assert expected["allocations"] > STEPS / 10
        assert expected["refused" if programs.refuses else "over"] > 10
        say(process)
        process.wait()
    wait_until("its end gives all back", lambda: programs.account(cgroup.id).used_bytes == 0)
    programs.prune()
    assert programs.handles() == programs.handles("mappings") == programs.handles("contexts") == 0
    programs.drop(cgroup.id)


RACE = """
import ctypes, json, sys, threading
cuda = ctypes.CDLL(sys.argv[1])
sys.stdin.readline()
got = []
def ask():
    for _ in range(int(sys.argv[2])):
        out = ctypes.c_uint64()
        if cuda.cuMemAlloc_v2(ctypes.byref(out), ctypes.c_uint64(1 << 20)) == 0:
            got.append(out.value)
threads = [threading.Thread(target=ask) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(json.dumps(len(got)), flush=True)
sys.stdin.readline()
"""


def raced(programs: VramPrograms, cgroup: Cgroup) -> tuple[int, int, int, int]:
    """Have four threads ask for 100 MiB each, of 64 that there are; what passed, and what was
    counted."""
    programs.drop(cgroup.id)
    programs.set_quota(cgroup.id, 64 << 20)
    with worker(cgroup, "-c", RACE, str(build()), "100") as process:
        say(process)
        passed = hear(process)
    account = programs.account(cgroup.id)
    return passed, account.refused, account.allocations, account.peak_bytes


def test_threads_cannot_pass_together(programs: VramPrograms, cgroup: Cgroup) -> None:
    """Several times: two of them have to be in the program at once, one of them preempted."""
    if not programs.refuses:
        pytest.skip("this kernel does not let a probe refuse (Linux 6.19)")
    for _ in range(5):
        assert raced(programs, cgroup) == (64, 336, 64, 64 << 20)
        account = programs.account(cgroup.id)
        assert account.refused_bytes == 336 << 20
        assert account.frees == account.untracked == 0


ONE = """
import ctypes, json, os, sys
cuda = ctypes.CDLL(sys.argv[1])
sys.stdin.readline()
out = ctypes.c_uint64()
print(json.dumps([cuda.{function}(ctypes.byref(out), ctypes.c_uint64(1 << 30)), os.getpid()]),
      flush=True)
sys.stdin.readline()
"""


def test_a_cgroup_without_a_quota_is_left_alone(programs: VramPrograms, cgroup: Cgroup) -> None:
    with worker(cgroup, "-c", ONE.format(function="cuMemAlloc_v2"), str(build())) as process:
        say(process)
        assert hear(process)[0] == 0
    assert programs.account(cgroup.id).allocations == 0


def test_what_is_below_the_cgroup_counts(programs: VramPrograms, cgroup: Cgroup) -> None:
    programs.set_quota(cgroup.id, None)
    inner = cgroup.make_child("made").make_child("inside")
    with worker(inner, "-c", ONE.format(function="cuMemAlloc_v2"), str(build())) as process:
        say(process)
        assert hear(process)[0] == 0
        assert programs.account(cgroup.id).used_bytes == 1 << 30
    programs.drop(cgroup.id)


GIVEN_OUT = """
import ctypes, json, sys
cuda = ctypes.CDLL(sys.argv[1])
sys.stdin.readline()
pointer = ctypes.c_void_p()
assert cuda.cuGetProcAddress_v2(b"cuMemAlloc", ctypes.byref(pointer), 12000, ctypes.c_uint64(0),
                                None) == 0
alloc = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(pointer.value)
out = ctypes.c_uint64()
print(json.dumps(alloc(ctypes.addressof(out), 1 << 30)), flush=True)
sys.stdin.readline()
"""


def test_addresses_that_the_symbol_table_does_not_have(
    programs: VramPrograms, cgroup: Cgroup
) -> None:
    """The CUDA runtime asks cuGetProcAddress, and never uses the names."""
    programs.set_quota(cgroup.id, 1 << 20)
    with worker(cgroup, "-c", GIVEN_OUT, str(build())) as process:
        say(process)
        assert hear(process) == (2 if programs.refuses else 0)
        account = programs.account(cgroup.id)
        assert account.refused + account.over == 1
    programs.drop(cgroup.id)


@pytest.mark.parametrize("unseen", ["LD_PRELOAD=", "exec"])
def test_what_does_not_help(
    programs: VramPrograms, cgroup: Cgroup, unseen: str, tmp_path: Any
) -> None:
    """The probe is in the file, so neither an environment nor a new exec gets around it."""
    programs.set_quota(cgroup.id, 1 << 20)
    code = ONE.format(function="cuMemAlloc_v2")
    if unseen == "exec":
        script = tmp_path / "child.py"
        script.write_text(code)
        code = f"import os, sys; os.execv(sys.executable, ['python', {str(script)!r}, sys.argv[1]])"
    with worker(cgroup, "-E", "-c", code, str(build())) as process:
        say(process)
        assert hear(process)[0] == (2 if programs.refuses else 0)
    programs.drop(cgroup.id)


def test_work_is_told_once_each_time_it_is_asked_for(
    programs: VramPrograms, cgroup: Cgroup
) -> None:
    code = """
import ctypes, json, sys
cuda = ctypes.CDLL(sys.argv[1])
for line in sys.stdin:
    for _ in range(3):
        cuda.cuLaunchKernel(None, 0)
    print(json.dumps(0), flush=True)
"""
    with Library(build()) as library:
        names = dict.fromkeys(cuda.LAUNCHES, abi.CudaCall.NONE)
        link = programs.attach_launches(str(build()), cuda.offsets(library, {}, names))
    try:
        programs.set_quota(cgroup.id, None, watch=True)
        with worker(cgroup, "-c", code, str(build())) as process:
            say(process)
            hear(process)
            assert programs.account(cgroup.id).launches == 3
            say(process)
            hear(process)
        assert programs.account(cgroup.id).launches == 6
    finally:
        os.close(link)
        programs.drop(cgroup.id)


def test_a_copy_under_another_name_is_found(
    programs: VramPrograms, cgroup: Cgroup, tmp_path: Any
) -> None:
    """A container has a library of its own, under any name."""
    copy = tmp_path / "libsomething.so.7"
    copy.write_bytes(build().read_bytes())
    programs.set_quota(cgroup.id, None)
    code = ONE.format(function="cuMemAlloc_v2").replace(
        "sys.stdin", "print('0', flush=True); sys.stdin", 1
    )
    libraries = Libraries(programs)
    try:
        with worker(cgroup, "-c", code, str(copy)) as process:
            assert hear(process) == 0  # it is mapped
            assert len(libraries.probe_process(process.pid)) == 1
            (probed,) = libraries.probed.values()
            # A container's code is never run by the daemon, so nobody is asked for addresses.
            assert probed.path == str(copy) and len(probed.calls) == 26
            say(process)
            assert hear(process)[0] == 0
            assert programs.account(cgroup.id).used_bytes == 1 << 30
            assert libraries.probe_process(process.pid) == list(libraries.probed)
        assert libraries.failures == [] and libraries.probe_process(2**22 - 1) == []
    finally:
        libraries.close()
        programs.drop(cgroup.id)


def test_what_is_no_library(tmp_path: Any) -> None:
    """Files come from anyone, and nothing in them may do harm."""
    good = build().read_bytes()
    files = {
        "empty": b"",
        "short": good[:40],
        "text": b"#!/bin/sh\n" * 9,
        "cut": good[: len(good) // 2],
        "offsets": good[:40] + b"\xff" * 24 + good[64:],
        "headers": good[:64] + b"\xff" * 400 + good[464:],
    }
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        try:
            with Library(path) as library:
                assert all(0 <= place < len(data) for _, place in library.exports())
        except NotElf:
            continue
