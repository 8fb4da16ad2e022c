"""On which line of a TOML document each key stands, which tomllib does not tell.

The text has been read by tomllib already, so this scan may take for granted that it is valid.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

import tomllib

_SPACE = re.compile(r"(?:[ \t]|#[^\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BARE_VALUE = re.compile(r"[^,\]}#\n]*")
# The longest quotes first: """ is no empty string. A multi-line one may end in up to five of them.
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)


@dataclass(slots=True)
class Mark:
    """Where one value stands, and the values in it by key or index."""

    file: str
    line: int
    children: dict[str | int, Mark] = field(default_factory=dict)

    def find(self, path: tuple[str | int, ...]) -> Mark:
        """The mark of a value, or of the nearest one around it that is written down."""
        mark = self
        for part in path:
            if part not in mark.children:
                break
            mark = mark.children[part]
        return mark


def scan(text: str, file: str) -> Mark:
    """The marks of a whole valid TOML document."""
    return _Scan(text, file).document()


class _Scan:
    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._at = 0
        self._starts = [0, *(m.end() for m in re.finditer("\n", text))]

    def document(self) -> Mark:
        root = table = self._mark()
        while True:
            self._skip(_SPACE_AND_LINES)
            if self._at >= len(self._text):
                return root
            if self._text[self._at] == "[":
                table = self._header(root)
            else:
                self._pair(table)

    def _mark(self) -> Mark:
        return Mark(self._file, bisect.bisect_right(self._starts, self._at))

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        assert match is not None, f"{self._file}: nothing to read at {self._at}"
        self._at = match.end()
        return match[0]

    def _header(self, root: Mark) -> Mark:
        """`[a.b]` or `[[a.b]]`; returns the table that it opens."""
        array = self._text.startswith("[[", self._at)
        mark = self._mark()
        self._at += 2 if array else 1
        *around, last = self._key()
        self._at += 2 if array else 1
        table = self._descend(root, around, mark)
        if not array:
            table = self._descend(table, [last], mark)
            table.line = mark.line
            return table
        elements = table.children.setdefault(last, mark).children
        elements[len(elements)] = fresh = Mark(mark.file, mark.line)
        return fresh

    @staticmethod
    def _descend(table: Mark, keys: list[str], mark: Mark) -> Mark:
        """To a table by its keys; of an array of tables the newest element is meant."""
        for key in keys:
            table = table.children.setdefault(key, Mark(mark.file, mark.line))
            if table.children and all(isinstance(k, int) for k in table.children):
                table = table.children[len(table.children) - 1]
        return table

    def _key(self) -> list[str]:
        """`a."b c".d`, up to what follows it."""
        parts: list[str] = []
        while True:
            self._skip(_SPACE)
            if self._text[self._at] in "\"'":
                parts.append(tomllib.loads(f"k = {self._skip(_STRING)}")["k"])
            else:
                parts.append(self._skip(_BARE_KEY))
            self._skip(_SPACE)
            if not self._text.startswith(".", self._at):
                return parts
            self._at += 1

    def _pair(self, table: Mark) -> None:
        mark = self._mark()
        *around, last = self._key()
        self._at += 1  # =
        table = self._descend(table, around, mark)
        table.children[last] = mark
        self._value(mark)

    def _value(self, mark: Mark) -> None:
        self._skip(_SPACE)
        match self._text[self._at]:
            case '"' | "'":
                self._skip(_STRING)
            case "[":
                self._array(mark)
            case "{":
                self._inline_table(mark)
            case _:
                self._skip(_BARE_VALUE)

    def _array(self, mark: Mark) -> None:
        self._at += 1
        while True:
            self._skip(_SPACE_AND_LINES)
            if self._text[self._at] == "]":
                self._at += 1
                return
            mark.children[len(mark.children)] = element = self._mark()
            self._value(element)
            self._skip(_SPACE_AND_LINES)
            if self._text[self._at] == ",":
                self._at += 1

    def _inline_table(self, mark: Mark) -> None:
        self._at += 1
        while True:
            self._skip(_SPACE_AND_LINES)
            if self._text[self._at] == "}":
                self._at += 1
                return
            self._pair(mark)
            self._skip(_SPACE_AND_LINES)
            if self._text[self._at] == ",":
                self._at += 1
