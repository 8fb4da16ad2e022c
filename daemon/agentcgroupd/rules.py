"""Which programs begin a call when an agent's own process starts them, and what it is called."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex

from agentcgroupd.bpf import abi
from agentcgroupd.config import BoundariesConfig
from agentcgroupd.intent import NAME_CHARS_MAX

OWN_LAUNCHERS = ("agentcg", "agentcg-exec")
"""They ask for a call themselves."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Text of an agent's with control characters replaced, for names and logs."""
    return _CONTROLS.sub("?", text)


def argv_of(event: abi.ExecEvent) -> list[str]:
    """The head of a program's arguments."""
    raw = bytes(event.argv[: event.argv_bytes])
    words = raw.split(b"\0")
    if not event.argv_cut and words:
        words.pop()  # what follows the last NUL
    return [word.decode("utf-8", "replace") for word in words]


def tool_name(comm: str, argv: list[str]) -> str:
    """What the call is called: the program, or the first command of a shell's `-c`."""
    name = comm
    script = shell_command(argv)
    if script is not None:
        name = _first_command(script) or comm
    name = printable(os.path.basename(name) or comm)
    return name[:NAME_CHARS_MAX] or "tool"


def shell_command(argv: list[str]) -> str | None:
    """The command of `sh -c COMMAND`, None for another way to start a shell: the first operand, if
    a `c` is among the options (POSIX.1-2024, sh)."""
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


def begins_call(config: BoundariesConfig, comm: str, argv: list[str]) -> bool:
    """Whether the rules say so; the first that fits decides, none: no."""
    if not config.enabled or comm in OWN_LAUNCHERS:
        return False
    argument = argv[1] if len(argv) > 1 else ""
    for rule in config.rules:
        if any(fnmatch.fnmatchcase(comm, pattern) for pattern in rule.program) and (
            fnmatch.fnmatchcase(argument, rule.first_argument)
        ):
            if rule.shell_command and shell_command(argv) is None:
                continue
            return rule.begins_call
    return False


def may_begin_call(config: BoundariesConfig, comm: str) -> bool:
    """Whether the rules could say so for some arguments."""
    return (
        config.enabled
        and comm not in OWN_LAUNCHERS
        and any(
            rule.begins_call and any(fnmatch.fnmatchcase(comm, pattern) for pattern in rule.program)
            for rule in config.rules
        )
    )
