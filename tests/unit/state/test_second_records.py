"""Second records of calls: kept, read, and what becomes of them where there is no room."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from agentcgroupd.state.second_records import SecondRecords
from agentcgroupd.units import CgroupId

RECORD = b'{"v":1,"kind":"call","id":"0123456789ab"}'
ID = "0123456789ab"
CGROUP = CgroupId(4711)


@pytest.fixture
def second(tmp_path: Path) -> SecondRecords:
    """Second records in a run directory that is there."""
    (tmp_path / "private").mkdir()
    return SecondRecords(tmp_path)


def test_they_are_kept_until_the_call_ends(second: SecondRecords, tmp_path: Path) -> None:
    assert second.read(ID, CGROUP) is None
    second.drop_all_but(())
    second.keep(ID, CGROUP, RECORD)
    assert (tmp_path / "private/calls").stat().st_mode & 0o777 == 0o700
    found = second.read(ID, CGROUP)
    assert found is not None and found["id"] == ID
    second.keep("ba9876543210", CGROUP, RECORD)
    second.drop_all_but({ID})
    assert second.read("ba9876543210", CGROUP) is None and second.read(ID, CGROUP) is not None
    second.drop(ID)
    second.drop(ID)
    assert second.read(ID, CGROUP) is None


def test_another_cgroup_of_the_name_has_none(second: SecondRecords) -> None:
    second.keep(ID, CGROUP, RECORD)
    assert second.read(ID, CgroupId(4712)) is None


@pytest.mark.parametrize("name", ["../pool", "", "0123456789AB", "0123456789ab/", "0123456789abc"])
def test_only_ids_are_looked_for(second: SecondRecords, tmp_path: Path, name: str) -> None:
    second.keep(ID, CGROUP, RECORD)
    (tmp_path / "private/pool").write_bytes(RECORD)
    assert second.read(name, CGROUP) is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"v":2,"kind":"call"}', b"\0" * 100])
def test_what_cannot_be_read_is_none(second: SecondRecords, content: bytes) -> None:
    second.keep(ID, CGROUP, content)
    assert second.read(ID, CGROUP) is None


def test_no_room_is_said_once_and_leaves_no_half(
    second: SecondRecords,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    second.keep(ID, CGROUP, RECORD)

    real = os.write

    def full(fd: int, data: bytes) -> int:
        return real(fd, data[:5])  # as write(2) does when the disk is nearly full

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        second.keep(ID, CGROUP, RECORD)
        second.keep("ba9876543210", CGROUP, RECORD)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/private/calls: No space left on device; calls have no second record until "
        "there is room (said once)"
    ]
    assert list((tmp_path / "private/calls").iterdir()) == []
