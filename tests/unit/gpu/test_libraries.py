"""A configured library that is missing, or is none, is a failure that is told, and no more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from agentcgroupd.gpu.libraries import Libraries


def test_a_configured_library_that_is_not_there(tmp_path: Path) -> None:
    missing, other = tmp_path / "libcuda.so.1", tmp_path / "notes.txt"
    other.write_text("no library")
    libraries = Libraries(cast("Any", None))
    found = libraries.probe_host([missing, other])
    assert not {str(missing), str(other)} & set(found)
    (failure,) = [f for f in libraries.failures if str(tmp_path) in f]
    assert str(missing) in failure and os.strerror(2) in failure
