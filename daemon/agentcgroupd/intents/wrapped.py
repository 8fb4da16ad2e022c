"""What coding agents wrap a model's command in, taken off again, so that names and reports carry
the command itself.

Each agent hands its shell a script of its own, which restores settings, runs the command and notes
how it ended. Forms that are known are undone; any other script is left as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from agentcgroupd.intents.script import is_shell, shell_command

SCRIPT_CHARS_MAX = 65_536
"""Most that is read of a script."""

_PART = re.compile(
    r"'([^']*)(?:'|$)|\"((?:[^\"\\]|\\.)*)(?:\"|$)|\\(.)|([^\s'\"\\;&|<>()]+)", re.DOTALL
)
_ESCAPED = re.compile(r'\\([\\"$`])')
_CODEX_COMMAND = re.compile(r"\nexec '[^'\n]*' -[a-z]+ ")
_GEMINI_HEAD = re.compile(r"_bgpids_file=[^\n]*\n\(\n\s*trap '[^'\n]*' EXIT\n")
_GEMINI_TAIL = "\n)\n__code=$?"
_GEMINI_OLDER_TAILS = ("; }; __code=$?; pgrep -g 0", "; ) ; __code=$?; pgrep -g 0")
_SANDBOX_COMMAND = re.compile(r"ARGV0=apply-seccomp \S+ \S+ -c ")
_SNAPSHOT = "/shell-snapshots/snapshot-"


def user_command(argv: Sequence[str]) -> list[str]:
    """Return a command line with the script that an agent wrapped a command in replaced by that
    command; any other command line as it is."""
    script = shell_command(argv) if argv and is_shell(argv[0]) else None
    if script is None:
        return list(argv)
    # A sandbox is run by a script whose arguments hold the command.
    for candidate in (script, *reversed(argv[3:])):
        found = _undone(candidate[:SCRIPT_CHARS_MAX])
        if found is not None:
            return [os.fspath(argv[0]), "-c", found]
    return list(argv)


def _undone(script: str) -> str | None:
    """Return the command in a script of an agent; None: it is in none."""
    found = (undo(script) for undo in (_claude_outside, _claude, _codex, _gemini))
    return next((command for command in found if command is not None), None)


def _claude_outside(script: str) -> str | None:
    """Undo what Claude Code puts around its own form: a sandbox, or a prefix of the user's."""
    if _SNAPSHOT not in script:
        return None
    inside = _SANDBOX_COMMAND.search(script)
    if inside is not None:
        return _claude(word_at(script, inside.end()))
    program, _, rest = script.partition(" ")
    if rest.startswith("'") and program not in ("source", "eval", "exec"):
        return _claude(word_at(rest, 0))
    return None


def _claude(script: str) -> str | None:
    if _SNAPSHOT not in script and "&& pwd -P >| " not in script:
        return None
    if script.startswith("eval "):
        return word_at(script, len("eval "))
    head, separator, command = script.partition(" && eval ")
    return word_at(command, 0) if separator and "eval" not in head else None


def _codex(script: str) -> str | None:
    if not script.startswith(("__CODEX_SNAPSHOT_", "if . '")):
        return None
    found = _CODEX_COMMAND.search(script)
    return word_at(script, found.end()) if found is not None else None


def _gemini(script: str) -> str | None:
    if not script.startswith("shopt -u promptvars nullglob"):
        return None
    rest = script.partition(";")[2].lstrip(" \n")
    head = _GEMINI_HEAD.match(rest)
    if head is not None:
        body = rest[head.end() :]
        end = body.rfind(_GEMINI_TAIL)
        return body[:end] if end >= 0 else body
    for tail in _GEMINI_OLDER_TAILS:
        end = rest.rfind(tail)
        if rest[:1] in "({" and end >= 0:
            return rest[1:end].strip()
    return rest


def word_at(text: str, at: int) -> str:
    """Return the shell's word that begins at an index, without its quotes; nothing is expanded."""
    parts: list[str] = []
    while (part := _PART.match(text, at)) is not None:
        single, double, escaped, bare = part.groups()
        if double is not None:
            double = _ESCAPED.sub(r"\1", double)
        parts.append(next(text for text in (single, double, escaped, bare) if text is not None))
        at = part.end()
        if not part[0]:
            break
    return "".join(parts)
