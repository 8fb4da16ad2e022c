"""The daemon's log: one line a record, whatever peers have put into the words.

Names, paths and sentences come from agents. A character that ends a line, moves the cursor or turns
the direction of text is written as an escape, so that nobody can forge a line or a colour.
"""

from __future__ import annotations

import logging
import sys
import unicodedata

from agentcgroupd.host import journal

ESCAPED = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs"})
"""Categories of Unicode: controls, formats (direction marks among them), separators of lines and
paragraphs, surrogates."""


def escaped(text: str) -> str:
    """Text without characters that do something other than be seen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ESCAPED
        else character
        for character in text
    )


class LineFormatter(logging.Formatter):
    """Escapes each record's message; lines of a traceback are indented, so that none of them looks
    like a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Make the text of a record."""
        lines = super().format(record).split("\n")
        if record.exc_info is None and record.stack_info is None:
            return escaped("\n".join(lines))
        return "\n    ".join(escaped(line) for line in lines)


def _is_of_note(record: logging.LogRecord) -> bool:
    """Whether what grpc's server says is of note. That a caller hung up before it had its answer
    is not: it writes a traceback of an error of its own each time, as often as callers like."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "ExecuteBatchError"


def _is_no_detail(record: logging.LogRecord) -> bool:
    return not getattr(record, "detail", False)


LIBRARIES = ("grpc", "asyncio")
"""Loggers of libraries, whose every step tells nothing of ours."""


def set_up(verbose: bool) -> None:
    """Log to standard error or, where that is the journal's, to the journal, which adds time and
    level itself. `verbose`: every step of ours."""
    handler: logging.Handler
    if journal.is_stderr():
        handler, words = journal.JournalHandler(), "%(message)s"
    else:
        handler, words = logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(LineFormatter(words))
    if sys.stderr.isatty() and not verbose:
        handler.addFilter(_is_no_detail)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_of_note)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
