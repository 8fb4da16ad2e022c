"""Process trees as strace(1) sees them: what each process of a program forks, executes and waits
for, byte by byte, as steps that the player can go again.

    .venv/bin/python -m tests.trees.strace PROGRAM ARGUMENT...

prints the steps of a program. A step is `["exec", FILE, ARGUMENTS]`, `["fork", STEPS]`, `["spawn",
STEPS]` (a child of vfork), `["thread", STEPS]` (a child that another thread than the first has
forked), `["setsid"]`, `["group"]`, `["join"]` (the group of an older child) or `["wait"]`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STRACE = ("strace", "-ff", "-qq", "--signal=none", "--string-limit=100000")
CALLS = "execve,fork,vfork,clone,clone3,setsid,setpgid,wait4,waitid"
_LINE = re.compile(r"(\w+)\((.*)\)\s+= (\d+)")
_EXEC = re.compile(r'"((?:[^"\\]|\\.)*)", (\[.*\]), 0x')
_STATUS = re.compile(r"\[?\{?WIFEXITED|WIFSIGNALED|CLD_")
SHEBANG_BYTES = 256

Step = list[Any]


def steps_of(
    argv: Sequence[str], *, before: Sequence[str] = (), **options: Any
) -> tuple[list[Step], subprocess.CompletedProcess[str]]:
    """Run a program to its end, and return its steps. `before`: a command that strace is run by."""
    with tempfile.TemporaryDirectory() as directory:
        output = f"--output={directory}/of"
        trace = [*before, *STRACE, f"--trace={CALLS}", output, "--", *argv]
        done = subprocess.run(trace, capture_output=True, text=True, check=False, **options)
        files = Path(directory).iterdir()
        by_pid = {int(file.suffix[1:]): file.read_text().splitlines() for file in files}
    return Reader(by_pid).steps(min(by_pid)), done


class Reader:
    """Makes steps of the lines of each process."""

    def __init__(self, lines: Mapping[int, list[str]]) -> None:
        self._lines = lines

    def steps(self, pid: int) -> list[Step]:
        """What a process does, with what its threads fork."""
        found: list[Step] = []
        for line in self._lines.get(pid, []):
            match = _LINE.match(line)
            if match is None:
                continue
            name, given, result = match[1], match[2], int(match[3])
            if name == "execve":
                found.append(_executed(given))
            elif name in ("fork", "vfork", "clone", "clone3"):
                if "CLONE_THREAD" in given:
                    found += [["thread", s[1]] for s in self.steps(result) if len(s) == 2]
                else:
                    kind = "spawn" if "CLONE_VFORK" in given or name == "vfork" else "fork"
                    found.append([kind, self.steps(result)])
            elif name == "setsid":
                found.append(["setsid"])
            elif name == "setpgid":
                who, group = (int(word) for word in given.split(", "))
                if who in (0, pid):
                    found.append(["group" if group in (0, pid) else "join"])
            elif name in ("wait4", "waitid") and _STATUS.search(given) and found[-1:] != [["wait"]]:
                found.append(["wait"])
        return found


def _executed(given: str) -> Step:
    """The step of an execution; of a script, with the arguments that its interpreter gets."""
    match = _EXEC.match(given)
    assert match is not None, given
    file = ast.literal_eval(f'b"{match[1]}"').decode()
    argv = [word.decode() for word in ast.literal_eval(re.sub(r'(^\[|, )"', r'\1b"', match[2]))]
    try:
        with open(file, "rb") as script:
            first = script.read(SHEBANG_BYTES).split(b"\n")[0].decode(errors="replace")
    except OSError:
        first = ""
    if first.startswith("#!"):
        argv = [*first[2:].strip().split(None, 1), file, *argv[1:]]
    return ["exec", os.path.basename(file), argv]


if __name__ == "__main__":
    print(json.dumps(steps_of(sys.argv[1:])[0], indent=1))
