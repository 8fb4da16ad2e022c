"""Files of /proc that tell which cgroup a process is in and what it was started with.

Names of cgroups, mount points and arguments are bytes that users choose: anything but NUL and, in
some of these files, a newline may be in them. So the files are read as bytes and split at the
newline byte alone. Python's text mode and `str.splitlines` would also split at a carriage return, a
form feed or U+2028, and a name that holds one could then pass for a line of its own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from agentcgroupd.errors import AgentcgroupdError
from agentcgroupd.host.syscalls import read_whole

_READ_BYTES = 65_536
CMDLINE_BYTES_MAX = 65_536
"""Most that is read of the command line of a process that an agent started."""
UNIFIED = b"0::"
"""Begins the line of the cgroup v2 hierarchy in /proc/<pid>/cgroup (cgroups(7))."""


class CgroupUnknown(AgentcgroupdError):
    """A process's cgroup v2 path cannot be told from what the kernel shows of it."""


def parse_cgroup(data: bytes) -> str:
    """The cgroup v2 path in the content of /proc/<pid>/cgroup, below the mount, decoded by
    `os.fsdecode`. The kernel appends ` (deleted)` to the path of a cgroup that was removed.

    The kernel lets no cgroup name contain a newline (kernel/cgroup/cgroup.c: cgroup_mkdir), so a
    line is what lies between newlines. Raises CgroupUnknown unless exactly one line begins with
    `0::`.
    """
    paths = [line[len(UNIFIED) :] for line in data.split(b"\n") if line.startswith(UNIFIED)]
    if len(paths) != 1:
        raise CgroupUnknown(f"{len(paths)} lines of /proc/<pid>/cgroup are of cgroup v2, not one")
    return os.fsdecode(paths[0])


def cgroup_of(pid: int) -> str:
    """The cgroup v2 path of a process, as `parse_cgroup` gives it. Raises FileNotFoundError or
    ProcessLookupError when there is no such process, CgroupUnknown when the path cannot be told."""
    data = read_whole(f"/proc/{pid}/cgroup")
    if not data:
        # The process was reaped after the file had been opened.
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f"/proc/{pid}/cgroup")
    return parse_cgroup(data)


def read_proc(pid: int, file: str, most_bytes: int = -1) -> bytes:
    """The first `most_bytes` of /proc/<pid>/<file>; -1: all of it. Raises FileNotFoundError or
    ProcessLookupError when there is no such process."""
    # Without the system calls by which open() finds out what kind of file it is: this is done for
    # each connection.
    fd = os.open(f"/proc/{pid}/{file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) != most_bytes:
            left = _READ_BYTES if most_bytes < 0 else min(_READ_BYTES, most_bytes - len(data))
            more = os.read(fd, left)
            if not more:
                break
            data += more
        return data
    finally:
        os.close(fd)


def parse_written(data: bytes) -> int:
    """Bytes that a process has had written to disks, from the content of /proc/<pid>/io. Raises
    ValueError where they are not there."""
    for line in data.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"write_bytes":
            return int(value)
    raise ValueError("no write_bytes in /proc/<pid>/io")


def children_of(pid: int) -> Iterator[list[int]]:
    """Pids of the children of a process, by the thread that has started them; none where it has
    ended, or where this kernel does not tell (CONFIG_PROC_CHILDREN)."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            yield list(map(int, read_proc(pid, f"task/{thread}/children").split()))
    except (FileNotFoundError, ProcessLookupError):
        return


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal. Raises FileNotFoundError or ProcessLookupError when there
    is no such process."""
    for line in read_proc(pid, "status").split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"SigIgn":
            return bool(int(value, 16) >> (number - 1) & 1)
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f"/proc/{pid}/status")


def tracer_of(pid: int, threads_most: int = 256) -> int:
    """The pid of the tracer that a process, or one of its first threads, is stopped for, as in
    ptrace(2); 0: it is stopped for none, or has ended."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task")[:threads_most]:
            lines = read_proc(pid, f"task/{thread}/status").split(b"\n")
            fields = dict(line.split(b":\t", 1) for line in lines if b":\t" in line)
            if fields.get(b"State", b"").startswith(b"t"):
                return int(fields[b"TracerPid"])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def command_line(pid: int, most_bytes: int = -1) -> list[str]:
    """The arguments of a process, or those in the first `most_bytes`, with U+FFFD for what is not
    UTF-8; empty for a process that has ended."""
    try:
        data = read_proc(pid, "cmdline", most_bytes)
    except (FileNotFoundError, ProcessLookupError):
        return []
    text = data.decode("utf-8", "replace")
    return text.rstrip("\0").split("\0") if text else []


def program_name(pid: int) -> str:
    """The name in /proc/<pid>/comm, with U+FFFD for what is not UTF-8. Raises FileNotFoundError or
    ProcessLookupError when there is no such process."""
    return read_proc(pid, "comm").removesuffix(b"\n").decode("utf-8", "replace")
