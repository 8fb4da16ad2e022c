"""Cgroups as directories under a held descriptor.

A `Cgroup` is a directory below one that the daemon keeps open. An operation therefore reaches the
directory that was meant, or fails; a directory that someone has since made under the same path is
never touched. Interface files are opened without O_CREAT, so that on a wrong mount an error shows
instead of a plain file appearing.

A call's leaf has no descriptor of its own: it is named relative to its session's directory. Its
name is random, is used once, and only the daemon makes and removes it.
"""

from __future__ import annotations

import errno
import os
import signal
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
from agentcgroupd.cgroup.subtree import GONE, pids_in, remove_below, signal_in, walk
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.host.mounts import MOUNTINFO, Mount, mounts
from agentcgroupd.host.syscalls import read_whole
from agentcgroupd.units import CgroupId

T = TypeVar("T")

_NAMESPACE_ROOT = Path("/")
XATTR_NAME = "trusted.agentcgroup"
"""Attributes named trusted.* are readable and writable only with CAP_SYS_ADMIN in the initial user
namespace, so a container cannot forge one."""


class Cgroup:
    """A cgroup directory: `name` below the open directory `dir_fd` (`.`: that directory itself)."""

    __slots__ = ("_prefix", "dir_fd", "id", "path")

    def __init__(self, dir_fd: int, name: str, path: Path) -> None:
        """Find the directory. `path` is for messages and for calls that take no descriptor. Raises
        OSError if it is missing."""
        self.dir_fd = dir_fd
        self.path = path
        self._prefix = "" if name == "." else f"{name}/"
        self.id = CgroupId(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_ino)

    @classmethod
    def open(cls, path: Path) -> Cgroup:
        """Open an existing cgroup and hold its directory until close(). Raises OSError."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return cls(fd, ".", path)

    def close(self) -> None:
        """Give up the held directory (only for cgroups from `open`)."""
        os.close(self.dir_fd)

    def __repr__(self) -> str:
        return f"Cgroup({self.path}, id={self.id})"

    def _error(self, error: OSError, file: str, value: str | None = None) -> KnobError:
        gone = error.errno in GONE and not self.exists()
        return (CgroupGone if gone else KnobError)(error, str(self.path), file, value)

    def _open_directory(self) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(f"{self._prefix}.", flags, dir_fd=self.dir_fd)
        except OSError as error:
            raise self._error(error, ".") from None

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
        fd = self._open_directory()
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
            data = read_whole(self._prefix + knob.file, self.dir_fd)
        except OSError as error:
            raise self._error(error, knob.file) from None
        return knob.parse(data.decode())

    def read_if(self, knob: Knob[T]) -> T | None:
        """Read an interface file; None where this kernel or cgroup does not have it. Raises
        KnobError, or CgroupGone."""
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
        """Write text to an interface file as it is; `flags` are added to open(2)'s. Raises
        KnobError, or CgroupGone."""
        try:
            how = os.O_WRONLY | os.O_CLOEXEC | flags
            fd = os.open(self._prefix + file, how, dir_fd=self.dir_fd)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise self._error(error, file, text) from None

    def open_file(self, knob: Knob[Any], flags: int, text: str = "") -> int:
        """Open an interface file and return the descriptor, which the caller closes.

        `text`, unless it is empty, is written first; some files (PSI triggers) keep what was
        written in force for as long as the descriptor is open. Raises KnobError, or CgroupGone.
        """
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
        """Move a process, with all its threads, into this cgroup. Raises KnobError, or
        CgroupGone."""
        self.write_text(CGROUP_PROCS.file, str(pid))

    def procs(self) -> tuple[int, ...]:
        """Pids of the processes in this cgroup itself, not in those below it. Raises KnobError, or
        CgroupGone."""
        return self.read(CGROUP_PROCS)

    def populated(self) -> bool:
        """Whether a live process is in this cgroup or below it. Raises KnobError, or CgroupGone."""
        return self.read(CGROUP_EVENTS)["populated"] == 1

    def kill(self) -> None:
        """Send SIGKILL to every process in this cgroup and below it (Linux 5.14). Raises KnobError,
        or CgroupGone.

        A process may outlive that: Linux 6.18 misses one whose main thread has ended while another
        thread lives. `signal` reaches such a process, too.
        """
        self.write(CGROUP_KILL, True)

    def signal(self, number: int) -> int:
        """Send a signal to each process in this cgroup and below it. Returns how many there were.
        Raises KnobError, or CgroupGone."""
        return sum(self.signal_parts(number))

    def signal_parts(self, number: int) -> Iterator[int]:
        """Do the same part by part: yields how many there were in each. Raises KnobError, or
        CgroupGone."""
        try:
            top = self._open_directory()
            try:
                for directory in walk(top):
                    yield 0
                    yield from signal_in(directory, number)
            finally:
                os.close(top)
        except OSError as error:
            raise self._error(error, CGROUP_PROCS.file) from None

    def all_procs(self) -> list[int]:
        """List the processes in this cgroup and below it. Raises KnobError, or CgroupGone."""
        try:
            top = self._open_directory()
            try:
                return [pid for directory in walk(top) for pid in pids_in(directory)]
            finally:
                os.close(top)
        except OSError as error:
            raise self._error(error, CGROUP_PROCS.file) from None

    def child(self, name: str) -> Cgroup:
        """The existing cgroup `name` below this one. Raises CgroupGone."""
        try:
            return Cgroup(self.dir_fd, self._prefix + name, self.path / name)
        except OSError as error:
            raise CgroupGone(error, str(self.path / name), ".") from None

    def make_child(self, name: str) -> Cgroup:
        """Make the cgroup `name` below this one. Raises KnobError (EEXIST: there is one), or
        CgroupGone."""
        try:
            os.mkdir(self._prefix + name, 0o755, dir_fd=self.dir_fd)
        except OSError as error:
            raise self._error(error, name, "") from None
        return Cgroup(self.dir_fd, self._prefix + name, self.path / name)

    def children(self) -> Iterator[str]:
        """Names of the cgroups directly below this one, sorted. Raises KnobError, or CgroupGone."""
        fd = self._open_directory()
        try:
            names = [entry.name for entry in os.scandir(fd) if entry.is_dir(follow_symlinks=False)]
        finally:
            os.close(fd)
        yield from sorted(names)

    def remove(self) -> None:
        """Remove this cgroup and all below it, however deep; no error if it is gone already.
        Raises KnobError (EBUSY: one of them is populated)."""
        try:
            # Mostly there is nothing below it.
            self._remove_itself()
            return
        except OSError as error:
            if error.errno in GONE:
                return
        try:
            top = self._open_directory()
        except CgroupGone:
            return
        try:
            remove_below(top)
        except OSError as error:
            raise self._error(error, ".", "") from None
        finally:
            os.close(top)
        try:
            self._remove_itself()
        except OSError as error:
            if error.errno not in GONE:
                raise self._error(error, ".", "") from None

    def _remove_itself(self) -> None:
        if self._prefix:
            os.rmdir(self._prefix.rstrip("/"), dir_fd=self.dir_fd)
        else:
            os.rmdir(self.path)

    def kill_and_remove(self, timeout_s: float = 10.0) -> None:
        """Kill every process, wait until there is none, and remove the directories. Blocks for up
        to `timeout_s`, so it is for start-up and shutdown. Raises KnobError (EBUSY: too late)."""
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
            self._signal_survivors()
            pause_s = min(pause_s * 2, 0.1)

    def _signal_survivors(self) -> None:
        try:
            self.signal(signal.SIGKILL)
        except KnobError:
            return  # the next try to remove the cgroup says what is wrong

    def enable(self, controllers: tuple[str, ...]) -> tuple[str, ...]:
        """Enable controllers for the children of this cgroup, one by one. Returns those that the
        kernel refused or does not offer here. Raises KnobError, or CgroupGone."""
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
        """A path of the directory through the held descriptor, with a slash at its end, for system
        calls that take only paths."""
        return f"/proc/self/fd/{self.dir_fd}/{self._prefix}"

    def get_xattr(self, name: str = XATTR_NAME) -> bytes | None:
        """An extended attribute of the directory; None where it is not set. Raises KnobError, or
        CgroupGone."""
        try:
            return os.getxattr(self.proc_path(), name)
        except OSError as error:
            if error.errno == errno.ENODATA:
                return None
            raise self._error(error, name) from None

    def set_xattr(self, value: bytes, name: str = XATTR_NAME) -> None:
        """Set an extended attribute of the directory. Raises KnobError, or CgroupGone."""
        try:
            os.setxattr(self.proc_path(), name, value)
        except OSError as error:
            raise self._error(error, name, "") from None

    def remove_xattr(self, name: str = XATTR_NAME) -> None:
        """Remove an extended attribute; no error if it is not set. Raises KnobError, or
        CgroupGone."""
        try:
            os.removexattr(self.proc_path(), name)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise self._error(error, name, "") from None

    def list_xattrs(self) -> list[str]:
        """Names of the directory's extended attributes. Raises OSError."""
        return os.listxattr(self.proc_path())


