"""TOML documents: their values, and the lines on which their keys stand."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentcgroupd.locations import Location, scan
from agentcgroupd.mistakes import DocumentError, ErrorDetail

BYTES_MAX = 1 << 20
DEPTH_MAX = 20
"""How deep arrays and tables may lie in one another; no key of ours lies deeper than five."""
_BRACKETS = re.compile(r"[\[\]{}]")
_DOTTED = re.compile(rf"(?:[\w\"'-]+[ \t]*\.[ \t]*){{{DEPTH_MAX}}}")


@dataclass(slots=True)
class Document:
    """A TOML document and where its keys stand."""

    data: dict[str, Any]
    locations: Location


def wrong(path: Path | str, line: int, sentence: str) -> DocumentError:
    """An error in a file as a whole (`line` 0), or on one of its lines."""
    return DocumentError(ErrorDetail(str(path), line, "", sentence))


def unreadable(path: Path, error: OSError) -> DocumentError:
    """The error for a file or a directory that cannot be read."""
    return wrong(path, 0, f"cannot be read: {error.strerror}")


def read(path: Path) -> Document:
    """Read a file of a size and depth that a person may have written. Raises DocumentError."""
    try:
        with path.open("rb") as file:
            raw = file.read(BYTES_MAX + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(raw) > BYTES_MAX:
        raise wrong(path, 0, f"cannot be used: allowed are {BYTES_MAX >> 20} MiB")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise wrong(path, line, "it is not UTF-8 text") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """Read a document that the errors call `name`. Raises DocumentError."""
    if len(text) > BYTES_MAX:
        raise wrong(name, 0, f"it has more than {BYTES_MAX} characters")
    # The reader of the standard library calls itself for each level, and takes quadratic time for a
    # dotted key.
    if too_deep(text):
        raise wrong(name, 0, f"keys or values lie more than {DEPTH_MAX} levels deep")
    try:
        return Document(tomllib.loads(text), scan(text, name))
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        what = str(error)[: place.start()] if place else str(error)
        raise wrong(name, line, f"it is not TOML: {what}") from None
    except ValueError:  # int() refuses it
        sentence = "a number in it has thousands of digits; no number that is allowed is so long"
        raise wrong(name, 0, sentence) from None


def too_deep(text: str) -> bool:
    """Whether keys, tables or arrays of a TOML document lie too deep in one another. Brackets and
    dots in texts and comments count, too."""
    depth = 0
    for bracket in _BRACKETS.findall(text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > DEPTH_MAX:
            return True
    return _DOTTED.search(text) is not None
