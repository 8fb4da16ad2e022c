"""Mistakes in a TOML document, in words: file, line, key, value, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from agentcgroupd.errors import VALUE_SHOWN_CHARS, ConfigError, InvalidField
from agentcgroupd.locations import Location
from agentcgroupd.units import suggestion

Path = tuple[str | int, ...]
"""Keys and indices from the top of a document down to a value."""
MISSING = "it is missing"


@dataclass(frozen=True, slots=True)
class ErrorDetail:
    """An error in a document. `line` 0: the file as a whole."""

    file: str
    line: int
    key: str
    sentence: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(filter(None, (place, self.key, self.sentence)))


class DocumentError(ConfigError):
    """A document that cannot be used. The message has a line for each of its errors."""

    def __init__(self, *errors: ErrorDetail) -> None:
        self.errors = errors
        super().__init__("\n".join(map(str, errors)))


def in_order(
    found: dict[Path, str], keys: Mapping[Path, str], locations: Location
) -> list[ErrorDetail]:
    """Return the errors in the order of their lines: first those of the document's own file, then
    those of its drop-ins. `found`: the sentences, `keys`: the places as text, by path."""
    # A misspelt key is told once: the key that was meant is not missing as well.
    for path, sentence in list(found.items()):
        meant = re.match(r"no such key; did you mean '(.*)'\?", sentence)
        if meant and found.get((*path[:-1], meant[1])) == MISSING:
            del found[(*path[:-1], meant[1])]
    details = []
    for path, sentence in found.items():
        # Pydantic counts an array whose elements are wrong as empty, too.
        if not any(_is_within(other, path) for other in found):
            place = locations.find(path)
            details.append(ErrorDetail(place.file, place.line, keys[path], sentence))
    return sorted(details, key=lambda d: (d.file != locations.file, d.file, d.line))


def _is_within(path: Path, outer: Path) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def explained(path: Path, item: Any, section: type[BaseModel] | None) -> tuple[Path, str]:
    """Return the exact place of one of pydantic's errors, and what is wrong there in words.
    `section`: the model of the table in which an unknown key was found."""
    kind, context = item["type"], item.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, InvalidField):
        if isinstance(item["input"], dict):  # Two keys of this table contradict each other.
            parts = re.findall(r"[^.\[\]]+", cause.field)
            path += tuple(int(part) if part.isdigit() else part for part in parts)
        return path, f"{shown(cause.value)} cannot be used; allowed is {cause.allowed}"
    if kind == "extra_forbidden" and section is not None:
        known = section.model_fields
        hint = suggestion(str(path[-1]), known) or "known are " + ", ".join(known)
        return path, f"no such key; {hint}"
    if kind == "missing":
        return path, MISSING
    if kind == "literal_error":
        return path, not_among(item["input"], context["expected"])
    return path, f"{shown(item['input'])} cannot be used; allowed is {_allowed(item)}"


def not_among(value: object, expected: str) -> str:
    """Say which words are allowed. `expected`: words in quotes, as pydantic lists them."""
    words = re.findall(r"'([^']*)'", expected)
    hint = suggestion(str(value), words)
    sentence = f"{shown(value)} cannot be used; allowed is {', '.join(words)}"
    return f"{sentence}; {hint}" if hint else sentence


_ALLOWED = {
    "string_pattern_mismatch": "1 to 63 small letters, digits, - and _, the first no - or _",
    "too_short": "one or more",
    "tuple_type": "an array",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "path_type": "a path",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "finite_number": "a finite number",
}


def _allowed(item: Any) -> str:
    text = _ALLOWED.get(item["type"])
    if text is None:
        return str(item["msg"]).removeprefix("Input should be ").split(",")[0]
    return text.format(**item.get("ctx", {}))


def shown(value: object) -> str:
    """Return a value as it would be written in TOML, cut where it is long."""
    if isinstance(value, dict):
        return "a table"
    if value is None:
        return "''"  # An empty text is read as None.
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= VALUE_SHOWN_CHARS else f"{text[:VALUE_SHOWN_CHARS]}..."
