"""Command lines as far as it takes to say what they run: shells, their scripts, and programs that
only run another. Commands are not executed, words are not expanded, and no command line raises an
error.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence

SCRIPT_CHARS_MAX = 4096
WORDS_MAX = 64
_NESTED_MAX = 4
"""Most shells within each other that are looked into. Agents wrap a user's command in a script that
evaluates it, and may have a sandbox run that."""

SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "ash"})
_WRAPPERS: dict[str, str] = {
    "builtin": "",
    "chronic": "",
    "command": "",
    "doas": "Cu",
    "env": "Cu",
    "exec": "a",
    "ionice": "cn",
    "nice": "n",
    "nohup": "",
    "setsid": "",
    "stdbuf": "eio",
    "sudo": "CDRTUgpu",
    "taskset": "",
    "time": "fo",
    "timeout": "ks",
    "unbuffer": "",
    "xargs": "EILPadns",
}
"""Programs that run what follows their options, numbers and assignments; and which of their short
options have a word of their own after them."""
_RUNNERS = frozenset({"uv", "poetry", "pipenv", "pdm", "hatch"})
"""Programs whose command `run` runs another: `uv run pytest` is pytest."""
_KEYWORDS = frozenset("do then else elif if while until ! {".split())
_MINOR = frozenset(
    "cat cd pushd popd pwd export unset source . deactivate set true : echo printf mkdir sleep"
    " test [ [[ ]] ulimit umask alias unalias trap wait for case select in done fi esac } exit"
    " return local declare typeset readonly shopt setopt unsetopt hash read shift break continue"
    " disown".split()
)
"""Commands that a script is not run for, unless it holds no others."""
_TELLING = frozenset("cat pwd echo printf mkdir sleep".split())
"""Commands among them that tell more of a script than a change of directory or a setting does."""
_FILTERS = frozenset("head tail grep egrep sed awk uniq wc tee cut tr less more cat".split())
"""Commands that, behind a pipe, only pass on what the first command says."""

_TOKEN = re.compile(
    r"(?P<blank>(?:[ \t\r\f\v]|\\\n)+)"
    r"|(?P<comment>\#[^\n]*)"
    r"|(?P<redirect>&>>?|\d{0,2}(?:>>|>&|>\||<<<|<<-|<<|<&|<>|>|<))"
    r"|(?P<operator>&&|\|\||\|&|;;|[;&|\n()])"
    r"|(?P<word>(?:\\.?|'[^']*'?|\"(?:\\.?|[^\"\\])*\"?|[^\s\\'\"|;&()<>])+)"
    r"|(?P<other>.)",
    re.DOTALL,
)
_QUOTING = re.compile(r"'([^']*)'?|\"((?:\\.?|[^\"\\])*)\"?|\\(.?)", re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")
_AMOUNT = re.compile(r"(?:0x[0-9a-f]+|\d[\d.]*[a-z]?)")


def commands_of(argv: Sequence[str]) -> Iterator[list[str]]:
    """Yield the commands that a command line is run for, as words without what wraps them: those of
    a shell's script that matter, else the first one of it."""
    return _of_words(_bounded(argv), 0)


def shell_command(argv: Sequence[str]) -> str | None:
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


def reads_commands(argv: Sequence[str]) -> bool:
    """Tell whether a command line runs a shell that reads its commands from its standard input: it
    has neither `-c` nor a file among its operands."""
    shell = _unwrapped(_bounded(argv))
    if not shell or not is_shell(shell[0]):
        return False
    words = iter(shell[1:])
    for word in words:
        if word in ("-", "--") or word[:1] not in ("-", "+"):
            return word in ("-", "--") and next(words, None) is None
        if word.startswith("--"):
            if word in ("--rcfile", "--init-file"):
                next(words, None)
            continue
        if word[0] == "-" and "c" in word:
            return False
        if word[0] == "-" and "s" in word:
            return True
        if word[-1] in "oO":
            next(words, None)
    return True


def is_shell(program: str) -> bool:
    """Tell whether a program, by its path or as a login shell has it (`-bash`), is a shell."""
    return os.path.basename(program).removeprefix("-") in SHELLS


def _bounded(argv: Sequence[str]) -> list[str]:
    """Return the head of a command line: an agent's argument must not cost the daemon time."""
    words: list[str] = []
    left = SCRIPT_CHARS_MAX
    for word in argv[:WORDS_MAX]:
        words.append(word[:left])
        left -= len(word)
        if left <= 0:
            break
    return words


