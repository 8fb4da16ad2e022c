"""The audit log as it is kept on disk: read, and checked for gaps and damage.

A line is one JSON object. Its last two members are its number (`seq`) and a hash over the line and
the hash before it (`chain`), so a line that was changed, or is missing from the middle, shows. The
first entry of a later file (`audit_opened`) names the hash that the file before it ended with.
Whoever may write to the files can write a whole new chain: the chain finds damage, not an attacker
with root's rights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_PATH = Path("/var/log/agentcgroup/audit.jsonl")
CHAIN_CHARS = 32
"""How much of the hash a line carries, in hexadecimal digits."""
OPENED, LOST, LEFT_OUT, TORN = "audit_opened", "audit_lost", "audit_left_out", "audit_torn"
"""Entries of the log about itself."""
LINE_BYTES_MAX = 4 << 20
"""A line that is longer is not the daemon's."""
_TAIL = re.compile(rb', "seq": (\d{1,19}), "chain": "([0-9a-f]{32})"\}\n\Z')


def chained(entry: dict[str, Any], seq: int, before: str) -> tuple[bytes, str]:
    """The line of an entry, and its hash, which the next line is chained to."""
    body = json.dumps({**entry, "seq": seq}).encode()[:-1]
    chain = _hash(before, body)
    return body + f', "chain": "{chain}"}}\n'.encode(), chain


def _hash(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:CHAIN_CHARS]


def link_of(line: bytes) -> tuple[int, str] | None:
    """The number and the hash at the end of a line; None for a line without them."""
    tail = _TAIL.search(line[-128:])
    return None if tail is None else (int(tail[1]), tail[2].decode())


def files_of(path: Path) -> list[Path]:
    """The files of a log, oldest first: `audit.2.jsonl`, `audit.1.jsonl`, `audit.jsonl`."""
    rotated: list[Path] = []
    while (older := path.with_suffix(f".{len(rotated) + 1}.jsonl")).exists():
        rotated.append(older)
    return [*reversed(rotated), path]


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, each with its newline; the last one may lack it, and one that is too
    long is cut. Raises OSError."""
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES_MAX):
            yield line


def entries(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The entries of files in their order; damaged lines are passed over. Raises OSError."""
    for path in paths:
        for line in lines_of(path):
            entry = _parse(line)
            if entry is not None:
                yield entry


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


@dataclass
class Verification:
    """What was found in a log."""

    files: int = 0
    entries: int = 0
    lost: int = 0
    """Entries that the daemon could not write, and said so."""
    left_out: int = 0
    """Entries that sessions had beyond their share or rate, and were told to be left out."""
    torn: int = 0
    """Lines that a crash cut short, and that the next daemon told of."""
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing is missing or damaged but what the log itself tells."""
        return not self.problems


def verify(paths: Iterable[Path]) -> Verification:
    """Check files of one log, given oldest first. Raises OSError."""
    checker = _Checker()
    for path in paths:
        checker.file(path)
    return checker.found


class _Checker:
    def __init__(self) -> None:
        self.found = Verification()
        self._seq: int | None = None
        self._chain = ""
        self._where = ""
        self._unreadable: str | None = None
        """A line that is no entry, until the next entry says that it was torn."""

    def file(self, path: Path) -> None:
        self.found.files += 1
        at_start = True
        for number, line in enumerate(lines_of(path), 1):
            self._where = f"{path}:{number}"
            entry = _parse(line)
            if entry is None:
                self._no_entry()
                continue
            self._entry(entry, line, at_start)
            at_start = False
        self._no_more()

    def _no_entry(self) -> None:
        self._no_more()
        self._unreadable = f"{self._where}: no entry; the line is cut short or damaged"

    def _no_more(self) -> None:
        if self._unreadable is not None:
            self.found.problems.append(self._unreadable)
            self._unreadable = None

    def _entry(self, entry: dict[str, Any], line: bytes, at_start: bool) -> None:
        self.found.entries += 1
        event = entry.get("event")
        if event == TORN and self._unreadable is not None:
            self.found.torn += 1
            self._unreadable = None
        self._no_more()
        link = link_of(line)
        if link is None:
            self._say("it has no place in the chain: it is of an older daemon, or not the daemon's")
            return
        seq, chain = link
        if event == OPENED:
            self._opened(entry)
        self._numbered(seq, at_start)
        body = line[: line.rindex(b', "chain": ')]
        if _hash(self._chain, body) != chain:
            self._say("it was changed, or does not follow the line before it")
        self._seq, self._chain = seq, chain
        if event == LOST:
            self.found.lost += _count(entry)
        elif event == LEFT_OUT:
            self.found.left_out += _count(entry)

    def _opened(self, entry: dict[str, Any]) -> None:
        after = str(entry.get("after", ""))
        if self._seq is None:
            self._chain = after  # what was before is not asked about
        elif after != self._chain:
            self._say("entries before it are missing: it follows another chain")
            self._chain = after

    def _numbered(self, seq: int, at_start: bool) -> None:
        if self._seq is not None and at_start and seq == 1:
            self._say("a new log begins here: what was before it was not known to the daemon")
            self._seq, self._chain = None, ""
        if self._seq is None:
            if seq > 1 and not self._chain:
                self._say(f"{seq - 1} entries before it are missing")
        elif seq > self._seq + 1:
            self._say(f"{seq - self._seq - 1} entries before it are missing")
        elif seq <= self._seq:
            self._say(f"its number {seq} was there before")

    def _say(self, what: str) -> None:
        self.found.problems.append(f"{self._where}: {what}")


def _count(entry: dict[str, Any]) -> int:
    count = entry.get("count", 0)
    return count if isinstance(count, int) else 0


def last_line(path: Path) -> tuple[bytes, int]:
    """The last whole line of a file, and how many bytes of a line without its end follow it.
    Raises OSError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LINE_BYTES_MAX))
        data = file.read(LINE_BYTES_MAX)
    end = data.rfind(b"\n") + 1
    begin = data.rfind(b"\n", 0, max(0, end - 1)) + 1
    return data[begin:end], len(data) - end
