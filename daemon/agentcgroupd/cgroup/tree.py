"""Cgroups as directories under a held descriptor.

A `Cgroup` is a directory below one that the daemon keeps open, so an operation reaches the
directory that was meant or fails; it never follows a path that someone else has made anew.
Interface files are opened without O_CREAT: on a wrong mount the error shows, instead of a plain
file appearing.

A call's leaf keeps no descriptor of its own: it is named relative to its session's directory, and
its name, random and used once, is made and removed by the daemon alone.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from agentcgroupd.cgroup.knobs import (
    CGROUP_EVENTS,
    CGROUP_KILL,
    CGROUP_PROCS,
    CGROUP_SUBTREE_CONTROL,
    Knob,
)
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.units import CgroupId

T = TypeVar("T")

_GONE = (errno.ENOENT, errno.ENODEV)
_READ_BYTES = 65_536
XATTR_NAME = "trusted.agentcgroup"
"""trusted.*: readable and writable with CAP_SYS_ADMIN in the initial user namespace only, so a
container cannot forge one."""


class Cgroup:
    """One cgroup directory: `name` below the open directory `dir_fd` (`.` for that directory)."""

    __slots__ = ("_prefix", "dir_fd", "id", "path")

    def __init__(self, dir_fd: int, name: str, path: Path) -> None:
        """`path` is for messages and for calls that take no descriptor; OSError if it is
        missing."""
        self.dir_fd = dir_fd
        self.path = path
        self._prefix = "" if name == "." else f"{name}/"
        self.id = CgroupId(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_ino)

    @classmethod
    def open(cls, path: Path) -> Cgroup:
        """Open an existing cgroup and hold its directory; close() gives it back."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return cls(fd, ".", path)

    def close(self) -> None:
        """Give up the held directory (only for cgroups from `open`)."""
        os.close(self.dir_fd)

    def __repr__(self) -> str:
        return f"Cgroup({self.path}, id={self.id})"

    def _error(self, error: OSError, file: str, value: str | None = None) -> KnobError:
        gone = error.errno in _GONE and not self.exists()
        return (CgroupGone if gone else KnobError)(error, str(self.path), file, value)

    def exists(self) -> bool:
        """Whether the directory is still the cgroup that this object was made for."""
        try:
            found = os.stat(f"{self._prefix}.", dir_fd=self.dir_fd, follow_symlinks=False)
            # A removed directory that is held open still answers stat; its files are gone.
            os.stat(f"{self._prefix}{CGROUP_PROCS.file}", dir_fd=self.dir_fd)
        except OSError:
            return False
        return found.st_ino == self.id

    def files(self) -> frozenset[str]:
        """Names of the interface files that are there. Raises KnobError, or CgroupGone."""
        try:
            fd = os.open(
                f"{self._prefix}.", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.dir_fd
            )
        except OSError as error:
            raise self._error(error, ".") from None
        try:
            return frozenset(os.listdir(fd))
        finally:
            os.close(fd)

    def has(self, knob: Knob[Any]) -> bool:
        """Whether the interface file is there (its controller is enabled, the kernel knows it)."""
        return os.access(self._prefix + knob.file, os.F_OK, dir_fd=self.dir_fd)

    def read(self, knob: Knob[T]) -> T:
        """The value of an interface file. Raises KnobError, or CgroupGone."""
        try:
            fd = os.open(self._prefix + knob.file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.dir_fd)
            try:
                data = os.read(fd, _READ_BYTES)
                while len(data) % _READ_BYTES == 0 and (more := os.read(fd, _READ_BYTES)):
                    data += more
            finally:
                os.close(fd)
        except OSError as error:
            raise self._error(error, knob.file) from None
        return knob.parse(data.decode())

    def read_if(self, knob: Knob[T]) -> T | None:
        """As `read`, or None where this kernel or cgroup does not have the file."""
        try:
            return self.read(knob)
        except CgroupGone:
            raise
        except KnobError as error:
            # EOPNOTSUPP: PSI compiled in but off.
            if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
                return None
            raise

    def write(self, knob: Knob[T], value: T, wait: bool = True) -> None:
        """Set an interface file. Raises KnobError, or CgroupGone.

        Without `wait`, a memory limit below what is used does not make this process reclaim first
        (Linux 6.16, c8e6002bd611; older kernels do not look at the flag).
        """
        self.write_text(knob.file, knob.format(value), 0 if wait else os.O_NONBLOCK)

    def write_text(self, file: str, text: str, flags: int = 0) -> None:
        """Write to an interface file as it is."""
        try:
            fd = os.open(self._prefix + file, os.O_WRONLY | os.O_CLOEXEC | flags,
                         dir_fd=self.dir_fd)  # fmt: skip
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise self._error(error, file, text) from None

    def open_file(self, knob: Knob[Any], flags: int, text: str = "") -> int:
        """A descriptor of an interface file, to be closed by the caller; `text`, where it is not
        empty, is written first, and stays in force as long as the descriptor is open if that is the
        file's way. Raises KnobError, or CgroupGone."""
        try:
            fd = os.open(self._prefix + knob.file, flags | os.O_CLOEXEC, dir_fd=self.dir_fd)
            try:
                if text:
                    os.write(fd, text.encode())
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            raise self._error(error, knob.file, text or None) from None
        return fd

    def attach(self, pid: int) -> None:
        """Move a process, with all its threads, into this cgroup."""
        self.write_text(CGROUP_PROCS.file, str(pid))

    def procs(self) -> tuple[int, ...]:
        """Processes in this very cgroup, not in those below it."""
        return self.read(CGROUP_PROCS)

    def populated(self) -> bool:
        """Whether a live process is in this cgroup or below it."""
        return self.read(CGROUP_EVENTS)["populated"] == 1

    def kill(self) -> None:
        """SIGKILL to every process in this cgroup and below it (Linux 5.14)."""
        self.write(CGROUP_KILL, True)

    def child(self, name: str) -> Cgroup:
        """The existing cgroup `name` below this one."""
        try:
            return Cgroup(self.dir_fd, self._prefix + name, self.path / name)
        except OSError as error:
            raise CgroupGone(error, str(self.path / name), ".") from None

    def make_child(self, name: str) -> Cgroup:
        """Make the cgroup `name` below this one; KnobError (EEXIST) if it is there."""
        try:
            os.mkdir(self._prefix + name, 0o755, dir_fd=self.dir_fd)
        except OSError as error:
            raise self._error(error, name, "") from None
        return Cgroup(self.dir_fd, self._prefix + name, self.path / name)

    def children(self) -> Iterator[str]:
        """Names of the cgroups directly below this one."""
        try:
            fd = os.open(f"{self._prefix}.", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC,
                         dir_fd=self.dir_fd)  # fmt: skip
        except OSError as error:
            raise self._error(error, ".") from None
        try:
            names = [entry.name for entry in os.scandir(fd) if entry.is_dir(follow_symlinks=False)]
        finally:
            os.close(fd)
        yield from sorted(names)

    def remove(self) -> None:
        """rmdir this cgroup and every empty one below it. KnobError (EBUSY) while one is populated;
        no error if it is gone already."""
        try:
            for name in self.children():
                self.child(name).remove()
            os.rmdir(self._prefix.rstrip("/") or str(self.path),
                     dir_fd=self.dir_fd if self._prefix else None)  # fmt: skip
        except CgroupGone:
            return
        except OSError as error:
            if error.errno not in _GONE:
                raise self._error(error, ".", "") from None

    def kill_and_remove(self, timeout_s: float = 10.0) -> None:
        """Kill, wait until empty, remove; blocking, for start-up and shutdown."""
        deadline = time.monotonic() + timeout_s
        pause_s = 0.001
        while True:
            try:
                self.kill()
                self.remove()
                return
            except CgroupGone:
                return
            except KnobError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)

    def enable(self, controllers: tuple[str, ...]) -> tuple[str, ...]:
        """Enable controllers for the children of this cgroup, one by one; returns those that the
        kernel refused or does not offer here."""
        refused = []
        enabled = self.read(CGROUP_SUBTREE_CONTROL)
        for name in controllers:
            if name in enabled:
                continue
            try:
                self.write_text(CGROUP_SUBTREE_CONTROL.file, f"+{name}")
            except CgroupGone:
                raise
            except KnobError:
                refused.append(name)
        return tuple(refused)

    def proc_path(self) -> str:
        """A path of the directory through the held descriptor, ended by a slash where it has a
        name, for calls that take only paths."""
        return f"/proc/self/fd/{self.dir_fd}/{self._prefix}"

    def get_xattr(self, name: str = XATTR_NAME) -> bytes | None:
        """An extended attribute of the directory, None where it is not set."""
        try:
            return os.getxattr(self.proc_path(), name)
        except OSError as error:
            if error.errno == errno.ENODATA:
                return None
            raise self._error(error, name) from None

    def set_xattr(self, value: bytes, name: str = XATTR_NAME) -> None:
        """Set an extended attribute of the directory."""
        try:
            os.setxattr(self.proc_path(), name, value)
        except OSError as error:
            raise self._error(error, name, "") from None

    def remove_xattr(self, name: str = XATTR_NAME) -> None:
        """Remove an extended attribute; no error if it is not set."""
        try:
            os.removexattr(self.proc_path(), name)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise self._error(error, name, "") from None

    def list_xattrs(self) -> list[str]:
        """Names of the directory's extended attributes."""
        return os.listxattr(self.proc_path())


