"""Block devices of the host, by their numbers."""

from __future__ import annotations

import os
from pathlib import Path

SYS_BLOCK = Path("/sys/block")
DEVICES_MOST = 256
"""More than this many are not limited one by one."""


def whole_devices(sys_block: Path = SYS_BLOCK) -> list[str]:
    """List the numbers, as `8:0`, of all devices that are no partitions and hold something: a loop
    device without a file is left out. The kernel keeps limits and counts for whole devices alone
    (block/blk-cgroup.c: blkg_conf_open_bdev)."""
    found = []
    try:
        names = sorted(os.listdir(sys_block))
    except FileNotFoundError:
        return []
    for name in names:
        try:
            if (sys_block / name / "size").read_text(encoding="ascii").strip() == "0":
                continue
            found.append((sys_block / name / "dev").read_text(encoding="ascii").strip())
        except OSError:
            continue  # removed meanwhile
        if len(found) == DEVICES_MOST:
            break
    return found


def device_name(number: str, sys_dev: Path = Path("/sys/dev/block")) -> str:
    """Give the name of a device by its numbers, or these where it has gone."""
    try:
        return Path(os.readlink(sys_dev / number)).name
    except OSError:
        return number
