"""Second records of open calls, in files of the daemon's own.

The record of a call lies on its cgroup, where root in a tool can remove it, if it may write to the
host's cgroups (docs/security.md). A daemon that was killed then would find processes in a cgroup of
which it knows nothing. So each record is written here as well when a call begins, when a process
enters it and when its grant changes: one file for each open call, which is read only if the record
on the cgroup is gone. It is for the cgroup alone that it was written for: another of the same name,
which an agent may have made in its own session, is no call.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from agentcgroupd.state.records import read_record
from agentcgroupd.units import CgroupId

log = logging.getLogger(__name__)

DIRECTORY = "private/calls"
"""Below the run directory, where nobody but root can read or write."""
BYTES_MOST = 65536
"""Length of the longest extended attribute that the kernel keeps (XATTR_SIZE_MAX)."""
_ID = re.compile(r"[0-9a-f]{12}")


class SecondRecords:
    """The second records of one daemon's calls."""

    def __init__(self, run_dir: Path) -> None:
        """Keep the place; the directory is made with the first record."""
        self._directory = run_dir / DIRECTORY
        self._failed = False
        self.source = f"run directory: {DIRECTORY}"
        """What a fact that comes from here names as its source."""

    def keep(self, call_id: str, cgroup: CgroupId, record: bytes) -> None:
        """Write the record of a call. `cgroup`: the id of its cgroup. Where that fails, which is
        logged once, the one on its cgroup is the only one."""
        path = f"{self._directory}/{call_id}"
        record = b"%d\n%b" % (cgroup, record)
        try:
            try:
                _write(path, record)
            except FileNotFoundError:
                self._directory.mkdir(mode=0o700)
                _write(path, record)
        except OSError as error:
            self.drop(call_id)
            if not self._failed:
                self._failed = True
                log.warning(
                    "%s: %s; calls have no second record until there is room (said once)",
                    self._directory,
                    error.strerror,
                )

    def drop(self, call_id: str) -> None:
        """Remove the record of a call that has ended; no error if it has none."""
        try:
            os.unlink(f"{self._directory}/{call_id}")
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s of call %s: %s", self._directory, call_id, error.strerror)

    def read(self, call_id: str, cgroup: CgroupId) -> dict[str, Any] | None:
        """Read the record of a call in the cgroup of that id; None where there is none that can be
        read."""
        if not _ID.fullmatch(call_id):
            return None
        try:
            with (self._directory / call_id).open("rb") as file:
                mark, _, record = file.read(BYTES_MOST + 32).partition(b"\n")
        except OSError:
            return None
        return read_record(record, "call") if mark == b"%d" % cgroup else None

    def drop_all_but(self, open_ids: Container[str]) -> None:
        """Remove the records of calls that ended while no daemon was there."""
        try:
            names = [path.name for path in self._directory.iterdir()]
        except FileNotFoundError:
            return
        for name in names:
            if name not in open_ids:
                self.drop(name)


def _write(path: str, data: bytes) -> None:
    """Write a file, which may be there. Raises OSError.

    Every call that begins waits for this twice. A file that was emptied first would be sent to the
    disk when it is closed (ext4(5), auto_da_alloc), which takes several times as long.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, len(data))
    finally:
        os.close(fd)
