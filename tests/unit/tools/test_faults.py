"""docs/faults.md: every fault has a test, and every named test exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/faults.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| \d+ \|", line)
]
FAULTS_LEAST = 25


def test_the_rows_are_numbered_and_whole() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert len(ROWS) >= FAULTS_LEAST
    assert all(len(row) == 6 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}")
def test_its_test_exists(row: list[str]) -> None:
    named = re.fullmatch(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", row[5])
    assert named is not None, row[5]
    tree = ast.parse((ROOT / named[1]).read_text())
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert named[2] in found if named[2] else any(name.startswith("test_") for name in found)