def move_all(source: Cgroup, target: Cgroup, attempts: int = 100) -> int:
    """Move every process of `source` into `target`, repeating while new ones are forked.

    Returns how many were moved. Raises KnobError (EBUSY) if `source` still has processes after
    `attempts` rounds, as a fork bomb would.
    """
    moved = 0
    for _ in range(attempts):
        pids = source.procs()
        if not pids:
            return moved
        for pid in pids:
            try:
                target.attach(pid)
                moved += 1
            except CgroupGone:
                raise
            except KnobError as error:
                # ESRCH: it ended meanwhile. EINVAL: pid 0, a process of a pid namespace beside
                # ours.
                if error.errno != errno.ESRCH:
                    raise
    raise KnobError(OSError(errno.EBUSY, "still has processes"), str(source.path), "cgroup.procs")


_OCTAL = re.compile(rb"\\([0-7]{3})")


def _unescape(name: bytes) -> str:
    """A path of mountinfo, where the kernel writes blanks, newlines and backslashes as octal
    numbers (fs/proc_namespace.c: show_mountinfo)."""
    return os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), name))


def cgroup2_mount(mountinfo: str = "/proc/self/mountinfo") -> Path:
    """Where cgroup v2 is mounted. OSError (ENOENT) if it is not."""
    # Bytes, and lines that end at a newline alone: a mount point may hold any other control
    # character as it is.
    with open(mountinfo, "rb") as file:
        lines = file.read().split(b"\n")
    for line in lines:
        mount, _, filesystem = line.partition(b" - ")
        if filesystem.startswith(b"cgroup2 "):
            return Path(_unescape(mount.split(b" ")[4]))
    raise OSError(errno.ENOENT, "no cgroup2 file system is mounted", mountinfo)
