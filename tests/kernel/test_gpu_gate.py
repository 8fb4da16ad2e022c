"""The gate on this kernel, also beside a program of a runtime's, with files that no driver has."""

from __future__ import annotations

import ctypes
import os
import secrets
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroupd.bpf import device
from agentcgroupd.bpf.device import BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI, DevicePrograms
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.gpu.gate import Gate
from agentcgroupd.host import syscalls
from tests.gpu_fakes import DEVICES_MAJOR, MAJORS, OTHER_MAJOR, SHARED_MAJOR, unanswered

pytestmark = pytest.mark.programs

OPEN = """
import errno, os, sys
for path in sys.argv[1:]:
    try:
        os.open(path, os.O_RDWR)
    except OSError as error:
        print(errno.errorcode[error.errno])
    else:
        print("opened")
"""
MKNOD = """
import os, stat, sys
try:
    os.mknod(sys.argv[1], 0o600 | stat.S_IFCHR, os.makedev(int(sys.argv[2]), 0))
    print("made")
except PermissionError:
    print("EPERM")
"""


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    """A cgroup of the test's own, as a pool."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    try:
        yield made
    finally:
        made.kill_and_remove()
        root.close()


@pytest.fixture
def gate(cgroup: Cgroup) -> Iterator[Gate]:
    """A gate that is closed for the cgroup."""
    made = Gate(DevicePrograms.load(), lambda: MAJORS)
    made.close_for(cgroup)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def nodes(tmp_path: Path) -> list[str]:
    """Device files of a GPU, of its control, of all GPUs, and of something else."""
    numbers = {
        "gpu": (DEVICES_MAJOR, 3),
        "ctl": (DEVICES_MAJOR, 255),
        "uvm": (SHARED_MAJOR, 0),
        "other": (OTHER_MAJOR, 3),
    }
    for name, number in numbers.items():
        os.mknod(tmp_path / name, 0o600 | stat.S_IFCHR, os.makedev(*number))
    return [str(tmp_path / name) for name in numbers]


def inside(cgroup: Cgroup, code: str, *argv: str) -> list[str]:
    """Run code in the cgroup; returns the words that it prints."""
    wait = f"import sys\nsys.stdin.readline()\n{code}"
    command = [sys.executable, "-S", "-c", wait, *argv]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    cgroup.attach(process.pid)
    return process.communicate("\n")[0].split()


def test_who_may_open_what(cgroup: Cgroup, gate: Gate, nodes: list[str]) -> None:
    leaf = cgroup.make_child("session").make_child("call-1")
    inner = leaf.make_child("made-inside")
    beside = cgroup.child("session").make_child("call-2")
    assert inside(leaf, OPEN, *nodes) == ["EPERM", "EPERM", "EPERM", "ENXIO"]
    gate.admit(leaf.id, [3])
    assert inside(leaf, OPEN, *nodes) == ["ENXIO"] * 4
    assert inside(inner, OPEN, *nodes) == ["ENXIO"] * 4
    assert inside(beside, OPEN, *nodes)[0] == "EPERM"
    gate.admit(leaf.id, [2, 200])
    assert inside(leaf, OPEN, *nodes) == ["EPERM", "ENXIO", "ENXIO", "ENXIO"]
    gate.expel(leaf.id)
    assert inside(leaf, OPEN, *nodes)[:3] == ["EPERM"] * 3
    assert gate.refused == 3 + 3 + 1 + 3


def test_majors_of_a_real_driver_are_left_alone() -> None:
    """The texts are of /proc/devices where a GPU's driver is loaded."""
    text = "Character devices:\n  1 mem\n195 nvidia\n240 nvidia-caps\n241 nvidia-uvm\n\n"
    assert unanswered(text + "Block devices:\n242 sd\n")[:2] == [242, 243]
    text = "Character devices:\n" + "".join(f"{n} nvidia-x\n" for n in range(238, 255))
    assert unanswered(text + "\nBlock devices:\n")[:2] == [120, 121]


