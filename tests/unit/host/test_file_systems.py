"""Which mounts are disks that may fill, which disk a partition lies on, and where is swapped to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentcgroupd.config import GuardConfig
from agentcgroupd.config_values import free_least
from agentcgroupd.errors import InvalidField
from agentcgroupd.host.file_systems import disk_of, spaces, swapped_to

MOUNTS = """\
22 1 {device} / {root} rw,relatime - ext4 /dev/sda1 rw
23 22 0:21 / {root}/proc rw - proc proc rw
24 22 7:0 / {root}/snap ro - squashfs /dev/loop0 ro
25 22 8:99 / {root}/gone rw - ext4 /dev/sdz rw
"""


def test_each_file_system_is_asked_once(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS.format(device="8:1", root=tmp_path))
    (found,) = spaces((), mountinfo)
    assert found.path == str(tmp_path) and found.total_bytes > found.free_bytes > 0
    (named,) = spaces((str(tmp_path), str(tmp_path / "not there")), mountinfo)
    assert named.path == str(tmp_path)
    assert spaces((), tmp_path / "none") == []


def test_this_host_is_read() -> None:
    for space in spaces(("/tmp",)):
        assert space.total_bytes >= space.free_bytes >= 0


def test_the_disk_of_a_partition(tmp_path: Path) -> None:
    disk = tmp_path / "devices" / "sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (disk / "sda1" / "partition").write_text("1\n")
    by_number = tmp_path / "block"
    by_number.mkdir()
    (by_number / "8:0").symlink_to(disk)
    (by_number / "8:1").symlink_to(disk / "sda1")
    assert disk_of("8:1", by_number) == disk_of("8:0", by_number) == "8:0"
    assert disk_of("0:40", by_number) == ""


def test_swap_on_a_file_counts_for_its_disk(tmp_path: Path) -> None:
    (tmp_path / "swap file").touch()
    number = tmp_path.stat().st_dev
    swaps = tmp_path / "swaps"
    lines = f"{tmp_path}/swap\\040file file 1 0 -2\n/none partition 1 0 -2\n"
    swaps.write_text(f"Filename Type Size Used Priority\n{lines}")
    disk = disk_of(f"{os.major(number)}:{os.minor(number)}")
    assert swapped_to(swaps) == frozenset({disk} - {""})
    assert swapped_to(tmp_path / "none") == frozenset()


def test_how_much_room_is_asked_for() -> None:
    assert free_least("5%", 1000) == 50
    assert free_least("2G", 1000) == 2 << 30
    assert free_least("off", 1000) == 0
    assert GuardConfig().disk_free == "1%"


@pytest.mark.parametrize("text", ["0%", "60%", "much", "-1G", "%"])
def test_room_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="disk_free"):
        free_least(text, 1000)
    with pytest.raises(ValueError, match="disk_free"):
        GuardConfig(disk_free=text)
