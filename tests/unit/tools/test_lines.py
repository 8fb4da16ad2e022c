"""Text of the kernel ends its lines with a newline alone, whatever else names in it hold."""

from __future__ import annotations

from pathlib import Path

DAEMON = Path(__file__).parents[3] / "daemon/agentcgroupd"
OF_PROGRAMS = {"gpu/cuda.py"}
"""Files that split what a program of ours says on its standard error."""


def splits(path: Path) -> bool:
    """Whether code of a file, not a comment, splits lines as str.splitlines does."""
    lines = path.read_text().split("\n")
    return any(".splitlines(" in line.partition("#")[0] for line in lines)


def test_nothing_of_the_kernels_is_split_as_text_is() -> None:
    found = {str(path.relative_to(DAEMON)) for path in DAEMON.rglob("*.py") if splits(path)}
    assert found == OF_PROGRAMS
