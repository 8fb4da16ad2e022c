"""Entries of the journal: every text stays in its field."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroupd.host import journal


def fields_of(data: bytes) -> dict[str, str]:
    """Read an entry as the journal does."""
    found = {}
    while data:
        name, separator, rest = data.partition(b"\n")
        if b"=" in name:
            key, _, value = name.partition(b"=")
            data = rest
        else:
            assert separator
            key, (length,) = name, struct.unpack("<Q", rest[:8])
            value, data = rest[8 : 8 + length], rest[9 + length :]
        assert key.decode() not in found
        found[key.decode()] = value.decode()
    return found


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sock.setblocking(False)
        yield sock


@pytest.fixture
def log(receiver: socket.socket) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addHandler(journal.JournalHandler(receiver.getsockname()))
    return logger


def test_levels_and_fields(receiver: socket.socket, log: logging.Logger) -> None:
    log.warning("call %s", "1", extra={"session": "alpha", "call": "1"})
    found = fields_of(receiver.recv(65536))
    assert found["MESSAGE"] == "call 1" and found["PRIORITY"] == "4"
    assert found["AGENTCG_SESSION"] == "alpha" and found["AGENTCG_CALL"] == "1"
    assert found["SYSLOG_IDENTIFIER"] == "agentcgroupd"
    log.error("x", extra={"session": "alpha", "call": ""})
    found = fields_of(receiver.recv(65536))
    assert found["PRIORITY"] == "3" and "AGENTCG_CALL" not in found


@pytest.mark.parametrize("text", ["a\nPRIORITY=0", "\n\n", "=", "\udc80\n", "", "x" * 5000])
def test_no_text_ends_its_field(receiver: socket.socket, log: logging.Logger, text: str) -> None:
    log.info("%s", text)
    found = fields_of(receiver.recv(65536))
    assert found["MESSAGE"] == text.encode("utf-8", "replace").decode()
    assert found["PRIORITY"] == "6"


def test_a_traceback_is_part_of_the_message(receiver: socket.socket, log: logging.Logger) -> None:
    try:
        raise ValueError("of a test")
    except ValueError:
        log.exception("it failed")
    message = fields_of(receiver.recv(65536))["MESSAGE"]
    assert message.startswith("it failed\nTraceback") and message.endswith("of a test")


def test_what_the_journal_does_not_take_goes_to_standard_error(
    tmp_path: Path, receiver: socket.socket, log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log.error("x" * 1_000_000)
    assert capsys.readouterr().err == "<3>" + "x" * 1_000_000 + "\n"
    receiver.close()
    log.info("gone")
    assert capsys.readouterr().err == "<6>gone\n"


def test_a_journal_that_does_not_read_holds_up_nobody(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(10_000):
        log.info("%s", "x" * 100)
    assert "<6>xxx" in capsys.readouterr().err


def test_only_the_journals_own_stream_counts() -> None:
    assert not journal.is_stderr({})
    assert not journal.is_stderr({"JOURNAL_STREAM": "1:2"})
