"""`timeline`: a session's calls over time, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from agentcgroup.admin import Admin
from agentcgroup.errors import CallNotFound
from agentcgroup.types import Story

from . import common
from .audit import moment
from .calls import whole_number
from .output import print_json, say
from .picture import page, row_of, svg
from .summaries import summary

CALLS_MOST = 200
KINDS = (".svg", ".html")


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's command."""
    parser = common.command(subparsers, "timeline", run_timeline, summary("timeline"))
    parser.add_argument("session", metavar="SESSION", help="its name, open or closed")
    parser.add_argument(
        "--out", type=_file, required=True, metavar="FILE", help="NAME.svg or NAME.html"
    )
    since = "only calls that ended since 10m, 2h, 1d ago, or since 2026-01-31T12:00 (local time)"
    parser.add_argument("--since", type=moment, metavar="TIME", default=0, help=since)
    parser.add_argument(
        "--limit",
        type=whole_number,
        metavar="N",
        default=CALLS_MOST,
        help=f"the newest N calls (default: {CALLS_MOST})",
    )


def _file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(KINDS)}")
    return path


def run_timeline(args: argparse.Namespace) -> int:
    """Draw the picture; returns the exit code.

    Raises:
        CallNotFound: no call of that session is known to have ended.
        OSError: the file cannot be written.
    """
    with common.admin() as admin:
        reports = admin.history(args.session, since=args.since / 1e6, limit=args.limit)
        if not reports:
            raise CallNotFound(f"no call of session {args.session!r} is known to have ended")
        rows = [row_of(report, _story(admin, report.call_id)) for report in reports]
        past = admin.past_sessions(args.session, limit=1)
    session = past[0].session if past else None
    picture = svg(args.session, rows, session.memory_max_bytes if session is not None else None)
    is_page = args.out.suffix == ".html"
    args.out.write_text(page(args.session, picture) if is_page else picture, encoding="utf-8")
    if args.json:
        print_json({"file": str(args.out), "calls": len(rows)})
    else:
        say(f"{args.out}: {len(rows)} calls of session {args.session}")
    return common.OK


def _story(admin: Admin, call_id: str) -> Story | None:
    """Return what happened to a call; None where that is not known any more."""
    try:
        return admin.story(call_id)
    except CallNotFound:
        return None
