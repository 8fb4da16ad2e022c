"""Command lines as text: names made from them, and the script of a shell's `-c`."""

from __future__ import annotations

import os
import shlex

from agentcgroup.text import printable
from agentcgroupd.intents.parse import NAME_CHARS_MAX


def tool_name(comm: str, argv: list[str]) -> str:
    """Name a call by its program, or by the first command of a shell's `-c`."""
    name = comm
    script = shell_command(argv)
    if script is not None:
        name = _first_command(script) or comm
    name = printable(os.path.basename(name) or comm)
    return name[:NAME_CHARS_MAX] or "tool"


def shell_command(argv: list[str]) -> str | None:
    """Find the command of `sh -c COMMAND`: the first operand, if a `c` is among the options
    (POSIX.1-2024, sh). None: the shell was started in another way."""
    found, words = False, iter(argv[1:])
    for word in words:
        if word in ("-", "--") or word[:1] not in ("-", "+"):
            return (next(words, None) if word in ("-", "--") else word) if found else None
        if word.startswith("--"):
            if word in ("--rcfile", "--init-file"):
                next(words, None)
            continue
        found = found or (word[0] == "-" and "c" in word)
        if word[-1] in "oO":
            next(words, None)
    return None


def _first_command(script: str) -> str:
    try:
        words = shlex.split(script, comments=True)
    except ValueError:
        words = script.split()
    for word in words:
        head, assigned, _ = word.partition("=")
        if not (assigned and head.isidentifier()):
            return word.strip("(){};&|")
    return ""
