"""The choice where tests, demo and benchmarks run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest import where


def mountinfo(*points: Path | str) -> str:
    lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw"]
    lines += [f"3{n} 22 0:2{n} / {point} rw - cgroup2 c rw" for n, point in enumerate(points)]
    return "\n".join([*lines, "40 22 0:9 / /cg1 rw - cgroup cgroup rw,memory", ""])


def cgroup2(path: Path, controllers: str) -> Path:
    path.mkdir()
    (path / "cgroup.controllers").write_text(f"{controllers}\n")
    return path


def test_root_with_controllers_is_native(tmp_path: Path) -> None:
    mount = cgroup2(tmp_path / "cg", "cpuset cpu io memory pids")
    found = where.decide({}, 0, mountinfo(mount))
    assert found == where.Where("native", f"{mount} has cpu, memory, pids")


def test_any_mount_will_do(tmp_path: Path) -> None:
    empty = cgroup2(tmp_path / "unified", "")
    full = cgroup2(tmp_path / "full", "cpu memory pids")
    assert where.decide({}, 0, mountinfo(empty, full)).kind == "native"


def test_missing_controllers_are_named(tmp_path: Path) -> None:
    mount = cgroup2(tmp_path / "cg", "cpu io")
    found = where.decide({}, 0, mountinfo(mount))
    assert found == where.Where("guest", f"{mount} lacks memory, pids")


def test_reasons_for_the_guest(tmp_path: Path) -> None:
    mount = cgroup2(tmp_path / "cg", "cpu memory pids")
    assert where.decide({}, 1000, mountinfo(mount)).reason == "not root"
    assert where.decide({}, 0, mountinfo()).reason == "cgroup v2 is not mounted here"
    assert "No such file" in where.decide({}, 0, mountinfo(tmp_path / "gone")).reason


def test_override(tmp_path: Path) -> None:
    mount = cgroup2(tmp_path / "cg", "cpu memory pids")
    assert where.decide({"AGENTCG_WHERE": "guest"}, 0, mountinfo(mount)).kind == "guest"
    assert where.decide({"AGENTCG_WHERE": "native"}, 1000, "").kind == "native"
    with pytest.raises(ValueError, match="expected native or guest"):
        where.decide({"AGENTCG_WHERE": "here"}, 0, "")


def test_mount_points_are_unescaped() -> None:
    assert where.cgroup2_mounts(mountinfo(r"/a\040b")) == [Path("/a b")]
