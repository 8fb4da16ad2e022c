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
WORD_CHARS_MAX = 4 * COMMAND_CHARS_MAX
"""Most characters that are read of a command inside a wrapper, with its quotes."""
_NESTED_MAX = 6
"""Most wrappers in one another: a sandbox, its shell, a snapshot's shell, the agent's own."""

_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "ash"})
_SANDBOXES = frozenset({"bwrap", "codex-linux-sandbox"})
_EVALUATED = re.compile(r"(?:^|&& |; )eval (?=\S)")
# Each is matched in time that grows with the script alone, whatever is in it: the daemon uses them.
_INNER_SHELL = re.compile(r"(?<![^\s'/])(?:bash|zsh|sh)'? -l?c (?=\S)")
_HANDED_OVER = re.compile(r"(?:^|\n)[ \t]*exec '[^'\n]*' -l?c (?=\S)")
_GEMINI_HEAD = "_bgpids_file="
_GEMINI = re.compile(
    r"_bgpids_file=[^\n]*\n\(\n *trap '[^\n]*' EXIT\n(.*?)(?:\n\)\n__code=\$\?|\Z)", re.DOTALL
)
_PIECE = re.compile(r"'([^']*)'?|\"((?:\\.|[^\"\\])*)\"?|\\(.)|([^\s'\"\\;&|<>()]+)", re.DOTALL)
_ESCAPED = re.compile(r"\\([$`\"\\])")


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
    at = script.find(_GEMINI_HEAD)
    gemini = _GEMINI.match(script, at) if at >= 0 else None
    if gemini is not None:
        return gemini[1]
    if "apply-seccomp" in script or script.startswith(("bwrap ", "exec bwrap ")):
        return _word_behind(_INNER_SHELL, script)
    if "shell-snapshots/" in script or "\\builtin shopt" in script or " && pwd -P >| " in script:
        return _word_behind(_EVALUATED, script)
    if script.startswith("__CODEX_SNAPSHOT_OVERRIDE_") or "/shell_snapshots/" in script[:512]:
        return _word_behind(_HANDED_OVER, script)
    return None


def _word_behind(pattern: re.Pattern[str], script: str) -> str | None:
    """Return the shell's word behind what a pattern finds first, without its quotes."""
    found = pattern.search(script)
    if found is None:
        return None
    script, at = script[found.end() : found.end() + WORD_CHARS_MAX], 0
    parts: list[str] = []
    while piece := _PIECE.match(script, at):
        single, double, escaped, bare = piece.groups()
        if double is not None:
            parts.append(_ESCAPED.sub(r"\1", double))
        else:
            parts.append(next(part for part in (single, escaped, bare, "") if part is not None))
        at = piece.end()
    return "".join(parts) or None
