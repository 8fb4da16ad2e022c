"""Fixtures for tests that need this kernel's controllers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.place import Place, make_place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """On this kernel's cgroups, without a daemon."""
    with make_place(tmp_path) as made:
        yield made
