"""/proc/self/mountinfo: mounts, and the one of cgroup v2 that the daemon can use."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.cgroup.tree import cgroup2_mount
from agentcgroupd.host import mounts
from agentcgroupd.host.mounts import Mount

ROOT_LINE = b"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n"
SHARED_LINE = b"36 27 0:32 / /sys/fs/cgroup rw shared:9 master:1 - cgroup2 cgroup2 rw,nsdelegate\n"
PATHS = st.binary(min_size=1).filter(lambda raw: b"\0" not in raw and b"/" not in raw)


def escaped(path: bytes) -> bytes:
    """A path as the kernel writes it into mountinfo."""
    for byte in (b"\\", b" ", b"\t", b"\n"):
        path = path.replace(byte, b"\\%03o" % byte[0])
    return path


def cgroup2_line(point: bytes = b"/sys/fs/cgroup", root: bytes = b"/") -> bytes:
    """A cgroup2 mount as a line of mountinfo."""
    return b"36 27 0:32 %s %s rw,nosuid - cgroup2 cgroup2 rw\n" % (escaped(root), escaped(point))


def written(directory: Path, *lines: bytes) -> Path:
    """A file with these lines of mountinfo."""
    path = directory / "mountinfo"
    path.write_bytes(b"".join(lines))
    return path


def test_a_line_is_its_fields_with_or_without_optional_ones() -> None:
    root, shared = mounts.parse_mountinfo(ROOT_LINE + SHARED_LINE)
    assert root == Mount(b"ext4", Path("/"), Path("/"), (b"rw", b"discard"), b"254:0")
    assert shared == Mount(
        b"cgroup2", Path("/"), Path("/sys/fs/cgroup"), (b"rw", b"nsdelegate"), b"0:32"
    )


def test_a_mount_without_a_source_and_options_with_blanks_are_read() -> None:
    (found,) = mounts.parse_mountinfo(b"40 27 0:9 / /srv rw - tmpfs  rw,key=a b\n")
    assert found == Mount(b"tmpfs", Path("/"), Path("/srv"), (b"rw", b"key=a b"), b"0:9")


@pytest.mark.parametrize("line", [b"36 27 0:32 / /x rw", b"36 27 - cgroup2 cgroup2 rw", b"x"])
def test_a_line_of_another_form_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of mountinfo"):
        mounts.parse_mountinfo(ROOT_LINE + line)


@given(PATHS, PATHS)
def test_any_mount_point_and_root_come_back(point: bytes, root: bytes) -> None:
    line = cgroup2_line(b"/" + point, b"/" + root)
    _, found, _ = mounts.parse_mountinfo(ROOT_LINE + line + SHARED_LINE)
    assert found.point == Path(os.fsdecode(b"/" + point))
    assert found.root == Path(os.fsdecode(b"/" + root))


@pytest.mark.parametrize(
    "point",
    [
        b"/cgroup\r",
        b"/with blank\nand line\tand \\040",
        b"/not utf-8 \xff\xc2\x85",
        b"/a\x0b\x0c\x1c\x1db",
        b"/ - cgroup2 cgroup2 rw",
    ],
)
def test_cgroup2_is_found_whatever_its_mount_point_is_called(tmp_path: Path, point: bytes) -> None:
    mountinfo = written(tmp_path, ROOT_LINE, cgroup2_line(point))
    assert os.fsencode(cgroup2_mount(mountinfo)) == point


def test_a_name_that_reads_like_a_mount_is_no_mount(tmp_path: Path) -> None:
    forged = b"/x\r36 27 0:32 / /forged rw - cgroup2 cgroup2 rw"
    line = b"40 27 0:9 / %s rw - tmpfs tmpfs rw\n" % escaped(forged)
    assert cgroup2_mount(written(tmp_path, line, SHARED_LINE)) == Path("/sys/fs/cgroup")
    with pytest.raises(OSError, match="no cgroup2 file system is mounted") as caught:
        cgroup2_mount(written(tmp_path, line))
    assert caught.value.errno == errno.ENOENT


def test_the_mount_with_the_namespaces_root_is_taken(tmp_path: Path) -> None:
    lines = cgroup2_line(b"/a", b"/.."), cgroup2_line(b"/b", b"/docker/1"), cgroup2_line(b"/c")
    assert cgroup2_mount(written(tmp_path, *lines)) == Path("/c")


@pytest.mark.parametrize(
    ("root", "cause"),
    [
        (b"/..", "above this process's cgroup namespace: it was mounted from outside"),
        (b"/../../other", "above this process's cgroup namespace: it was mounted from outside"),
        (b"/docker/1", "below the root of this process's cgroup namespace"),
    ],
)
def test_a_mount_with_another_root_is_refused_with_its_cause(
    tmp_path: Path, root: bytes, cause: str
) -> None:
    with pytest.raises(OSError) as caught:
        cgroup2_mount(written(tmp_path, cgroup2_line(root=root)))
    assert caught.value.errno == errno.EXDEV
    begins = f"cgroup2 at '/sys/fs/cgroup' begins at {root.decode()!r}, {cause}"
    assert str(caught.value.strerror).startswith(begins)


def test_this_process_has_a_root_mount() -> None:
    assert Path("/") in [mount.point for mount in mounts.mounts()]