def move_all(source: Cgroup, target: Cgroup, attempts: int = 100, most: int | None = None) -> int:
    """Move every process of `source` into `target`, repeating while new ones are forked.

    Returns how many were moved. Raises KnobError (EBUSY) if `source` still has processes after
    `attempts` rounds, as a fork bomb would, or has had more than `most`.
    """
    moved = 0
    for _ in range(attempts):
        pids = source.procs()
        if not pids:
            return moved
        if most is not None and moved + len(pids) > most:
            break
        for pid in pids:
            try:
                target.attach(pid)
                moved += 1
            except CgroupGone:
                raise
            except KnobError as error:
                # ESRCH: the process has ended meanwhile. (EINVAL, which is raised: pid 0 stands
                # for a process of a pid namespace that is not below this one.)
                if error.errno != errno.ESRCH:
                    raise
    raise KnobError(OSError(errno.EBUSY, "still has processes"), str(source.path), "cgroup.procs")


def cgroup2_mount(mountinfo: str | Path = MOUNTINFO) -> Path:
    """The directory where cgroup v2 is mounted.

    Only a mount that shows this cgroup namespace from its root serves: below another one, a path
    from /proc/<pid>/cgroup names some other directory or none. Raises OSError: ENOENT without a
    mount, EXDEV (with both paths) if every mount has another root.
    """
    found = [mount for mount in mounts(mountinfo) if mount.kind == b"cgroup2"]
    for mount in found:
        if mount.root == _NAMESPACE_ROOT:
            return mount.point
    if found:
        raise OSError(errno.EXDEV, _other_root(found[0]), str(mountinfo))
    raise OSError(errno.ENOENT, "no cgroup2 file system is mounted", str(mountinfo))


def _other_root(mount: Mount) -> str:
    root, point = str(mount.root), str(mount.point)
    if ".." in mount.root.parts:
        return (
            f"cgroup2 at {point!r} begins at {root!r}, above this process's cgroup namespace: it "
            "was mounted from outside; mount cgroup2 inside this namespace, or share the host's "
            "(Docker: --cgroupns=host)"
        )
    return (
        f"cgroup2 at {point!r} begins at {root!r}, below the root of this process's cgroup "
        "namespace: mount cgroup2 itself instead of a part of it, or use a private cgroup namespace"
    )
