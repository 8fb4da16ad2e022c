"""How the command prints: tables, readable numbers, JSON; colours only where they are welcome."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TextIO

from agentcgroup.tables import table
from agentcgroup.text import escaped_json, printable, printable_lines

NONE = "-"

_SEAL = f"\0{os.urandom(8).hex()}"
"""Stands for the beginning of a colour until the text is printed; nobody else can write it."""
_CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "dim": "2"}


class OutputError(Exception):
    """The standard output cannot be written to: it is closed, full, or nobody reads it.

    is_reader_gone: the last of these, which is no mistake: the reader (head, less) has what it
    wants.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.is_reader_gone = isinstance(error, BrokenPipeError)


def _stdout() -> TextIO:
    """Return the standard output. Raises OutputError where the process was started without one."""
    if sys.stdout is None:
        _closed()
    return sys.stdout


def _closed() -> NoReturn:
    raise OutputError(OSError(errno.EBADF, "it is closed"))


def wants_color(stream: TextIO | None) -> bool:
    """Say whether to write colours: to a terminal, unless NO_COLOR is set or TERM is dumb."""
    if stream is None:
        return False
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, color: str) -> str:
    """Return `text` in a colour ("bold", "red", ...), if stdout shows colours. Only `say` can print
    it."""
    return f"{_SEAL}{_CODES[color]}m{text}{_SEAL}0m" if wants_color(sys.stdout) else text


def say(
    text: object = "", *, file: TextIO | None = None, end: str = "\n", flush: bool = False
) -> None:
    """Print text, of which nothing can reach the terminal but characters, line breaks, and the
    colours of `paint`: parts of it are names and command lines of programs that nobody trusts.

    All commands print through this function, `complain`, or as JSON. `file`: stdout where None.

    Raises:
        OutputError: stdout cannot be written to.
    """
    shown = "\033[".join(map(printable_lines, str(text).split(_SEAL)))
    _print(shown, file, end, flush)


def _print(text: str, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    try:
        print(text, file=file or _stdout(), end=end, flush=flush)
    except OSError as error:
        raise OutputError(error) from None


def complain(text: object) -> None:
    """Print a line on stderr; where that cannot be written to, nobody can be told."""
    if sys.stderr is not None:
        try:
            say(text, file=sys.stderr, flush=True)
        except OutputError:
            return


def flush() -> None:
    """Write out what has been printed. Raises OutputError."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise OutputError(error) from None


def give_up_stdout() -> None:
    """Drop what could not be written, so that the interpreter does not try again at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def draw_raw(text: str) -> None:
    """Write to the terminal what moves its cursor: for `terminal` alone, which makes all text that
    it shows printable. Raises OutputError."""
    _print(text, end="", flush=True)


def print_json(value: Any) -> None:
    """Print a JSON document, indented. Raises OutputError."""
    _print(escaped_json(json.dumps(value, indent=2, ensure_ascii=False)))


def print_json_line(value: Any) -> None:
    """Print a JSON document in one line of a stream, and flush it. Raises OutputError."""
    _print(escaped_json(json.dumps(value, ensure_ascii=False)), flush=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print an aligned table; a column whose header starts with ">" is aligned to the right."""
    head, *lines = table(headers, [[*map(printable, row)] for row in rows])
    say(paint(head, "bold"))
    for line in lines:
        say(line)


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print lines of name and value, the values aligned, their further lines too."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        value = value.replace("\n", "\n" + " " * (width + 2))
        say(f"{paint(name.ljust(width), 'bold')}  {value}")


def labels_text(labels: Mapping[str, str]) -> str:
    """Write labels as people give them: "team=web,user=anna"; "-" where there are none."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items())) or NONE


def size(count: int | None) -> str:
    """Write bytes as people read them: "512 MiB"; "-" for None."""
    if count is None:
        return NONE
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(usec: int | None) -> str:
    """Write microseconds as people read them: "1.25 s", "3 h 20 min"; "-" for None."""
    if usec is None:
        return NONE
    if usec < 1000:
        return f"{usec} us"
    if usec < 1_000_000:
        return f"{usec / 1000:.1f} ms"
    seconds = usec / 1_000_000
    if seconds < 60:
        return f"{seconds:.2f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds // 86400:.0f} d {seconds % 86400 // 3600:.0f} h"


def since(unix_usec: int) -> str:
    """Write how long ago a moment was; "-" where it is not known (0)."""
    return duration(max(0, int(time.time() * 1e6) - unix_usec)) if unix_usec else NONE


def clock(unix_usec: int) -> str:
    """Write the local time of a moment: "14:03:21"."""
    return time.strftime("%H:%M:%S", time.localtime(unix_usec / 1e6))


def cores(millicores: int | None) -> str:
    """Write millicores as cores: "1.5"; "-" for None."""
    return NONE if millicores is None else f"{millicores / 1000:g}"


def number(value: int | None) -> str:
    """Write a count; "-" for None."""
    return NONE if value is None else str(value)
