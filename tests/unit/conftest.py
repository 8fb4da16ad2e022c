"""Fixtures shared by the unit tests."""

from __future__ import annotations

import fcntl
import importlib.util
from pathlib import Path

import hypothesis
import pytest

import agentcgroup

# Examples are not timed: on a busy machine a deadline says nothing of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def programs() -> Path:
    """The directory of the C programs, compiled from the sources as they are now."""
    spec = importlib.util.spec_from_file_location("build_hook", ROOT / "tools/build_hook.py")
    assert spec is not None and spec.loader is not None
    build_hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_hook)
    bin_dir = ROOT / "build/bin"
    bin_dir.mkdir(parents=True, exist_ok=True)
    # Two test runs at a time must not execute what the other is just writing.
    with open(bin_dir.parent / "programs.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_hook.compile_programs(ROOT, agentcgroup.__version__)
    return bin_dir