def test_a_node_cannot_be_made(cgroup: Cgroup, gate: Gate, tmp_path: Path) -> None:
    assert inside(cgroup, MKNOD, str(tmp_path / "a"), str(DEVICES_MAJOR)) == ["EPERM"]
    assert inside(cgroup, MKNOD, str(tmp_path / "b"), str(OTHER_MAJOR)) == ["made"]


class _Load(ctypes.Structure):
    """union bpf_attr for BPF_PROG_LOAD, its start."""

    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log", ctypes.c_uint32 * 2),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("expected_attach_type", ctypes.c_uint32),
    )


# include/uapi/linux/bpf.h
BPF_PROG_LOAD = 5
BPF_PROG_TYPE_CGROUP_DEVICE = 15


def runtimes_program(major: int) -> int:
    """Load a program as container runtimes attach them, which refuses one major; returns its
    descriptor."""
    instructions = (
        (0x61, 0x12, 4, 0),  # r2 = *(u32 *)(r1 + 4)
        (0xB7, 0x00, 0, 1),  # r0 = 1
        (0x55, 0x02, 1, major),  # if r2 != major goto +1
        (0xB7, 0x00, 0, 0),  # r0 = 0
        (0x95, 0x00, 0, 0),  # exit
    )
    packed = b"".join(struct.pack("<BBhi", *fields) for fields in instructions)
    code, licence = ctypes.create_string_buffer(packed), ctypes.create_string_buffer(b"GPL")
    attributes = _Load(
        prog_type=BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt=len(instructions),
        insns=ctypes.addressof(code),
        license=ctypes.addressof(licence),
        name=b"runtime",
        expected_attach_type=BPF_CGROUP_DEVICE,
    )
    return syscalls.bpf(BPF_PROG_LOAD, attributes)


def test_beside_a_runtimes_own(cgroup: Cgroup, nodes: list[str]) -> None:
    """Both programs are asked; a new gate takes the place of the old one, and of nothing else."""
    theirs = runtimes_program(OTHER_MAJOR)
    fd = os.open(cgroup.path, os.O_RDONLY | os.O_DIRECTORY)
    libbpf().check("attaching", "bpf_prog_attach", theirs, fd, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI)
    os.close(fd)
    os.close(theirs)
    first = Gate(DevicePrograms.load(), lambda: MAJORS)
    first.close_for(cgroup)
    first.admit(cgroup.id, [3])
    assert inside(cgroup, OPEN, *nodes) == ["ENXIO", "ENXIO", "ENXIO", "EPERM"]
    first.close()  # the program stays in force, as it does when a daemon is killed
    assert inside(cgroup, OPEN, *nodes) == ["ENXIO", "ENXIO", "ENXIO", "EPERM"]
    second = Gate(DevicePrograms.load(), lambda: MAJORS)
    second.close_for(cgroup)
    assert sorted(device.attached(cgroup)) == ["on_device", "runtime"]
    assert inside(cgroup, OPEN, *nodes) == ["EPERM"] * 4
    second.open_for(cgroup)
    assert device.attached(cgroup) == ["runtime"]
    assert inside(cgroup, OPEN, *nodes) == ["ENXIO", "ENXIO", "ENXIO", "EPERM"]
    second.close()


def test_a_driver_that_is_loaded_later(cgroup: Cgroup, nodes: list[str]) -> None:
    majors = dict[int, object]()
    gate = Gate(DevicePrograms.load(), lambda: majors)  # type: ignore[arg-type,return-value]
    gate.close_for(cgroup)
    assert inside(cgroup, OPEN, *nodes) == ["ENXIO"] * 4
    majors.update(MAJORS)
    gate.refresh()
    assert inside(cgroup, OPEN, *nodes) == ["EPERM", "EPERM", "EPERM", "ENXIO"]
    majors.clear()
    gate.refresh()
    assert inside(cgroup, OPEN, *nodes) == ["ENXIO"] * 4
    gate.close()
