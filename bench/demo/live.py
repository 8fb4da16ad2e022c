"""The demo while it runs: one view that is drawn anew in place on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from typing import TextIO

from agentcgroup_lab.replay.progress import MIB, Progress, SessionProgress
from bench.demo.verdict import TITLES

BAR = 44
LINE_EVERY_S = 2.0
_UP, _CLEAR, _RED, _ORANGE, _DIM, _BOLD, _PLAIN = (
    "\x1b[{}A",
    "\x1b[0J",
    "\x1b[31m",
    "\x1b[33m",
    "\x1b[2m",
    "\x1b[1m",
    "\x1b[0m",
)


class Lines:
    """A plain line every two seconds, and at the end of each part."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._next_s = 0.0

    def begin(self, title: str) -> None:
        """A part of the demo begins."""
        self._next_s = LINE_EVERY_S
        self.say(title)

    def watch(self, progress: Progress) -> None:
        """Tell how far it is."""
        if progress.passed_s >= self._next_s:
            self._next_s = progress.passed_s + LINE_EVERY_S
            self.say(progress.text())

    def say(self, text: str) -> None:
        """Print a line that stays."""
        print(text, file=self._out, flush=True)


class View:
    """A view of the pool and each session, drawn anew in place."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._drawn = 0
        self._title = ""

    def begin(self, title: str) -> None:
        """A part of the demo begins; the last picture of the one before stays."""
        self._drawn = 0
        self._title = title

    def watch(self, progress: Progress) -> None:
        """Draw how far it is."""
        lines = draw(self._title, progress)
        back = _UP.format(self._drawn) + _CLEAR if self._drawn else ""
        self._out.write(back + "\n".join(lines) + "\n")
        self._out.flush()
        self._drawn = len(lines)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._drawn = 0
        print(text, file=self._out, flush=True)


def draw(title: str, progress: Progress) -> list[str]:
    """Lines of the view: a title, the pool as a bar made of its sessions, and each session."""
    held = progress.pool_bytes or 0
    shares = [session.held_bytes / progress.limit_bytes for session in progress.sessions]
    bar = ""
    for number, share in enumerate(shares, 1):
        bar += str(number) * round(share * BAR)
    bar = bar[:BAR].ljust(BAR, ".")
    head = f"{_BOLD}{title}{_PLAIN} {_DIM}{progress.passed_s:4.0f} s{_PLAIN}"
    pool = f"  pool [{bar}] {held / MIB:4.0f} of {progress.limit_bytes / MIB:.0f} MiB"
    return [head, pool, *(_session(session) for session in progress.sessions)]


def _session(session: SessionProgress) -> str:
    name = f"{session.id} important" if session.important else session.id
    text = f"  {name:<13}{session.held_bytes / MIB:5.0f} MiB  "
    text += f"{session.finished:2d} of {session.planned} calls"
    if session.lost:
        text += f"  {_RED}{session.lost} killed{_PLAIN}"
    if session.state == "lost":
        return f"{text}  {_RED}agent lost{_PLAIN}"
    if session.state:
        return f"{text}  {session.state}"
    if session.paused:
        return f"{text}  {_ORANGE}{session.tool} paused{_PLAIN}"
    return f"{text}  {session.tool}"


def part_title(strategy: str) -> str:
    """The title of a part of the demo."""
    return f"four sessions, {TITLES[strategy]}"
