"""The log as the journal takes it: with a priority, and with fields that can be searched for.

`journalctl AGENTCG_SESSION=alpha` shows what concerns one session. The protocol is that of
systemd.journal-fields(7): a datagram of lines NAME=value; a value with a newline in it is written
with its length before it, so that no text can end its field.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)
"""Levels, and the priorities of syslog(3) for them and what is above."""
FIELDS = {"session": "AGENTCG_SESSION", "call": "AGENTCG_CALL"}
"""By the name under `extra=` of a logging call."""

DETAIL = {"detail": True}
"""As `extra=` of a logging call: on a terminal, where the start sums up what is there, it is shown
only where all is. Files and the journal have it in any case."""


def priority(level: int) -> int:
    """The priority of syslog(3) for a level of logging."""
    return next((number for least, number in _PRIORITIES if level >= least), 7)


def field(name: str, value: str) -> bytes:
    """A field of an entry, whatever is in the value."""
    data = value.encode("utf-8", "replace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def is_stderr(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether standard error goes to the journal (systemd.exec(5): $JOURNAL_STREAM)."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class JournalHandler(logging.Handler):
    """Sends records to the journal; where it does not take one, to standard error."""

    def __init__(self, path: str = SOCKET) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # A journal that does not keep up must not hold up the daemon.
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        try:
            text = self.format(record)
            fields = [
                ("MESSAGE", text),
                ("PRIORITY", str(priority(record.levelno))),
                ("SYSLOG_IDENTIFIER", "agentcgroupd"),
                ("CODE_FILE", record.pathname),
                ("CODE_LINE", str(record.lineno)),
                ("LOGGER", record.name),
            ]
            for attribute, name in FIELDS.items():
                if value := getattr(record, attribute, ""):
                    fields.append((name, str(value)))
            try:
                self._socket.sendto(b"".join(field(*pair) for pair in fields), self._path)
            except OSError:
                sys.stderr.write(f"<{priority(record.levelno)}>{text}\n")
        except Exception:  # noqa: BLE001 - as in every handler: a log line never ends the daemon
            self.handleError(record)
