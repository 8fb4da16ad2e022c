"""A terminal that is drawn as a whole and read key by key, without any library: `top` starts as
fast as the other commands, and works wherever there is a terminal, with or without colours."""

from __future__ import annotations

import os
import select
import shutil
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agentcgroup.text import printable

from .output import draw_raw, wants_color

_ENTER = "\033[?1049h\033[?25l"
"""Another screen, no cursor."""
_LEAVE = "\033[?25h\033[?1049l"
_HOME, _TO_END_OF_LINE, _TO_END = "\033[H", "\033[K", "\033[J"
_STYLES = {"": "", "bold": "\033[1m", "reverse": "\033[7m"}
_PLAIN = "\033[0m"
_NAMES = {
    b"\033[A": "up",
    b"\033[B": "down",
    b"\033OA": "up",
    b"\033OB": "down",
    b"\033[D": "escape",
    b"\033[C": "enter",
    b"\033[5~": "page up",
    b"\033[6~": "page down",
    b"\033": "escape",
    b"\r": "enter",
    b"\n": "enter",
    b"\x7f": "backspace",
    b"\x08": "backspace",
}
_READ_MOST = 256


def keys_of(data: bytes) -> Iterator[str]:
    """Give the names of the keys that a terminal has sent: "up", "enter", or the character."""
    while data:
        known = [code for code in _NAMES if data.startswith(code)]
        if known:
            code = max(known, key=len)
            data = data[len(code) :]
            yield _NAMES[code]
            continue
        text = data[:4].decode("utf-8", "ignore")[:1]
        data = data[max(1, len(text.encode())) :]
        if text.isprintable() and text:
            yield text


class Terminal:
    """The terminal while it is ours; made by `taken`."""

    def __init__(self, input_fd: int) -> None:
        self._input_fd = input_fd

    @staticmethod
    def size() -> tuple[int, int]:
        """Return columns and lines."""
        found = shutil.get_terminal_size((80, 24))
        return found.columns, found.lines

    def draw(self, lines: Sequence[tuple[str, str]]) -> None:
        """Show lines of text and style from the top; nothing of a text can move the cursor.

        Raises:
            OutputError: the terminal is gone.
        """
        styles = _STYLES if wants_color(sys.stdout) else dict.fromkeys(_STYLES, "")
        drawn = []
        for text, style in lines:
            after = _PLAIN if styles[style] else ""
            drawn.append(f"{styles[style]}{printable(text)}{after}{_TO_END_OF_LINE}")
        draw_raw(_HOME + "\r\n".join(drawn) + _TO_END)

    def keys(self, wait_s: float) -> list[str]:
        """Wait for keys for so long; returns their names."""
        ready, _, _ = select.select([self._input_fd], [], [], max(0.0, wait_s))
        if not ready:
            return []
        data = os.read(self._input_fd, _READ_MOST)
        return list(keys_of(data)) if data else ["q"]


def is_there() -> bool:
    """Tell whether there is somebody at a terminal who can see and type."""
    return all(
        stream is not None and not stream.closed and stream.isatty()
        for stream in (sys.stdin, sys.stdout)
    )


@contextmanager
def taken() -> Iterator[Terminal]:
    """Take the terminal, and give it back as it was, however this ends."""
    input_fd = sys.stdin.fileno()
    before = termios.tcgetattr(input_fd)
    try:
        tty.setcbreak(input_fd)
        draw_raw(_ENTER)
        yield Terminal(input_fd)
    finally:
        termios.tcsetattr(input_fd, termios.TCSADRAIN, before)
        draw_raw(_LEAVE)
