"""Limits of this host that the daemon may run into: watches, descriptors, processes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from agentcgroup.text import printable
from agentcgroupd.doctor.diagnosis import Feature, State
from agentcgroupd.host.mounts import mounts
from agentcgroupd.host.proc import parse_written
from agentcgroupd.host.syscalls import inotify_init

WATCHES_WANTED = 65_536
FILES_WANTED = 65_536
PIDS_WANTED = 32_768
MOUNTS_SHOWN = 4
_PROJECTS = frozenset({b"prjquota", b"pquota"})
"""Options of file systems that hold directories to a quota (xfs(5), ext4(5))."""
_INOTIFY = Path("/proc/sys/fs/inotify")
_PID_MAX = Path("/proc/sys/kernel/pid_max")


def limit_features() -> Iterator[Feature]:
    """Whether calls can be watched, files opened and processes started in the numbers wanted."""
    yield _watches()
    yield _files()
    yield _pids()
    yield _writes()


def _writes() -> Feature:
    """Tell how it is known what a call writes, and where the kernel keeps quotas of directories."""
    name = "limits of what is written"
    try:
        parse_written(Path("/proc/self/io").read_bytes())
    except (OSError, ValueError):
        reason = "processes do not tell what they write (/proc/self/io)"
        remedy = "use a kernel with CONFIG_TASK_IO_ACCOUNTING"
        fallback = "disk_max counts what is written back (io.stat), late"
        return Feature(name, State.MISSING, reason, remedy, fallback)
    try:
        kept = sorted({str(m.point) for m in mounts() if _PROJECTS.intersection(m.options)})
    except (OSError, ValueError):
        kept = []
    shown = ", ".join(kept[:MOUNTS_SHOWN]) or "none, so the daemon's looks are all there is"
    reason = f"/proc/<pid>/io tells what is written; file systems with project quotas: {shown}"
    return Feature(name, State.WORKS, printable(reason))


def _watches() -> Feature:
    name = "inotify watches"
    try:
        watches = int((_INOTIFY / "max_user_watches").read_text())
        instances = int((_INOTIFY / "max_user_instances").read_text())
    except (OSError, ValueError) as error:
        return Feature(name, State.UNKNOWN, f"{_INOTIFY} cannot be read: {error}")
    fallback = "cgroups are read at intervals: ends of calls are noticed later"
    if watches < WATCHES_WANTED:
        reason = f"a user may have {watches}, and other programs of root take from the same"
        remedy = f"sysctl -w fs.inotify.max_user_watches={8 * WATCHES_WANTED}"
        return Feature(name, State.MISSING, reason, remedy, fallback)
    try:
        os.close(inotify_init())
    except OSError as error:
        reason = f"no instance is left of the {instances} a user may have: {error.strerror}"
        remedy = f"sysctl -w fs.inotify.max_user_instances={4 * max(instances, 128)}"
        return Feature(name, State.MISSING, reason, remedy, fallback)
    return Feature(name, State.WORKS, f"{watches} for each user")


def _files() -> Feature:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED:
        return Feature("open files", State.WORKS, "the daemon may have as many as it wants")
    reason = f"a process started here may have {hard}"
    remedy = f"LimitNOFILE={4 * FILES_WANTED} in the unit, or ulimit -Hn {4 * FILES_WANTED}"
    return Feature("open files", State.MISSING, reason, remedy, "fewer connections and calls")


def _pids() -> Feature:
    try:
        most = int(_PID_MAX.read_text())
    except (OSError, ValueError) as error:
        return Feature("processes", State.UNKNOWN, f"{_PID_MAX} cannot be read: {error}")
    if most >= PIDS_WANTED:
        return Feature("processes", State.WORKS, f"kernel.pid_max is {most}")
    remedy = "sysctl -w kernel.pid_max=4194304"
    reason = f"kernel.pid_max is {most}"
    return Feature("processes", State.MISSING, reason, remedy, "sessions share few processes")
