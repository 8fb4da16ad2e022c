"""Lines of a TOML document on which its keys stand, which tomllib does not tell.

Only text that tomllib has read already is scanned, so it is known to be valid.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from dataclasses import dataclass, field

_SPACE = re.compile(r"(?:[ \t]|#[^\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BARE_VALUE = re.compile(r"[^,\]}#\n]*")
# Three quotes are tried before one, because """ is not an empty string. A multi-line string may
# end in up to five quotes, of which the first two belong to its text.
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)


@dataclass(slots=True)
class Location:
    """File and line of one value, and the locations of the values in it, by key or index."""

    file: str
    line: int
    children: dict[str | int, Location] = field(default_factory=dict)

    def find(self, path: tuple[str | int, ...]) -> Location:
        """Return the location of the value at a path, or of the nearest value around it that is
        written down."""
        location = self
        for part in path:
            if part not in location.children:
                break
            location = location.children[part]
        return location


def scan(text: str, file: str) -> Location:
    """Return the location of a whole TOML document, which must be valid. `file`: its name."""
    return _Scanner(text, file).document()


class _Scanner:
    """A pass over a document that fills in locations as it meets keys."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._at = 0
        self._starts = [0, *(m.end() for m in re.finditer("\n", text))]

    def document(self) -> Location:
        """Read the whole document."""
        root = table = self._here()
        while True:
            self._skip(_SPACE_AND_LINES)
            if self._at >= len(self._text):
                return root
            if self._text[self._at] == "[":
                table = self._header(root)
            else:
                self._pair(table)

    def _here(self) -> Location:
        return Location(self._file, bisect.bisect_right(self._starts, self._at))

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        assert match is not None, f"{self._file}: nothing to read at {self._at}"
        self._at = match.end()
        return match[0]

    def _header(self, root: Location) -> Location:
        """Read `[a.b]` or `[[a.b]]`, and return the table that it opens."""
        array = self._text.startswith("[[", self._at)
        here = self._here()
        self._at += 2 if array else 1
        *around, last = self._key()
        self._at += 2 if array else 1
        table = self._descend(root, around, here)
        if not array:
            table = self._descend(table, [last], here)
            table.line = here.line
            return table
        elements = table.children.setdefault(last, here).children
        elements[len(elements)] = element = Location(here.file, here.line)
        return element

    @staticmethod
    def _descend(table: Location, keys: list[str], here: Location) -> Location:
        """Return the table below `table` that the keys name, which begins here if it is new. Of an
        array of tables the newest element is meant."""
        for key in keys:
            table = table.children.setdefault(key, Location(here.file, here.line))
            if table.children and all(isinstance(k, int) for k in table.children):
                table = table.children[len(table.children) - 1]
        return table

    def _key(self) -> list[str]:
        """Read a key such as `a."b c".d`, and the space behind it."""
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

    def _pair(self, table: Location) -> None:
        here = self._here()
        *around, last = self._key()
        self._at += len("=")
        table = self._descend(table, around, here)
        table.children[last] = here
        self._value(here)

    def _value(self, location: Location) -> None:
        self._skip(_SPACE)
        match self._text[self._at]:
            case '"' | "'":
                self._skip(_STRING)
            case "[":
                self._array(location)
            case "{":
                self._inline_table(location)
            case _:
                self._skip(_BARE_VALUE)

    def _array(self, location: Location) -> None:
        self._at += 1
        while True:
            self._skip(_SPACE_AND_LINES)
            if self._text[self._at] == "]":
                self._at += 1
                return
            location.children[len(location.children)] = element = self._here()
            self._value(element)
            self._skip(_SPACE_AND_LINES)
            if self._text[self._at] == ",":
                self._at += 1

    def _inline_table(self, location: Location) -> None:
        self._at += 1
        while True:
            self._skip(_SPACE_AND_LINES)
            if self._text[self._at] == "}":
                self._at += 1
                return
            self._pair(location)
            self._skip(_SPACE_AND_LINES)
            if self._text[self._at] == ",":
                self._at += 1
