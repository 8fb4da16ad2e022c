"""What /proc says of a process, with names that try to pass for something else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.cgroup.tree import cgroup2_mount
from agentcgroupd.host.proc import (
    CgroupUnknown,
    cgroup_of,
    command_line,
    parse_cgroup,
    program_name,
)

BREAKS = ["\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r\r"]
"""What `str.splitlines` or text mode takes for the end of a line, and the kernel does not."""


@pytest.mark.parametrize("mark", BREAKS)
def test_a_v1_cgroup_cannot_pass_for_the_line_of_v2(mark: str) -> None:
    data = f"5:memory:/x{mark}0::/pool/victim/agent\n1:name=systemd:/\n0::/pool/mine/agent\n"
    assert parse_cgroup(data.encode()) == "/pool/mine/agent"


@pytest.mark.parametrize("mark", BREAKS)
def test_a_v2_cgroup_has_its_whole_name(mark: str) -> None:
    path = f"/pool/mine/agent/x{mark}0::/pool/victim"
    assert parse_cgroup(f"0::{path}\n".encode()) == path


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"5:memory:/x\n",
        b"x0::/pool/a\n",
        b" 0::/pool/a\n",
        b"10::/pool/a\n",
        b"0::/pool/a\n0::/pool/b\n",
    ],
)
def test_without_exactly_one_line_of_v2_nothing_is_known(data: bytes) -> None:
    with pytest.raises(CgroupUnknown):
        parse_cgroup(data)


def test_names_that_are_no_utf8_keep_their_bytes() -> None:
    path = b"/pool/mine/\xff\xfe\x85"
    assert os.fsencode(parse_cgroup(b"0::" + path + b"\n")) == path


def test_a_removed_cgroup_keeps_the_kernels_mark() -> None:
    assert parse_cgroup(b"0::/pool/mine (deleted)\n") == "/pool/mine (deleted)"


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_nothing_in_a_v1_name_changes_what_is_read(name: bytes, path: bytes) -> None:
    name, path = name.replace(b"\n", b""), path.replace(b"\n", b"")
    data = b"3:freezer:/" + name + b"\n0::/" + path + b"\n"
    assert os.fsencode(parse_cgroup(data)) == b"/" + path


def test_this_process_is_in_a_cgroup() -> None:
    assert cgroup_of(os.getpid()).startswith("/")


def test_a_process_that_is_gone_is_an_error() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        cgroup_of(child.pid)
    assert command_line(child.pid) == []


def test_arguments_keep_carriage_returns() -> None:
    odd = "a\rb\r\nc"
    command = ["sh", "-c", "echo; read line", odd]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        # Until it speaks, /proc may show it as it was before its exec.
        child.stdout.readline()
        assert command_line(child.pid) == command
        assert command_line(child.pid, 5) == ["sh", "-c"]
        assert program_name(child.pid) == "sh"
        child.stdin.close()


@pytest.mark.parametrize(
    ("point", "path"),
    [
        (b"/sys/fs/cgroup", b"/sys/fs/cgroup"),
        (b"/a\\040b\\134c\\012d", b"/a b\\c\nd"),
        (b"/a\rb\x85\xff", b"/a\rb\x85\xff"),
    ],
)
def test_the_mount_is_found_whatever_other_mounts_are_called(
    tmp_path: Path, point: bytes, path: bytes
) -> None:
    file = tmp_path / "mountinfo"
    file.write_bytes(
        b"21 1 0:1 / /evil\r22\\0401 rw - tmpfs x rw\n"
        b"22 1 0:2 / /also\x0ccgroup2 rw shared:1 - fuse cgroup2 rw\n"
        b"30 1 0:3 / " + point + b" rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
    )
    assert os.fsencode(cgroup2_mount(str(file))) == path


def test_without_cgroup2_there_is_no_mount(tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    file.write_bytes(b"21 1 0:1 / / rw - ext4 x rw\n")
    with pytest.raises(FileNotFoundError):
        cgroup2_mount(str(file))
