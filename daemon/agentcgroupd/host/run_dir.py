"""The directory of the daemon's sockets, which nobody but root may be able to change.

Whoever could rename or replace a directory on the way to the sockets could put sockets of their own
there, and agents would ask them. So each directory of the path has to belong to root, no other may
write to it (in a sticky one, such as /tmp, others cannot rename what is not theirs), and none is a
symbolic link.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from agentcgroupd.errors import ConfigError
from agentcgroupd.host.flock import Locked, lock

PARTS = (("", 0o755), ("agent", 0o755), ("admin", 0o700), ("private", 0o700))
"""Directories below it, and who may enter each."""
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class RunDir:
    """The directory, made where it was missing. After a failed start, `undo` removes what was."""

    def __init__(self, path: Path) -> None:
        """Check the directories that are there and make those that are not. Raises ConfigError;
        then nothing new is left."""
        self.path = path
        self._made: list[Path] = []
        try:
            if not path.is_absolute() or ".." in path.parts:
                raise _unusable(path, "allowed is an absolute path without `..`")
            self._make_way()
            for name, mode in PARTS:
                self._make(path / name, mode)
        except BaseException:
            self.undo()
            raise

    @classmethod
    def check(cls, path: Path) -> None:
        """Check the directories that are there, with nothing made. Raises ConfigError."""
        unmade = cls.__new__(cls)
        unmade.path = path
        for directory in (*reversed(path.parents), path):
            if not directory.is_symlink() and not directory.exists():
                return
            unmade._check(directory)

    def _make_way(self) -> None:
        for directory in reversed(self.path.parents):
            self._make(directory, None)

    def _make(self, directory: Path, mode: int | None) -> None:
        """Make a directory, or take the one that is there. `mode`: what it is set to; None: an
        existing one stays as it is, and a new one gets 0755."""
        try:
            os.mkdir(directory, 0o755 if mode is None else mode)
            self._made.append(directory)
        except FileExistsError:
            self._check(directory)
        except OSError as error:
            raise _unusable(self.path, f"making {directory}: {error.strerror}") from None
        if mode is not None:
            os.chmod(directory, mode)

    def _check(self, directory: Path) -> None:
        try:
            fd = os.open(directory, _DIRECTORY)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise _unusable(self.path, f"{directory}: {error.strerror}") from None
            if directory.is_symlink():
                real = os.path.realpath(self.path)
                why = f"{directory} is a symbolic link; name the directory itself, such as {real}"
            else:
                why = f"{directory} is no directory"
            raise _unusable(self.path, why) from None
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
        if found.st_uid not in (0, os.geteuid()):
            why = f"{directory} belongs to uid {found.st_uid}, who could replace the sockets"
            raise _unusable(self.path, f"{why}; it has to belong to root")
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        is_way = directory in self.path.parents
        if others and not (is_way and found.st_mode & stat.S_ISVTX):
            mode = stat.S_IMODE(found.st_mode)
            why = f"{directory} has mode {mode:04o}, so that others than root may write to it"
            raise _unusable(self.path, f"{why}; remove that with `chmod go-w {directory}`")

    def lock(self) -> int:
        """Lock the directory for this daemon; returns the descriptor that holds the lock. Raises
        ConfigError."""
        fd = os.open(self.path / "private/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock(fd)
        except Locked as error:
            os.close(fd)
            who = f"with pid {error.pid}" if error.pid else "whose pid cannot be seen here"
            raise _unusable(self.path, f"another daemon is running in it, {who}") from None
        return fd

    def tell_pool(self, mount: Path, path: str) -> None:
        """Leave word of where the pool is, for agentcg-release, which reads no configuration:
        the cgroup2 mount, and the path below it, a line each. Raises OSError."""
        new = self.path / "private/pool.new"
        try:
            new.write_bytes(os.fsencode(f"{mount}\n{path}\n"))
            new.replace(self.path / "private/pool")
        except OSError as error:
            new.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(new)) from None

    def keep(self) -> None:
        """Let the directories stay from now on, whatever comes: the daemon has started."""
        self._made.clear()

    def undo(self) -> None:
        """Remove the directories that were made here and are empty."""
        if self.path / "private" in self._made:
            for name in ("lock", "pool"):
                (self.path / "private" / name).unlink(missing_ok=True)
        for directory in reversed(self._made):
            try:
                os.rmdir(directory)
            except OSError:
                return  # in use by others by now, and so are those above it
        self._made.clear()


def _unusable(path: Path, why: str) -> ConfigError:
    return ConfigError(f"server.run_dir: {str(path)!r} cannot be used: {why}")
