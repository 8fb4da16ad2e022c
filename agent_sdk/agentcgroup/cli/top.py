"""`top`: who uses the pool, who is paused and why, the queue, and what would help."""

from __future__ import annotations

import argparse
import time

from agentcgroup import errors
from agentcgroup.admin import Admin

from . import common, terminal
from .keyboard import Operator
from .live import Look, Rates, to_dict
from .output import print_json, print_json_line, say
from .screen import SORTS, View, frame
from .summaries import summary

INTERVAL_S = 2.0
FIRST_S = 0.5
"""Between the first two looks, without which nothing is known of what is used in a second."""
REST = 20
"""How many times as long as a look and its drawing took is waited before the next: so a thousand
sessions take at most 5 % of a CPU, the daemon's part included."""
BOTH = 12
"""How many times its CPU time here a look takes here and in the daemon together, at most (6 to 10
were measured, bench/measurements.md): on a busy machine a look lasts far longer than it works."""
ONCE_LINES = 60


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's command."""
    parser = common.command(subparsers, "top", run_top, summary("top"))
    parser.add_argument(
        "--once", action="store_true", help="print it once (as where there is no terminal)"
    )
    parser.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help=f"look again after so long (default: {INTERVAL_S:g}); without a terminal, or with "
        "--json, print it again and again",
    )
    parser.add_argument("--sort", choices=SORTS, default=SORTS[0], help="what stands first")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only sessions with TEXT")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 3600")
    return value


def run_top(args: argparse.Namespace) -> int:
    """Show the pool until "q", or print it. Returns the exit code."""
    with common.admin() as admin:
        if args.json:
            _print_json(admin, args)
        elif args.once or not terminal.is_there():
            _print(admin, args)
        else:
            _interactive(admin, args)
    return common.OK


def rest_s(wanted_s: float, look_s: float, cpu_s: float) -> float:
    """Return how long to wait after a look that took `look_s`, and `cpu_s` of CPU time here."""
    return max(wanted_s, REST * min(look_s, BOTH * cpu_s))


class _Looks:
    """Looks one after the other, each with the rates since the one before."""

    def __init__(self, admin: Admin, interval_s: float | None) -> None:
        self._admin, self._interval_s = admin, interval_s
        self._before: Look | None = None
        self._took_s = self._cpu_s = 0.0

    def first(self) -> tuple[Look, Rates]:
        """Look twice."""
        self._before = Look.take(self._admin)
        time.sleep(FIRST_S)
        return self.next()

    def next(self) -> tuple[Look, Rates]:
        """Look once more."""
        started, cpu_s = time.monotonic(), time.process_time()
        now = Look.take(self._admin)
        self._took_s = time.monotonic() - started
        self._cpu_s = time.process_time() - cpu_s
        rates, self._before = Rates.between(self._before, now), now
        return now, rates

    def wait(self) -> None:
        """Wait until the next look."""
        time.sleep(rest_s(self._interval_s or INTERVAL_S, self._took_s, self._cpu_s))


def _print_json(admin: Admin, args: argparse.Namespace) -> None:
    looks = _Looks(admin, args.watch)
    found = looks.first()
    if args.once or args.watch is None:
        print_json(to_dict(*found))
        return
    while True:
        print_json_line(to_dict(*found))
        looks.wait()
        found = looks.next()


def _print(admin: Admin, args: argparse.Namespace) -> None:
    looks = _Looks(admin, args.watch)
    view = View(sort=args.sort, wanted=args.filter, chosen=-1)
    found = looks.first()
    while True:
        width, _ = terminal.Terminal.size()
        lines = frame(*found, view, width, ONCE_LINES, time.time_ns() // 1000)[:-1]
        while lines and not lines[-1][0].strip():
            lines.pop()
        for text, _ in lines:
            say(text.rstrip())
        if args.once or args.watch is None:
            return
        say(flush=True)
        looks.wait()
        found = looks.next()


def _interactive(admin: Admin, args: argparse.Namespace) -> None:
    operator = Operator(admin)
    operator.view.sort, operator.view.wanted = args.sort, args.filter
    operator.refresh()
    with terminal.taken() as screen:
        due = time.monotonic() + FIRST_S
        _draw(operator, screen)
        while not operator.is_done:
            keys = screen.keys(due - time.monotonic())
            for key in keys:
                operator.key(key)
            started, cpu_s = time.monotonic(), time.process_time()
            is_due = started >= due and not operator.is_done
            if is_due:
                _refresh(operator)
            if keys or is_due:
                _draw(operator, screen)
            if is_due:
                took_s = time.monotonic() - started
                cpu_s = time.process_time() - cpu_s
                due = time.monotonic() + rest_s(args.watch or INTERVAL_S, took_s, cpu_s)


def _draw(operator: Operator, screen: terminal.Terminal) -> None:
    assert operator.look is not None
    width, height = screen.size()
    now = time.time_ns() // 1000
    screen.draw(frame(operator.look, operator.rates, operator.view, width, height, now)[:height])


def _refresh(operator: Operator) -> None:
    """Look again. While the daemon is away, that is said and tried again."""
    try:
        operator.refresh()
    except errors.CallNotFound as error:
        operator.view.message = error.sentence
    except errors.Unavailable as error:
        operator.view.message = f"{error.sentence}; this is how it was before"
