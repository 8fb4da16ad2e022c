"""The audit log: what was asked, granted, refused, done, and how it ended, as JSON lines.

How a line looks is in agentcgroup.audit. Here: what is kept when there is too much of it, and when
it cannot be written. One session may have a share of each file and a rate, so that it cannot write
away what others did; a file that is full makes place for a new one, and the oldest goes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format, message

from agentcgroup import audit as form
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.state.session import unix_usec

log = logging.getLogger(__name__)

TAIL_BYTES = 8 << 20
"""How much of the log is read back at start to find the reports of open sessions."""
LOOK_EVERY_S = 1.0
"""How often it is asked whether somebody else has moved or emptied the file."""
TELL_EVERY_S = 60.0
"""How often it is told that entries of a session are being left out, while they are."""
OF_OPERATOR = ("session_opened", "session_changed", "session_closed")
"""Entries about a session that it cannot cause by itself."""
_AT = re.compile(rb'\{"at_unix_usec": (\d{1,19}),')
_SESSION = re.compile(rb'"session": "([a-z0-9][a-z0-9_.-]{0,62})"')


@dataclass(frozen=True, slots=True)
class AuditLimits:
    """How much is kept."""

    file_bytes: int
    files: int = 4
    """Files that are kept beside the one that is written."""
    session_percent: int = 25
    """Share of a file that entries of one session may take."""
    session_rate: int = 500
    """Entries a second of one session; ten times as many at once."""
    least_age_s: float = 86_400.0
    """A file is not given up sooner because one session has used up its share."""


class _Share:
    """What a session has written into the file, and how fast it goes on."""

    __slots__ = ("left_out", "tokens", "told_at", "used_bytes", "why")

    def __init__(self, tokens: float) -> None:
        self.used_bytes = 0
        self.tokens = (tokens, time.monotonic())
        self.left_out = 0
        """Entries that were left out and not told of yet."""
        self.told_at = float("-inf")
        self.why = ""

    def take(self, rate: int) -> bool:
        """Take a token, if there is one."""
        tokens, since = self.tokens
        now = time.monotonic()
        tokens = min(rate * 10.0, tokens + (now - since) * rate)
        self.tokens = (tokens - 1 if tokens >= 1 else tokens, now)
        return tokens >= 1


class Audit:
    """Appends to the log. A full disk costs entries, which are counted and told, never the
    daemon."""

    def __init__(
        self,
        path: Path | None,
        max_bytes: int,
        limits: AuditLimits | None = None,
        also: Callable[[str, Mapping[str, Any]], None] = lambda event, fields: None,
    ) -> None:
        """`path` None: nothing is written. `limits`: more than the size of a file. `also`: is told
        of each entry, those that are left out or lost here among them. Raises OSError if the log
        cannot be opened now."""
        self._path = path
        self._also = also
        self._limits = limits or AuditLimits(max_bytes)
        self._fd = -1
        self.lost = 0
        """Entries that could not be written so far."""
        self.left_out = 0
        """Entries that were left out so far, because their session had too many."""
        self._untold_losses = 0
        self._seq, self._chain = 0, ""
        self._torn = 0
        """Bytes of a line that was cut short at the end of the file."""
        self._opened_why = ""
        """Why a new file was begun, which its first entry tells; empty: none was."""
        self._shares: dict[str, _Share] = {}
        self._made = False
        self._made_above: list[Path] = []
        """Directories that were made for the file, the innermost first."""
        self._looked_at = time.monotonic()
        self._no_rotation_until = 0.0
        if path is not None:
            self._made_above = [above for above in path.parents if not above.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(path, "")

    # The file

    def _open(self, path: Path, why: str) -> None:
        """Open the file, which may be new, and go on behind what is in it. Raises OSError."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        found = os.fstat(fd)
        self._size, self._inode = found.st_size, (found.st_dev, found.st_ino)
        self._made = self._size == 0
        self._opened_usec, self._opened_at = unix_usec(), time.monotonic()
        self._age_before_s = 0.0
        self._torn, self._opened_why = 0, why
        self._shares = {}
        if self._size:
            self._go_on(path)

    def _go_on(self, path: Path) -> None:
        line, self._torn = form.last_line(path)
        link = form.link_of(line)
        if link is not None and not self._chain:
            self._seq, self._chain = link
            self._opened_why = ""
        with path.open("rb") as file:
            first = file.readline(form.LINE_BYTES_MAX)
            try:
                since = int(json.loads(first)["at_unix_usec"])
                self._age_before_s = max(0.0, (unix_usec() - since) / 1e6)
            except (ValueError, KeyError, TypeError, RecursionError):
                log.debug("%s: its first line tells no time", path)
            self._count(first)
            for line in file:
                self._count(line)

    def _count(self, line: bytes) -> None:
        """Count a line that was there already to its session's share."""
        if (session := _SESSION.search(line)) is not None:
            self._share(session[1].decode()).used_bytes += len(line)

    def _look(self, path: Path) -> None:
        """Notice that somebody else has moved, removed or emptied the file. Raises OSError."""
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            there = os.stat(path)
        except FileNotFoundError:
            self._open(path, "moved")
            return
        if (there.st_dev, there.st_ino) != self._inode:
            self._open(path, "moved")
        elif there.st_size < self._size:
            self._size = there.st_size
            self._shares, self._opened_why = {}, "emptied"

    def _rotate_if_possible(self) -> None:
        """Begin a new file. Where that cannot be done, the old one grows, which is better than that
        entries are lost."""
        assert self._path is not None
        if time.monotonic() < self._no_rotation_until:
            return
        try:
            self._rotate(self._path)
        except OSError as error:
            self._no_rotation_until = time.monotonic() + TELL_EVERY_S
            log.error("audit log %s is full and cannot be renamed: %s", self._path, error)

    def _rotate(self, path: Path) -> None:
        """Begin a new file; the oldest goes. Raises OSError."""
        for share in list(self._shares.items()):
            self._tell_left_out(*share)
        for number in range(self._limits.files, 0, -1):
            newer = path.with_suffix(f".{number - 1}.jsonl") if number > 1 else path
            try:
                os.replace(newer, path.with_suffix(f".{number}.jsonl"))
            except FileNotFoundError:
                continue  # there are not that many yet, or it was moved a moment ago
        self._open(path, "rotated")

    def close(self) -> None:
        """Tell what was not told yet, and close the file. A new one without an entry is removed,
        with the directories that were made for it."""
        if self._fd < 0 or self._path is None:
            return
        try:
            for share in list(self._shares.items()):
                self._tell_left_out(*share)
        except OSError as error:
            log.error("audit log %s: %s", self._path, error)
        if self._made and self._size == 0:
            self._path.unlink(missing_ok=True)
            self._remove_above()
        os.close(self._fd)
        self._fd = -1

    def _remove_above(self) -> None:
        for directory in self._made_above:
            try:
                directory.rmdir()
            except OSError:
                return  # others use it by now

    # Writing

    def write(self, event: str, **fields: Any) -> None:
        """Append one entry; protobuf messages are written as JSON objects with their field
        names."""
        self._also(event, fields)
        if self._fd < 0 or self._path is None:
            return
        session = fields.get("session") or ""
        try:
            self._look(self._path)
            if session and event not in OF_OPERATOR and not self._may_write(str(session)):
                self.left_out += 1
                return
            plain = {
                key: json_format.MessageToDict(value, preserving_proto_field_name=True)
                if isinstance(value, message.Message)
                else value
                for key, value in fields.items()
            }
            if self._untold_losses:
                self._tell_losses()
            size = self._append({"event": event, **plain})
        except OSError as error:
            self._lose(error)
            return
        if session:
            self._share(str(session)).used_bytes += size

    def _lose(self, error: OSError) -> None:
        if self._untold_losses == 0:
            log.error("audit log %s: %s; entries are lost and counted", self._path, error)
        self.lost += 1
        self._untold_losses += 1

    def _tell_losses(self) -> None:
        if self._torn or self._opened_why:
            self._begin()
        self._about_log(form.LOST, count=self._untold_losses)
        log.warning("audit log %s: it can be written again", self._path)
        self._untold_losses = 0

    def _append(self, entry: dict[str, Any]) -> int:
        """Write a line, in a new file if this one is full; returns its length in bytes. Raises
        OSError; then no part of it is in the file."""
        entry = {"at_unix_usec": unix_usec(), **entry}
        line, chain = form.chained(entry, self._seq + 1, self._chain)
        if self._size and self._size + len(line) > self._limits.file_bytes:
            self._rotate_if_possible()
        if self._torn or self._opened_why:
            self._begin()
            line, chain = form.chained(entry, self._seq + 1, self._chain)
        self._put(line, chain)
        return len(line)

    def _about_log(self, event: str, **fields: Any) -> None:
        """Write an entry of the log about itself, whatever its size is. Raises OSError."""
        entry = {"at_unix_usec": unix_usec(), "event": event, **fields}
        self._put(*form.chained(entry, self._seq + 1, self._chain))

    def _begin(self) -> None:
        """Say how the file begins, or what a crash has left at its end. Raises OSError."""
        if self._torn:
            self._put_raw(b"\n")
            torn, self._torn = self._torn, 0
            self._about_log(form.TORN, bytes=torn)
        if self._opened_why:
            self._about_log(form.OPENED, after=self._chain, why=self._opened_why)
            self._opened_why = ""

    def _put(self, line: bytes, chain: str) -> None:
        self._put_raw(line)
        self._seq, self._chain = self._seq + 1, chain

    def _put_raw(self, data: bytes) -> None:
        """Append bytes: all of them, or none. Raises OSError."""
        written = os.write(self._fd, data)
        self._size += written
        if written == len(data):
            return
        # The disk is full. What has no end would look like an entry that a crash cut short.
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            self._size -= written
        except OSError:
            self._torn += written
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # Shares

    def _share(self, session: str) -> _Share:
        share = self._shares.get(session)
        if share is None:
            share = self._shares[session] = _Share(self._limits.session_rate * 10.0)
        return share

    def _may_write(self, session: str) -> bool:
        """Whether a session has room for another entry; counts one that is left out. Raises
        OSError."""
        share, limits = self._share(session), self._limits
        if share.used_bytes >= limits.file_bytes * limits.session_percent // 100:
            age_s = self._age_before_s + time.monotonic() - self._opened_at
            if age_s >= limits.least_age_s and self._path is not None:
                self._rotate_if_possible()
                return True
            share.why = f"it has {limits.session_percent} % of this file"
        elif share.take(limits.session_rate):
            self._tell_left_out(session, share)
            return True
        else:
            share.why = f"more than {limits.session_rate} a second"
        share.left_out += 1
        if time.monotonic() - share.told_at >= TELL_EVERY_S:
            self._tell_left_out(session, share)
        return False

    def _tell_left_out(self, session: str, share: _Share) -> None:
        """Write how many entries of a session were left out since that was told last. Raises
        OSError."""
        if not share.left_out:
            return
        log.warning(
            "audit log: %d entries of session %s left out: %s", share.left_out, session, share.why
        )
        if self._torn or self._opened_why:
            self._begin()
        self._about_log(form.LEFT_OUT, session=session, count=share.left_out, why=share.why)
        share.left_out = 0
        share.told_at = time.monotonic()

    # Reading back

    def ended_reports(self, since_usec: int = 0) -> Iterator[pb.Report]:
        """Reports in the newest part of the log, oldest first, written since a time; damaged lines
        are passed over. Raises OSError."""
        for line in self._lines(b'"event": "call_ended"', since_usec):
            if (report := _report_of(line)) is not None:
                yield report

    def closed_sessions(self, since_usec: int = 0) -> Iterator[tuple[str, int, str]]:
        """Sessions that were closed, in the newest part of the log, with when and why. Raises
        OSError."""
        for line in self._lines(b'"event": "session_closed"', since_usec):
            try:
                entry = json.loads(line)
                yield str(entry["session"]), int(entry["at_unix_usec"]), str(entry["why"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue

    def _lines(self, words: bytes, since_usec: int) -> Iterator[bytes]:
        """Lines with these words in the newest part of the log, written since a time."""
        if self._path is None:
            return
        for path, start in self._newest_part(self._path):
            with path.open("rb") as file:
                file.seek(start)
                if start:
                    file.readline()
                for line in file:
                    if words in line and not _written_before(line, since_usec):
                        yield line

    @staticmethod
    def _newest_part(path: Path) -> list[tuple[Path, int]]:
        """Files, oldest first, and from where on each is read, so that it is TAIL_BYTES in all."""
        parts: list[tuple[Path, int]] = []
        left = TAIL_BYTES
        for file in reversed(form.files_of(path)):
            if left <= 0:
                break
            try:
                size = file.stat().st_size
            except FileNotFoundError:
                continue
            parts.insert(0, (file, max(0, size - left)))
            left -= size
        return parts


def _written_before(line: bytes, usec: int) -> bool:
    """Tell whether a line begins with an earlier time; that is read without reading all of it."""
    at = _AT.match(line)
    return at is not None and int(at[1]) < usec


def _report_of(line: bytes) -> pb.Report | None:
    report = pb.Report()
    try:
        data = json.loads(line)["report"]
        json_format.ParseDict(data, report, ignore_unknown_fields=True)
    except (ValueError, KeyError, TypeError, RecursionError, json_format.ParseError):
        return None
    return report
