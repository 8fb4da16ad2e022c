"""A stand-in for libcuda, compiled when a test first wants it."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

from tests.harness import ROOT

SOURCE = Path(__file__).with_name("libcuda.c")


@cache
def build(name: str = "libcuda.so.1") -> Path:
    """Compile the library if it is older than its source; returns its path."""
    target = ROOT / "build/standin" / name
    if not target.exists() or target.stat().st_mtime < SOURCE.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{name}.{os.getpid()}")
        flags = ["-shared", "-fPIC", "-O1", "-g0", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run(
            [os.environ.get("CC", "cc"), *flags, "-o", str(part), str(SOURCE)], check=True
        )
        part.replace(target)
    return target
