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
from collections.abc import Sequence

from agentcgroup.text import printable
from agentcgroupd.intents.script import SCRIPT_CHARS_MAX, commands_of

SHAPE_CHARS_MAX = 120
COMMANDS_MAX = 4
"""Most commands of a script that are part of its shape: the first ones that matter."""
OPERANDS_MAX = 16
WORD_CHARS_MAX = 72
"""Most characters of a name. Longer words are taken for text, and so are words with white space of
more than half as many."""
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
    shapes = list(dict.fromkeys(map(_of_command, commands_of(argv))))[:COMMANDS_MAX]
    text = "; ".join(shapes) or _argument(name.strip()) or "?"
    text = printable(text.encode("utf-8", "replace").decode())
    return text if len(text) <= SHAPE_CHARS_MAX else text[: SHAPE_CHARS_MAX - 1] + "…"


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
