"""Fixtures for tests that need this kernel's controllers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroupd.bpf import sched
from tests.guest.place import Place, make_place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """On this kernel's cgroups, without a daemon."""
    with make_place(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def needs_sched_ext() -> None:
    """Skip all tests of a module where the kernel does not take the scheduler."""
    state = sched.gate()
    if not state.works:
        pytest.skip(state.reason)
