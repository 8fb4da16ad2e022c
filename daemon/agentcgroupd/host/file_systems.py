"""File systems on disks that this process sees mounted, and how much room each has left."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentcgroupd.host.mounts import MOUNTINFO, Mount, parse_mountinfo, unescape

log = logging.getLogger(__name__)

MOUNTINFO_BYTES_MAX = 1 << 20
"""Mounts beyond this much text are not looked at."""
FILE_SYSTEMS_MOST = 64
_NEVER_FILL = frozenset({b"squashfs", b"iso9660", b"erofs", b"cramfs", b"udf"})
_WITHOUT_DEVICE = frozenset({b"btrfs", b"zfs", b"bcachefs"})
"""Types whose mounts have a device number that is not that of a disk, although they lie on one."""


@dataclass(frozen=True, slots=True)
class Space:
    """Room of a file system at one moment."""

    path: str
    """Where it is mounted, or the path by which it was asked for."""
    device: str
    """The disk that it lies on, by its numbers, as io.stat names it; empty: not known."""
    total_bytes: int
    free_bytes: int
    """What users other than root may still write."""


def _may_fill(mount: Mount) -> bool:
    """Tell whether a mount is one of a disk that can be written to."""
    on_disk = not mount.device.startswith(b"0:") or mount.kind in _WITHOUT_DEVICE
    return on_disk and mount.kind not in _NEVER_FILL and b"rw" in mount.options


def disk_of(number: str, sys_dev: Path = Path("/sys/dev/block")) -> str:
    """Give the numbers of the disk that a device is or, if it is a partition, lies on; empty: it is
    no device of a disk. The kernel counts for whole disks alone."""
    if number.startswith("0:"):
        return ""
    device = sys_dev / number
    try:
        if not (device / "partition").exists():
            return number
        return (device.resolve().parent / "dev").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _places(more: Iterable[str], mountinfo: Path) -> Iterator[tuple[str, bool]]:
    """Give where file systems are mounted that may fill, and the paths in `more`. Whether a path
    was asked for by name goes with it."""
    for path in more:
        yield path, True
    try:
        with open(mountinfo, "rb") as file:
            data = file.read(MOUNTINFO_BYTES_MAX)
        whole = data[: data.rindex(b"\n") + 1]
        found = parse_mountinfo(whole)
    except (OSError, ValueError) as error:
        log.warning("mounts cannot be read: %s", error)
        return
    for mount in found:
        if _may_fill(mount):
            yield str(mount.point), False


def spaces(more: Sequence[str] = (), mountinfo: Path = MOUNTINFO) -> list[Space]:
    """Ask each file system on a disk, and those of the paths in `more`, for its room; each once, at
    most FILE_SYSTEMS_MOST. May wait for a file system that does not answer, so it is for a
    thread."""
    found: dict[int, Space] = {}
    for path, is_named in _places(more, mountinfo):
        if len(found) >= FILE_SYSTEMS_MOST:
            break
        try:
            number = os.stat(path).st_dev
            if number in found:
                continue
            room = os.statvfs(path)
        except OSError as error:
            log.log(logging.WARNING if is_named else logging.DEBUG, "%s: %s", path, error)
            continue
        if room.f_blocks:
            device = disk_of(f"{os.major(number)}:{os.minor(number)}")
            size = room.f_frsize
            found[number] = Space(path, device, room.f_blocks * size, room.f_bavail * size)
    return list(found.values())


def swapped_to(swaps: Path = Path("/proc/swaps")) -> frozenset[str]:
    """Give the disks that have swap space, by their numbers. May wait as `spaces` does."""
    found = set()
    try:
        lines = swaps.read_bytes().split(b"\n")[1:]
    except OSError:
        return frozenset()  # a kernel without swap
    for line in lines:
        path = unescape(line.split(b" ", 1)[0].split(b"\t", 1)[0])
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        found.add(disk_of(f"{os.major(number)}:{os.minor(number)}"))
    return frozenset(found - {""})
