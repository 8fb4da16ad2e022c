"""Programs and maps that outlive the daemon: pinned in a directory of bpffs, one for each pool.

A daemon that is killed leaves its programs attached and their maps as they are: what was denied
stays denied, and marks that are passed meanwhile wait in the ring buffer. The next daemon loads its
own programs with those maps, attaches them, and only then lets go of the old ones. Maps of another
layout (a release with another abi.h) are not taken over. A daemon that stops by itself takes its
programs along, and so does `agentcg-release`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
from pathlib import Path

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.errors import BpfError
from agentcgroupd.host.mounts import mounts
from agentcgroupd.host.syscalls import cgroup_is_gone
from agentcgroupd.units import CgroupId

log = logging.getLogger(__name__)

MOUNT = Path("/sys/fs/bpf")
DIRECTORY = "agentcgroup"
"""Below the mount; daemon/release/agentcg-release.c has it too."""
LAYOUT = hashlib.sha256(Path(abi.__file__).read_bytes()).hexdigest()[:12]
"""Stands for the layout of all that is in the maps."""
MAPS = ("limits", "states", "tasks", "events", ".bss")
"""Maps of an object that the next daemon takes over."""


class MapInfo(ctypes.Structure):
    """The beginning of struct bpf_map_info (include/uapi/linux/bpf.h)."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
    )


def is_bpffs(directory: Path) -> bool:
    """Tell whether bpffs is mounted there, where objects can be pinned. Raises OSError."""
    return any(mount.point == directory and mount.kind == b"bpf" for mount in mounts())


class Pins:
    """The pins of one pool's programs."""

    def __init__(self, mount: Path, pool: CgroupId) -> None:
        """`mount`: where bpffs is. Nothing is pinned yet. Raises BpfError where it is not there."""
        if not is_bpffs(mount):
            raise BpfError(f"{mount} is no bpffs", errno.ENOENT)
        self._directory = mount / DIRECTORY / str(pool)
        self._old = self._files()
        self._made: list[Path] = []

    def _files(self) -> list[Path]:
        try:
            return sorted(self._directory.iterdir())
        except FileNotFoundError:
            return []

    def lend(self, bpf: BpfObject) -> bool:
        """Before its load: have an object use the maps that an earlier daemon left, all or none of
        them. Returns whether it does. Raises BpfError."""
        found: dict[str, int] = {}
        try:
            for name in MAPS:
                fd = libbpf().call("bpf_obj_get", str(self._map_path(name)).encode())
                if fd < 0:
                    return False
                found[name] = fd
                if not bpf.fits(name, _size_of(fd)):
                    log.warning(
                        "map %s of an earlier daemon has another size: it begins anew", name
                    )
                    return False
            for name, fd in found.items():
                bpf.reuse(name, fd)
            return True
        finally:
            for fd in found.values():
                os.close(fd)

    def keep(self, bpf: BpfObject) -> None:
        """After it is attached: pin an object's maps and links, and let go of those of an earlier
        daemon. Raises BpfError; then nothing of this daemon's is pinned."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BpfError(f"making {self._directory}", error.errno or 0) from None
        try:
            for name in MAPS:
                self._pin(bpf.map_fd(name), self._map_path(name))
            for name, fd in bpf.link_fds():
                self._pin(fd, self._directory / f"link_{name}_{os.getpid()}")
        except BaseException:
            self.remove()
            raise
        for path in self._old:
            if path not in self._made:
                path.unlink(missing_ok=True)
        self._old = []

    def _map_path(self, name: str) -> Path:
        # bpffs takes no dots.
        return self._directory / f"map_{name.strip('.')}_{LAYOUT}"

    def _pin(self, fd: int, path: Path) -> None:
        path.unlink(missing_ok=True)
        libbpf().check(f"pinning {path}", "bpf_obj_pin", fd, str(path).encode())
        self._made.append(path)

    def remove(self) -> None:
        """Remove all pins of this pool: what nobody holds open goes with them."""
        try:
            for path in self._files():
                path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._directory.rmdir()
        except OSError as error:
            log.warning("pins in %s stay: %s", self._directory, error)
        self._made, self._old = [], []


def map_info(fd: int) -> MapInfo:
    """What the kernel says of a map. Raises BpfError."""
    info = MapInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    place = ctypes.byref(info), ctypes.byref(size)
    libbpf().check("a pinned map", "bpf_obj_get_info_by_fd", fd, *place)
    return info


def _size_of(fd: int) -> tuple[int, int, int]:
    """Sizes of a map's key and value in bytes, and its number of entries. Raises BpfError."""
    info = map_info(fd)
    return info.key_size, info.value_size, info.max_entries


def remove_stale(mount: Path, cgroups: Path) -> None:
    """Remove the pins of pools that are gone. `cgroups`: the cgroup2 mount. Raises OSError."""
    directories = list((mount / DIRECTORY).glob("[0-9]*"))
    fd = os.open(cgroups, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for directory in directories:
            if cgroup_is_gone(fd, int(directory.name)):
                for path in directory.iterdir():
                    path.unlink(missing_ok=True)
                directory.rmdir()
    finally:
        os.close(fd)
