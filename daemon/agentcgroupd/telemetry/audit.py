"""The audit log: what was asked, granted, refused, done, and how it ended, as JSON lines."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import json_format, message

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.state.session import unix_usec

log = logging.getLogger(__name__)

TAIL_BYTES = 8 << 20
"""How much of the log is read back at start to find the reports of open sessions."""


class Audit:
    """Appends to the log. A full disk costs entries, which are counted, never the daemon."""

    def __init__(self, path: Path | None, max_bytes: int) -> None:
        """`path` None: nothing is written. Raises OSError if the log cannot be opened now."""
        self._path = path
        self._max_bytes = max_bytes
        self._fd = -1
        self.lost = 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(path)

    def _open(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, event: str, **fields: Any) -> None:
        """Append one entry; protobuf messages are written as JSON objects with their field
        names."""
        if self._fd < 0 or self._path is None:
            return
        plain = {
            key: json_format.MessageToDict(value, preserving_proto_field_name=True)
            if isinstance(value, message.Message)
            else value
            for key, value in fields.items()
        }
        line = json.dumps({"at_unix_usec": unix_usec(), "event": event, **plain}).encode() + b"\n"
        try:
            if self._size + len(line) > self._max_bytes:
                os.replace(self._path, self._path.with_suffix(".1.jsonl"))
                old = self._fd
                self._open(self._path)
                os.close(old)
            self._size += os.write(self._fd, line)
        except OSError as error:
            if self.lost == 0:
                log.error("audit log %s: %s; entries are lost and counted", self._path, error)
            self.lost += 1

    def ended_reports(self) -> Iterator[pb.Report]:
        """Reports in the newest part of the log, oldest first; damaged lines are passed over."""
        if self._path is None:
            return
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            if size > TAIL_BYTES:
                file.readline()
            for line in file:
                if b'"event": "call_ended"' not in line:
                    continue
                report = pb.Report()
                try:
                    data = json.loads(line)["report"]
                    json_format.ParseDict(data, report, ignore_unknown_fields=True)
                except (ValueError, KeyError, json_format.ParseError):
                    continue
                yield report
