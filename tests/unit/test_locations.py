"""Lines of a TOML document's keys: every key that tomllib finds is found on its own line."""

from __future__ import annotations

from typing import Any

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.locations import Location, scan
from agentcgroupd.policy.load import built_in

KeyPath = tuple[str | int, ...]

SCALARS = st.sampled_from(
    [
        "1",
        "-1.5e3",
        "true",
        "inf",
        "1979-05-27 07:32:00",
        "07:32:00",
        '""',
        "''",
        '"a#]}"',
        "'\\'",
        r'"\"x\\"',
        '""""""',
        '"""\n]\\"""\n"""',
        '"""a"""""',
        "''''''",
        "'''it''s\n}'''''",
        r'"\u00e9"',
    ]
)
KEYS = st.sampled_from(["{}", '"{} x"', "'{}.#['", r'"{}\u00e9\""', "{}.deep", "d-{} . 'e f'"])
GAPS = st.sampled_from(["", " ", "\t"])
LINES = st.sampled_from(["", "\n", " # ] }\n", "\r\n", "\n\n  "])


class Writer:
    """Writes a document and remembers on which line each key was written."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.text = ""
        self.lines: dict[KeyPath, int] = {}
        self.names = 0

    def key(self, table: KeyPath) -> KeyPath:
        """Write a new key, perhaps of several parts, and return its path."""
        self.names += 1
        written = self.draw(KEYS).format(f"k{self.names}")
        path = (*table, *_parts(written))
        for length in range(len(table) + 1, len(path) + 1):
            self.lines.setdefault(path[:length], self.line)
        self.text += written
        return path

    @property
    def line(self) -> int:
        return self.text.count("\n") + 1

    def pairs(self, table: KeyPath, depth: int, between: str | None = None) -> None:
        for index in range(self.draw(st.integers(0, 2))):
            self.text += f"{between}{self.draw(GAPS)}" if between and index else ""
            path = self.key(table)
            self.text += f"{self.draw(GAPS)}={self.draw(GAPS)}"
            self.value(path, depth)
            self.text += "" if between else f"{self.draw(GAPS)}{self.draw(LINES)}\n"

    def value(self, path: KeyPath, depth: int) -> None:
        kind = self.draw(st.sampled_from(["scalar", "array", "table"] if depth else ["scalar"]))
        if kind == "scalar":
            self.text += self.draw(SCALARS)
        elif kind == "array":
            self.text += "["
            for index in range(self.draw(st.integers(0, 3))):
                self.text += f"{',' if index else ''}{self.draw(LINES)}{self.draw(GAPS)}"
                self.lines[(*path, index)] = self.line
                self.value((*path, index), depth - 1)
                self.text += self.draw(LINES)
            self.text += "]"
        else:
            self.text += "{" + self.draw(GAPS)
            self.pairs(path, depth - 1, between=",")
            self.text += self.draw(GAPS) + "}"

    def document(self) -> None:
        self.pairs((), 3)
        for _ in range(self.draw(st.integers(0, 3))):
            self.names += 1
            name, count = f"t{self.names}", self.draw(st.integers(0, 2))
            for index in range(count):
                self.lines.setdefault((name,), self.line)
                self.lines[name, index] = self.line
                self.text += f"[[ {name}]]{self.draw(LINES)}\n"
                self.pairs((name, index), 3)
                if self.draw(st.booleans()):
                    for depth in (("sub",), ("sub", "low")):
                        self.lines[(name, index, *depth)] = self.line
                    self.text += f"[{name}.'sub' . low] # x\n"
                    self.pairs((name, index, "sub", "low"), 2)
            if not count:
                self.lines[(name,)] = self.line
                self.text += f"[{name} ]\n"
                self.pairs((name,), 3)


def _parts(key: str) -> list[str]:
    """Return the parts of a dotted key, as tomllib reads it."""
    value: Any = tomllib.loads(f"{key} = 1")
    parts: list[str] = []
    while isinstance(value, dict):
        ((part, value),) = value.items()
        parts.append(part)
    return parts


def _paths(value: Any, path: KeyPath = ()) -> set[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = set()
    for key, child in items:
        found |= {(*path, key)}
        if isinstance(child, dict | list):
            found |= _paths(child, (*path, key))
    return found


def _lines(location: Location, path: KeyPath = ()) -> dict[KeyPath, int]:
    found: dict[KeyPath, int] = {}
    for key, child in location.children.items():
        found |= {(*path, key): child.line, **_lines(child, (*path, key))}
    return found


@given(st.data())
def test_each_key_is_found_on_its_line(data: st.DataObject) -> None:
    writer = Writer(data)
    writer.document()
    found = _lines(scan(writer.text, "f"))
    assert set(found) == _paths(tomllib.loads(writer.text))
    assert found == writer.lines


@pytest.mark.parametrize("name", ["default", "batch-farm", "workstation"])
def test_every_key_of_the_built_in_policies_is_found(name: str) -> None:
    text = built_in()[name].read_text()
    lines, rows = _lines(scan(text, "f")), text.splitlines()
    assert set(lines) == _paths(tomllib.loads(text))
    for path, line in lines.items():
        assert not isinstance(path[-1], str) or path[-1] in rows[line - 1]
