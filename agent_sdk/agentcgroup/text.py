"""Text of others made fit to be shown: names, command lines, sentences."""

from __future__ import annotations

import re

UNSAFE = (
    "\x00-\x1f\x7f-\x9f"  # controls, C0 and C1: some terminals obey both
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction: what follows is shown elsewhere
    "\u2028\u2029\ufff9-\ufffb"  # separators of lines, annotations
    # What is not shown at all (Default_Ignorable_Code_Point of the Unicode Character Database):
    "\xad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200d\u2060-\u2065\u206a-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"
    "\ud800-\udfff"  # lone surrogates, which cannot be written
)
"""Characters that change how a terminal shows what stands around them, or that are not shown, as
part of a class of a regular expression."""

_UNSAFE = re.compile(f"[{UNSAFE}]")
_UNSAFE_BUT_NEWLINE = re.compile(f"(?!\n)[{UNSAFE}]")


def printable(text: str) -> str:
    """Return the text with each unsafe character replaced by a question mark."""
    return text if text.isascii() and text.isprintable() else _UNSAFE.sub("?", text)


def printable_lines(text: str) -> str:
    """Return what `printable` does, but keep line breaks."""
    return text if text.isascii() and text.isprintable() else _UNSAFE_BUT_NEWLINE.sub("?", text)


def escaped_json(document: str) -> str:
    """Return a JSON document with unsafe characters of its strings escaped as JSON has it."""
    return _UNSAFE_BUT_NEWLINE.sub(_escape, document)


def _escape(match: re.Match[str]) -> str:
    raw = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{raw[at]:02x}{raw[at + 1]:02x}" for at in range(0, len(raw), 2))
