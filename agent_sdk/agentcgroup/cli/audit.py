"""`audit`: what the daemon has written down, and whether all of it is there."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from agentcgroup import audit
from agentcgroup.errors import InvalidIntent
from agentcgroup.moment import moment_usec

from . import common
from .output import complain, print_fields, print_json, print_json_line, say
from .summaries import summary

_SHOWN_FIRST = ("at_unix_usec", "event", "session", "call")
_OF_CHAIN = ("seq", "chain")
PROBLEMS_SHOWN = 20


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's command."""
    parser = common.command(subparsers, "audit", run_audit, summary("audit"))
    parser.add_argument("what", nargs="?", choices=("show", "verify"), default="show")
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        metavar="FILE",
        help=f"a file of the log instead of {audit.DEFAULT_PATH} and those before "
        "it; several: oldest first",
    )
    parser.add_argument("--session", metavar="NAME", help="entries of one session")
    parser.add_argument("--call", metavar="ID", help="entries of one call")
    parser.add_argument("--event", action="append", metavar="EVENT", help="entries of this kind")
    parser.add_argument(
        "--since",
        type=moment,
        metavar="TIME",
        default=0,
        help="entries not older than this: 10m, 2h, 1d, or a time such as "
        "2026-01-31T12:00 (local time)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the newest N of them")


def moment(text: str) -> int:
    """Read a point in time: so long ago, or a date. Returns microseconds since 1970.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        return moment_usec("TIME", text)
    except InvalidIntent as error:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is {error.allowed}") from None


def run_audit(args: argparse.Namespace) -> int:
    """Show or check the log. Returns the exit code."""
    paths = args.file or audit.files_of(audit.DEFAULT_PATH)
    try:
        return _verify(paths, args.json) if args.what == "verify" else _show(paths, args)
    except OSError as error:
        complain(f"agentcg: {error.filename}: {error.strerror}")
        return common.NOT_FOUND if isinstance(error, FileNotFoundError) else common.REFUSED


def _show(paths: list[Path], args: argparse.Namespace) -> int:
    found: Iterator[dict[str, Any]] = filter(_wanted(args), audit.entries(paths))
    if args.limit is not None:
        found = iter(deque(found, maxlen=max(0, args.limit)))
    for entry in found:
        if args.json:
            print_json_line(entry)
        else:
            say(line_of(entry))
    return common.OK


def _wanted(args: argparse.Namespace) -> Callable[[dict[str, Any]], bool]:
    def wanted(entry: dict[str, Any]) -> bool:
        at = entry.get("at_unix_usec")
        return (
            (args.session is None or entry.get("session") == args.session)
            and (args.call is None or entry.get("call") == args.call)
            and (not args.event or entry.get("event") in args.event)
            and (not args.since or (isinstance(at, int) and at >= args.since))
        )

    return wanted


def line_of(entry: dict[str, Any]) -> str:
    """Write an entry as people read it. Whatever could move the cursor is made visible."""
    at = entry.get("at_unix_usec")
    words = [_time(at) if isinstance(at, int) else "-", str(entry.get("event", "-"))]
    words += [f"{name}={entry[name]}" for name in ("session", "call") if entry.get(name)]
    for name, value in entry.items():
        if name == "report" and isinstance(value, dict):
            words += [str(value.get("verdict", "")).replace("VERDICT_", "").lower()]
            words += [str(value.get("sentence", ""))]
        elif name not in (*_SHOWN_FIRST, *_OF_CHAIN) and value not in ("", None, [], {}):
            words.append(f"{name}={value}")
    text = " ".join(word for word in words if word)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _time(usec: int) -> str:
    try:
        at = datetime.fromtimestamp(usec / 1e6, timezone.utc).astimezone()
    except (ValueError, OverflowError, OSError):
        return str(usec)
    return at.isoformat(sep=" ", timespec="milliseconds")


def _verify(paths: list[Path], as_json: bool) -> int:
    found = audit.verify(paths)
    if as_json:
        print_json({**vars(found), "good": found.good})
        return common.OK if found.good else common.BAD
    print_fields(
        [
            ("files", str(found.files)),
            ("entries", str(found.entries)),
            ("lost", f"{found.lost} (they could not be written, and that is told)"),
            ("left out", f"{found.left_out} (of sessions with more than their share or rate)"),
            ("cut short", f"{found.torn} (by a crash, and that is told)"),
            ("problems", str(len(found.problems))),
        ]
    )
    for problem in found.problems[:PROBLEMS_SHOWN]:
        say(f"  {problem}")
    if len(found.problems) > PROBLEMS_SHOWN:
        say(f"  and {len(found.problems) - PROBLEMS_SHOWN} more")
    return common.OK if found.good else common.BAD
