"""Commands as a model asked for them, out of the command lines that agents make of them.

An agent runs `pytest` inside a script of its own, which restores a shell's settings before and
notes the working directory afterwards. What the model knows is the command, and so that is what
a report has to be found by. Only shapes that an agent is known to make are unwrapped; a shell that
the model itself asked for stays as it is. No command line raises an error, and none is executed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence

COMMAND_CHARS_MAX = 4096
"""Most characters of a command that are kept."""
SAME_CHARS_LEAST = 64
"""Fewest characters that have to be the same where a command was cut."""
CUT = "…"
SCRIPT_CHARS_MAX = 65_536
"""Most that is read of a script."""
_NESTED_MAX = 6
"""Most wrappers in one another: a sandbox, its shell, a snapshot's shell, the agent's own."""

_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "ash"})
_SANDBOXES = frozenset({"bwrap", "codex-linux-sandbox"})
# Each is matched in time that grows with the script alone, whatever is in it: the daemon uses them.
_INNER_SHELL = re.compile(r"(?<![^\s'/])(?:bash|zsh|sh)'? -l?c (?=\S)")
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


def command_of(argv: Sequence[str]) -> str:
    """Return what a command line was started for: the script of a shell's `-c` without what an
    agent puts around it, else the arguments, quoted as a shell wants them. Nothing is left
    out of it that `kept` would keep."""
    words = list(argv)
    for _ in range(_NESTED_MAX):
        script = _shell_script(words)
        if script is not None:
            return unwrapped(script)
        inner = _sandboxed(words)
        if inner is None:
            break
        words = inner
    return shlex.join(_head(words))


def unwrapped(script: str) -> str:
    """Return the command in a script that an agent has made of it, or the script itself."""
    for _ in range(_NESTED_MAX):
        inner = _inner(script)
        if inner is None:
            break
        script = inner
    return script.strip()


def kept(command: str, was_cut: bool = False) -> str:
    """Return the head of a command as it is kept; one that was cut ends in an ellipsis."""
    command = command.strip()
    if len(command) > COMMAND_CHARS_MAX:
        return command[:COMMAND_CHARS_MAX] + CUT
    return command.removesuffix(CUT) + CUT if was_cut else command


def is_same(asked: str, kept: str) -> bool:
    """Tell whether a command is the one that was kept of a call. Either may be only a head that
    ends in an ellipsis."""
    asked = asked.strip()
    if not kept.endswith(CUT) and not asked.endswith(CUT):
        return asked == kept
    heads = (asked.removesuffix(CUT), kept.removesuffix(CUT))
    least = min(map(len, heads))
    return least >= SAME_CHARS_LEAST and heads[0][:least] == heads[1][:least]


def _head(words: Sequence[str]) -> Iterator[str]:
    """Yield as many words as it takes for a command that has to be cut."""
    chars = 0
    for word in words:
        yield word
        chars += len(word) + 1
        if chars > COMMAND_CHARS_MAX + 1:
            break


def _shell_script(words: Sequence[str]) -> str | None:
    """Return the script of `sh -c SCRIPT`; None: the words are no such command."""
    if not words or os.path.basename(words[0]).removeprefix("-") not in _SHELLS:
        return None
    has_command = False
    for word in words[1:]:
        if word.startswith("--"):
            continue
        if word[:1] in ("-", "+") and len(word) > 1:
            has_command = has_command or "c" in word[1:]
        else:
            return word if has_command else None
    return None


def _sandboxed(words: Sequence[str]) -> list[str] | None:
    """Return what a sandbox's own program is to run; None: the words are no such command."""
    if not words or os.path.basename(words[0]) not in _SANDBOXES or "--" not in words:
        return None
    return list(words[words.index("--") + 1 :]) or None


def _inner(script: str) -> str | None:
    """Return what is in the outermost wrapper; None: there is none that is known."""
    if script.startswith(("bwrap ", "exec bwrap ")):
        shell = _INNER_SHELL.search(script, 0, SCRIPT_CHARS_MAX)
        return (word_at(script, shell.end()) or None) if shell is not None else None
    return command_in(script)


def command_in(script: str) -> str | None:
    """Return the command in a script that an agent has made of it; None: it is in none."""
    script = script[:SCRIPT_CHARS_MAX]
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