def _of_words(words: list[str], depth: int) -> Iterator[list[str]]:
    """Yield what a simple command runs."""
    words = _unwrapped(words)
    if not words:
        return
    script = _script_of(words) if depth < _NESTED_MAX else None
    if script is not None:
        yield from _of_script(script, depth + 1)
    else:
        yield words


def _script_of(words: list[str]) -> str | None:
    """Return the script that a command has the shell run; None: it is no such command."""
    if words[0] == "eval":
        return " ".join(words[1:])
    return shell_command(words) if is_shell(words[0]) else None


def _of_script(script: str, depth: int) -> Iterator[list[str]]:
    """Yield a script's commands: those that matter, else the first one."""
    commands = itertools.islice(_commands(script[:SCRIPT_CHARS_MAX]), WORDS_MAX)
    major: list[list[str]] = []
    minor: list[list[str]] = []
    for raw, piped in commands:
        # What `$(...)` runs is a command of its own.
        words = _unwrapped(raw[:-1] if raw[-1] == "$" else raw)
        if not words:
            continue
        filters = piped and os.path.basename(raw[0]) in _FILTERS
        (minor if filters or _is_minor(words) else major).append(words)
    telling = [words for words in minor if words[0] in _TELLING]
    for words in major or (telling or minor)[:1]:
        yield from _of_words(words, depth)


def _is_minor(words: list[str]) -> bool:
    # What `eval "$(ssh-agent)"` evaluates are settings.
    settings = words[0] == "eval" and "".join(words[1:])[:1] in "$`"
    return settings or words[0] in _MINOR


def _commands(script: str) -> Iterator[tuple[list[str], bool]]:
    """Yield the simple commands of a script, and whether each reads from a pipe.

    Only as much of the shell's grammar is known as it takes to tell commands apart. A script that
    was cut short is read as far as it goes.
    """
    words: list[str] = []
    heredocs: list[str] = []
    piped, target, at = False, "", 0
    while at < len(script):
        token = _TOKEN.match(script, at)
        assert token is not None  # `other` matches any character.
        text, at = token[0], token.end()
        if token.lastgroup == "word":
            if target in ("<<", "<<-"):
                heredocs.append(_unquoted(text))
            elif not target:
                words.append(_unquoted(text))
            target = ""
        elif token.lastgroup == "redirect":
            target = text
        elif token.lastgroup == "operator":
            if words:
                yield words, piped
            words, piped, target = [], text in ("|", "|&"), ""
            if text == "\n" and heredocs:
                at = _behind(heredocs, script, at)
                heredocs = []
    if words:
        yield words, piped


def _behind(heredocs: list[str], script: str, at: int) -> int:
    """Return where a script goes on after the text of its here-documents."""
    for delimiter in heredocs:
        while at < len(script):
            line, _, _ = script[at:].partition("\n")
            at += len(line)
            if line.lstrip("\t") == delimiter:
                break
            at += 1
    return min(at, len(script))


def _unquoted(word: str) -> str:
    if "'" not in word and '"' not in word and "\\" not in word:
        return word
    return _QUOTING.sub(lambda part: part[1] or part[2] or part[3] or "", word)


def _unwrapped(words: list[str]) -> list[str]:
    """Return a command without keywords, assignments, and programs that only run another."""
    at = 0
    while at < len(words):
        head = os.path.basename(words[at])
        if _ASSIGNMENT.match(words[at]) or words[at] in _KEYWORDS:
            at += 1
        elif head in _RUNNERS and words[at + 1 : at + 2] == ["run"]:
            at = _after_options(words, at + 2, "")
        elif head in _WRAPPERS:
            after = _after_options(words, at + 1, _WRAPPERS[head])
            if after == len(words):  # `env` and the like without a command.
                break
            at = after
        else:
            break
    return words[at:]


def _after_options(words: list[str], at: int, valued: str) -> int:
    """Return the index behind the options and numbers that begin at `at`. `valued`: short options
    whose value is the next word."""
    while at < len(words):
        word = words[at]
        if word[:1] == "-":
            takes_next = word[:2] != "--" and word[-1] in valued and len(word) > 1
            at += 2 if takes_next and at + 2 < len(words) else 1
        elif _AMOUNT.fullmatch(word):
            at += 1
        else:
            break
    return at
