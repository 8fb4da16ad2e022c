"""What a model should know of an ended call, in words: why it did not simply end by itself, and
what to try next. `agentcg hook` says the same of calls that it finds."""

from __future__ import annotations

import os
import tempfile

from agentcgroup import worth_telling
from agentcgroup.types import FeedbackCode, Report, Verdict

BY_ITSELF = frozenset(Verdict[name] for name in worth_telling.BY_ITSELF)
WORTH_TELLING = frozenset(FeedbackCode[name] for name in worth_telling.FEEDBACK)
DISK_LEAST_BYTES = 1 << 20
"""With less free than that, writing has begun to fail."""
MAKE_ROOM = "write elsewhere, or remove what this task has made and needs no more."
"""Advice that does not invite anybody to remove what belongs to others."""


def told(report: Report | None, directory: str | os.PathLike[str] | None = None) -> str:
    """Return what to tell a model of a call, in one line; empty: nothing, it went as it should.

    report: None: it ran without control. directory: the tool's working directory; None: this
    process's. A disk that is full is told of a call that failed.
    """
    if report is None:
        return ""
    said = [f.sentence for f in report.feedback if f.code in WORTH_TELLING]
    if report.verdict not in BY_ITSELF or (report.try_next is not None and not said):
        said.insert(0, report.sentence)
    said = list(dict.fromkeys(said))
    if report.try_next is not None:
        said += report.try_next.steps
    if report.verdict != Verdict.OK:
        said += filter(None, [full_disk(directory)])
    return " ".join(said)


def full_disk(directory: str | os.PathLike[str] | None = None) -> str:
    """Say which file system is full of those that a command writes to, its working directory's and
    that of temporary files; empty: neither."""
    for path in (os.fspath(directory or os.curdir), tempfile.gettempdir()):
        try:
            found = os.statvfs(path)
        except OSError:
            continue  # the directory is gone, and what the command wrote with it
        shown, free = os.path.abspath(path), found.f_bavail * found.f_frsize
        if found.f_blocks and free < DISK_LEAST_BYTES:
            return f"The file system of {shown} is full ({free >> 10} KiB free): {MAKE_ROOM}"
        if found.f_files and not found.f_favail:
            return f"The file system of {shown} can hold no more files (inodes): {MAKE_ROOM}"
    return ""
