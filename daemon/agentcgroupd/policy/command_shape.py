"""Shapes of command lines: the tool and the arguments that matter, by which the same work is
recognized when it is asked for in other words.

`bash -c 'cd x && python3 -m pytest -xvs tests/a.py 2>&1 | tail -50'` has the shape
`pytest tests/a.py`. Options are left out: most only change what is printed, and which of them take
a value cannot be known here. Commands are not executed, words are not expanded, and no command line
raises an error.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence

from agentcgroup.text import printable
from agentcgroupd.intents.command import shell_command

SHAPE_CHARS_MAX = 120
SCRIPT_CHARS_MAX = 4096
WORDS_MAX = 64
COMMANDS_MAX = 4
"""Most commands of a script that are part of its shape: the first ones that matter."""
OPERANDS_MAX = 16
WORD_CHARS_MAX = 72
"""Most characters of a name. Longer words are taken for text, and so are words with white space of
more than half as many."""
_NESTED_MAX = 3
"""Most shells within each other that are looked into."""

_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "ash"})
_WRAPPERS = frozenset(
    "sudo env nohup time timeout exec command nice ionice stdbuf setsid xargs builtin".split()
)
"""Programs that run what follows their options, numbers and assignments."""
_RUNNERS = frozenset({"uv", "poetry", "pipenv", "pdm", "hatch"})
"""Programs whose command `run` runs another: `uv run pytest` is pytest."""
_KEYWORDS = frozenset("do then else elif if while until ! {".split())
_MINOR = frozenset(
    "cat cd pushd popd pwd export unset source . deactivate set true : echo printf mkdir sleep"
    " test [ [[ ]] ulimit umask alias trap wait for case select in done fi esac } exit return"
    " local".split()
)
"""Commands that a script is not run for, unless it holds no others."""
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
_AMOUNT = re.compile(r"\d[\d.]*[a-z]?")
_VERSION = re.compile(r"(?<=[a-z+])-?\d+(?:\.\d+)*\Z")
_TEMPORARY = re.compile(
    r"(?:/private)?/(?:tmp|var/tmp|dev/shm|run/user/\d+)/\S*?(\.[A-Za-z]\w{0,7})?"
)
_HASH = re.compile(
    r"(?<![0-9A-Za-z])(?=[0-9A-Fa-f-]*\d)[0-9A-Fa-f]{7,}(?:-[0-9A-Fa-f]{4,}){0,4}(?![0-9A-Za-z])"
)
_DIGITS = re.compile(r"\d+")
_IMPORT = re.compile(r"(?:^|[;\n])[ \t]*(?:import|from)\s+([A-Za-z_]\w*)")


def shape_of(name: str, argv: Sequence[str]) -> str:
    """Return the shape of a call's command line, or of its name where it has none: 1 to
    `SHAPE_CHARS_MAX` printable characters."""
    words = _bounded(argv)
    shapes = list(dict.fromkeys(_of_words(words, 0)))[:COMMANDS_MAX]
    text = "; ".join(shapes) or _argument(name.strip()) or "?"
    text = printable(text.encode("utf-8", "replace").decode())
    return text if len(text) <= SHAPE_CHARS_MAX else text[: SHAPE_CHARS_MAX - 1] + "…"


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


def _of_words(words: list[str], depth: int) -> Iterator[str]:
    """Yield the shapes of what a simple command runs."""
    words = _unwrapped(words)
    if not words:
        return
    if os.path.basename(words[0]) in _SHELLS and depth < _NESTED_MAX:
        script = shell_command(words)
        if script is not None:
            yield from _of_script(script, depth + 1)
            return
    yield _of_command(words)


def _of_script(script: str, depth: int) -> Iterator[str]:
    """Yield the shapes of a script's commands: of those that matter, else of the first one."""
    commands = itertools.islice(_commands(script[:SCRIPT_CHARS_MAX]), WORDS_MAX)
    major: list[list[str]] = []
    minor: list[list[str]] = []
    for raw, piped in commands:
        words = _unwrapped(raw)
        if not words:
            continue
        filters = piped and os.path.basename(raw[0]) in _FILTERS
        (minor if filters or words[0] in _MINOR else major).append(words)
    for words in major or minor[:1]:
        yield from _of_words(words, depth)


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
        end = re.compile(rf"^\t*{re.escape(delimiter)}$", re.M).search(script, at)
        at = end.end() if end else len(script)
    return at


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
            at = _after_options(words, at + 2)
        elif head in _WRAPPERS:
            after = _after_options(words, at + 1)
            if after == len(words):  # `env` and the like without a command.
                break
            at = after
        else:
            break
    return words[at:]


def _after_options(words: list[str], at: int) -> int:
    """Return the index behind the options and numbers that begin at `at`."""
    while at < len(words) and (words[at][:1] == "-" or _AMOUNT.fullmatch(words[at])):
        at += 1
    return at


def _of_command(words: list[str]) -> str:
    tool = os.path.basename(words[0].rstrip("/")) or words[0]
    tool, rest = _VERSION.sub("", tool), words[1:]
    kept: list[str] = []
    if tool == "python":
        if "-c" in rest:
            code = "\n".join(rest[rest.index("-c") + 1 :][:1])
            return f"python -c {_imports(code)}".rstrip()
        for at, word in enumerate(rest):
            if word == "-m" and at + 1 < len(rest):
                tool, rest = rest[at + 1], rest[at + 2 :]
                break
            if word[:1] != "-":
                break
    kept.append(_argument(tool))
    operands = (word for word in rest if word and word[0] not in "-+")
    kept.extend(_argument(word) for word in itertools.islice(operands, OPERANDS_MAX))
    return " ".join(kept)


def _imports(code: str) -> str:
    """Return what a Python script imports, which tells most of the memory that it takes."""
    return ",".join(sorted(set(_IMPORT.findall(code[:SCRIPT_CHARS_MAX]))))


def _argument(word: str) -> str:
    """Return a word without what differs from run to run: numbers, hashes, temporary files."""
    # The ends tell long words apart; patterns would take long over the whole of one.
    if len(word) > 4 * WORD_CHARS_MAX:
        word = word[: 2 * WORD_CHARS_MAX] + word[-2 * WORD_CHARS_MAX :]
    spaced = any(c.isspace() for c in word)
    temporary = _TEMPORARY.fullmatch(word)
    if temporary:
        return f"/tmp/*{temporary[1] or ''}"
    if "::" in word:
        word = word.partition("[")[0]  # A test goes by its name without parameters.
    word = _DIGITS.sub("N", _HASH.sub("#", word))
    if len(word) <= (WORD_CHARS_MAX // 2 if spaced else WORD_CHARS_MAX):
        return word
    return "…" if spaced or "/" not in word else "…" + word[-WORD_CHARS_MAX // 2 :]
