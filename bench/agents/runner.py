"""A small coding agent without a model: it thinks for a while, calls a tool, and reads its output.

Run inside a session (`agentcg-exec --session ID -- python -m bench.agents.NAME WORK`). Each tool
call goes through `agentcg exec`, with the tool's name and nothing else: like a real agent it does
not know what a call will need. The process itself holds what an agent's runtime holds, and more
with each output that it reads.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

RUNTIME_BYTES = 110_000_000
"""An idle agent held about 190 MB in recordings of real ones; interpreter and container
included."""
CONTEXT_BYTES_PER_CALL = 400_000
"""Bytes that reading an output costs a runtime beyond the text itself."""


def find_agentcg() -> str:
    """The CLI beside this interpreter, in a checkout's build/bin, or in PATH."""
    places = (
        os.path.join(sysconfig.get_path("scripts"), "agentcg"),
        str(Path(__file__).parents[2] / "build/bin/agentcg"),
        shutil.which("agentcg") or "",
    )
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if found is None:
        raise SystemExit("agentcg is not built: run 'make setup'")
    return found


class Agent:
    """A run. The same name makes the same pauses each time."""

    def __init__(self, name: str, work: Path) -> None:
        self.work = work
        self._random = random.Random(name)
        self._agentcg = find_agentcg()
        # Tools are named, not spelled out as paths: what is recorded should not depend on where.
        tools = os.path.dirname(sys.executable)
        self._environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        # Half of it compresses to nothing, as a garbage-collected heap does.
        block = os.urandom(2048) + bytes(2048)
        self._runtime = bytearray(block * (RUNTIME_BYTES // len(block)))
        self._context: list[bytes] = []

    def think(self, seconds: float) -> None:
        """Wait for the model: about so long."""
        time.sleep(seconds * self._random.uniform(0.7, 1.3))

    def call(self, name: str, *argv: str, cwd: str = ".", may_fail: bool = False) -> bytes:
        """Call a tool and read what it says. SystemExit where it fails and must not."""
        done = subprocess.run(
            [self._agentcg, "exec", "--name", name, "--", *argv],
            cwd=self.work / cwd,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        print(f"{name}: {' '.join(argv)[:60]}: {done.returncode}", file=sys.stderr, flush=True)
        if done.returncode and not may_fail:
            sys.stderr.buffer.write(done.stdout[-2000:])
            raise SystemExit(f"{name} failed with {done.returncode}")
        self._context.append(done.stdout[-CONTEXT_BYTES_PER_CALL:])
        self._context.append(os.urandom(CONTEXT_BYTES_PER_CALL))
        return done.stdout

    def bash(self, line: str, cwd: str = ".", may_fail: bool = False) -> bytes:
        """A line of shell, as most tools of agents are."""
        return self.call("Bash", "bash", "-c", line, cwd=cwd, may_fail=may_fail)

    def python(self, source: str, *argv: str, cwd: str = ".") -> bytes:
        """A script that the agent wrote."""
        return self.call("python", "python3", "-c", source, *argv, cwd=cwd)


def work_dir(argv: Sequence[str] | None = None) -> Path:
    """The directory that `prepare` filled, from the command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    if len(given) != 1 or not Path(given[0]).is_dir():
        raise SystemExit("usage: python -m bench.agents.NAME WORK (see bench/agents/record_all.sh)")
    return Path(given[0]).absolute()
