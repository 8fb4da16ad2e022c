"""Smaller work, by the tool that a command runs: what takes less memory, time or fewer processes
and still does the task, in a part of it. Pure.

What is said names options that the tools themselves document; where a tool is not known, the words
hold for any.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import Enum

from agentcgroupd.intents.script import commands_of


class Scarce(Enum):
    """What a call ran short of."""

    MEMORY = "memory"
    TIME = "time"
    PROCESSES = "processes"
    GPU = "gpu"


_VERSION = re.compile(r"(?<=[a-z+])-?\d+(?:\.\d+)*\Z")
_BATCH = "Take a smaller batch, or read the data in parts (an iterator, chunksize=) and not whole."
_JOBS = "Use fewer jobs at a time"

_MEMORY: dict[str, str] = {
    "pytest": "Run fewer tests at a time: name a file or use -k; with pytest-xdist use -n 1.",
    "make": f"{_JOBS}: make -j1.",
    "ninja": f"{_JOBS}: ninja -j1.",
    "cmake": f"{_JOBS}: cmake --build DIR -j 1.",
    "cargo": f"{_JOBS}: cargo build -j 1.",
    "rustc": "Use -C codegen-units=1 and no LTO.",
    "go": f"{_JOBS}: go build -p 1, go test -p 1.",
    "npm": "Give node less to hold: NODE_OPTIONS=--max-old-space-size=N, below the limit in MiB.",
    "node": "Give node less to hold: --max-old-space-size=N, below the limit in MiB.",
    "tsc": "Check a part of the project: tsc -p DIR, or --skipLibCheck.",
    "jest": "Run fewer tests at a time: name a file, or use --runInBand.",
    "vitest": "Run fewer tests at a time: name a file, or use --maxWorkers=1.",
    "mvn": "Build one module at a time (mvn -pl MODULE -T 1) with a smaller MAVEN_OPTS=-Xmx.",
    "gradle": "Use --no-parallel --max-workers=1 and a smaller org.gradle.jvmargs=-Xmx.",
    "java": "Give the JVM a smaller heap: -Xmx, below the limit.",
    "pip": "Install fewer packages at a time, from wheels: --only-binary :all: --no-cache-dir.",
    "uv": "Build fewer packages at a time: UV_CONCURRENT_BUILDS=1.",
    "gcc": "Compile one file at a time, with -O1 or without -g.",
    "python": _BATCH,
    "mypy": "Check fewer modules at a time, or without --no-incremental.",
    "git": "Fetch less: git clone --depth 1 --filter=blob:none.",
    "sort": "Give it a smaller buffer: sort -S 64M --parallel=1, or a quarter of the limit.",
}
_TIME: dict[str, str] = {
    "pytest": "Run fewer tests at a time: name a file, use -k, or stop early with -x.",
    "jest": "Run fewer tests at a time: name a file, or use --onlyChanged.",
    "vitest": "Run fewer tests at a time: name a file.",
    "grep": "Look through less: name a directory, use --include.",
    "find": "Look through less: name a directory, use -maxdepth.",
    "rg": "Look through less: name a directory, use -g.",
    "git": "Fetch less: git clone --depth 1.",
    "make": "Build a target of it.",
    "cargo": "Build a part of it: cargo check -p CRATE.",
    "go": "Build a part of it: go build ./DIR, go test -run NAME.",
    "npm": "Run a part of it, or start servers in the background.",
    "python": "Do a part of the work at a time, and keep what is done.",
    "sleep": "Do not wait for as long.",
}
_PROCESSES: dict[str, str] = {
    "pytest": "Use fewer workers: -n 2, or -p no:xdist.",
    "make": f"{_JOBS}: make -j2.",
    "ninja": f"{_JOBS}: ninja -j2.",
    "cargo": f"{_JOBS}: cargo build -j 2.",
    "go": "Use fewer threads: GOMAXPROCS=2, go build -p 2.",
    "npm": "Use fewer workers: UV_THREADPOOL_SIZE=2, --maxsockets=2.",
    "jest": "Use fewer workers: --maxWorkers=2.",
    "python": "Use fewer workers or threads: OMP_NUM_THREADS=2, max_workers=2.",
    "xargs": "Use fewer at a time: xargs -P 2.",
}
_GPU: dict[str, str] = {
    "python": "Take a smaller batch or a smaller model, mixed precision, or gradient checkpointing."
}
_ALIASES = {
    "py.test": "pytest",
    "gmake": "make",
    "npx": "npm",
    "yarn": "npm",
    "pnpm": "npm",
    "bun": "node",
    "g++": "gcc",
    "cc": "gcc",
    "c++": "gcc",
    "clang": "gcc",
    "clang++": "gcc",
    "ld": "gcc",
    "gradlew": "gradle",
    "mvnw": "mvn",
    "egrep": "grep",
    "fd": "find",
}
_BY_SCARCE = {
    Scarce.MEMORY: (_MEMORY, "Do the work in smaller parts."),
    Scarce.TIME: (_TIME, "Do less work at a time, or run what takes long in the background."),
    Scarce.PROCESSES: (_PROCESSES, "Use fewer workers."),
    Scarce.GPU: (_GPU, "Take a smaller batch or a smaller model."),
}
TOOLS_MAX = 8
"""Most commands of a script that are looked at."""


def tools_of(argv: Sequence[str]) -> list[str]:
    """The tools that a command line runs, by the names of their programs: `python3 -m pytest` is
    pytest, `make-4.4` is make."""
    found = []
    for words in commands_of(argv):
        name = os.path.basename(words[0].rstrip("/")) or words[0]
        name = _VERSION.sub("", name)
        if name == "python" and "-m" in words[1:-1]:
            name = words[words.index("-m") + 1]
        found.append(_ALIASES.get(name, name))
        if len(found) == TOOLS_MAX:
            break
    return found


def smaller_work(argv: Sequence[str], scarce: Scarce) -> str:
    """Say how the command could do with less, in a sentence."""
    table, any_tool = _BY_SCARCE[scarce]
    return next((table[tool] for tool in tools_of(argv) if tool in table), any_tool)
