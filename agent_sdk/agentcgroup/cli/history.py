"""`history`, `usage`, `explain`: what was, from the daemon's store."""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Sequence
from dataclasses import fields

from agentcgroup import errors
from agentcgroup.admin import Admin
from agentcgroup.queries import USAGE_BY
from agentcgroup.text import printable
from agentcgroup.types import CallState, PastSession, Report, SessionSums, Story, Usages, Verdict

from . import common
from .audit import moment
from .calls import verdict_text, whole_number
from .output import NONE, clock, duration, number, paint, print_json, print_table, say, size
from .summaries import summary

BAD = "bad"
"""Stands for all verdicts but `ok`."""
WORDS = [BAD, *(v.value for v in Verdict if v is not Verdict.UNSPECIFIED)]
GIB_HOUR = (1 << 30) * 3600


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    parser = common.command(subparsers, "history", run_history, summary("history"))
    parser.add_argument("--session", default="", metavar="NAME", help="only of this session")
    parser.add_argument(
        "--verdict",
        action="append",
        choices=WORDS,
        metavar="VERDICT",
        help=f"only calls that ended like this; {BAD}: all but ok; several times: any of them",
    )
    since = "only what ended since 10m, 2h, 1d ago, or since 2026-01-31T12:00 (local time)"
    parser.add_argument("--since", type=moment, metavar="TIME", default=0, help=since)
    parser.add_argument("--limit", type=whole_number, metavar="N", default=20, help="the newest N")
    sessions = "list sessions instead, with why they were closed and what they took (root)"
    parser.add_argument("--sessions", action="store_true", help=sessions)
    parser = common.command(subparsers, "usage", run_usage, summary("usage"))
    by = "what to sum up by; days are in UTC; a session counts for each label that it has"
    parser.add_argument("--by", choices=USAGE_BY, default="session", help=by)
    parser.add_argument("--session", default="", metavar="NAME", help="only of this session")
    since = "from the day on that was 10m, 2h, 1d ago, or that of 2026-01-31"
    parser.add_argument("--since", type=moment, metavar="TIME", default=0, help=since)
    parser.add_argument("--limit", type=whole_number, metavar="N", default=20, help="the first N")
    parser.add_argument(
        "--csv", action="store_true", help="all columns as comma-separated values, sizes in bytes"
    )
    parser = common.command(subparsers, "explain", run_explain, summary("explain"))
    parser.add_argument("call", metavar="CALL", help="the call's id")


def run_history(args: argparse.Namespace) -> int:
    """Print reports or sessions; returns the exit code, as every `run_` function."""
    if args.sessions:
        return _run_sessions(args)
    verdicts = _verdicts(args.verdict or [])
    with common.either() as client:
        since = args.since / 1e6
        if isinstance(client, Admin):
            reports = client.history(args.session, verdicts=verdicts, since=since, limit=args.limit)
        elif args.session and args.session != client.session().id:
            sentence = f"session {args.session!r} is not the one that this process is in"
            raise errors.PermissionDenied(sentence)
        else:
            reports = client.history(verdicts=verdicts, since=since, limit=args.limit)
    if args.json:
        print_json([report.to_dict() for report in reports])
    elif reports:
        print_history(reports)
    else:
        say("no call has ended that this asks for")
    return common.OK


def _verdicts(words: Sequence[str]) -> list[str]:
    """Return the words of verdicts, with `bad` spelled out."""
    if BAD not in words:
        return list(words)
    return [word for word in WORDS if word not in (BAD, "ok") or (word in words and word != BAD)]


def print_history(reports: Sequence[Report]) -> None:
    """Print a table of ended calls."""
    headers = ["ENDED", "CALL", "SESSION", "TOOL", "VERDICT", ">EXIT", ">WALL", ">PEAK", ">CPU"]
    rows = [
        [
            date(report.began_unix_usec + report.wall_usec),
            report.call_id,
            report.session_id,
            report.name,
            str(report.verdict),
            number(report.exit_code),
            duration(report.wall_usec),
            size(report.memory_peak_bytes),
            duration(report.cpu_usage_usec),
        ]
        for report in reports
    ]
    print_table(headers, rows)


def date(unix_usec: int) -> str:
    """Write the local day and time of a moment; "-" where it is not known (0)."""
    if not unix_usec:
        return NONE
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_usec / 1e6))


def _run_sessions(args: argparse.Namespace) -> int:
    with common.admin() as client:
        found = client.past_sessions(args.session, since=args.since / 1e6, limit=args.limit)
    if args.json:
        print_json([past.to_dict() for past in found])
    elif found:
        print_past_sessions(found)
    else:
        say("no session is known that this asks for")
    return common.OK


def print_past_sessions(found: Sequence[PastSession]) -> None:
    """Print a table of sessions with their sums."""
    headers = ["OPENED", "CLOSED", "SESSION", ">CALLS", ">NOT OK", ">CPU", ">GIB H", "WHY CLOSED"]
    rows = []
    for past in found:
        session, sums = past.session, past.sums
        if session is None or sums is None:
            continue
        rows.append(
            [
                date(session.opened_unix_usec),
                date(past.closed_unix_usec),
                session.id,
                number(sums.calls),
                number(sums.calls_not_ok),
                duration(sums.cpu_usage_usec),
                _gib_hours(sums.memory_byte_seconds),
                past.closed_why,
            ]
        )
    print_table(headers, rows)


def _gib_hours(byte_seconds: float | None) -> str:
    return NONE if byte_seconds is None else f"{byte_seconds / GIB_HOUR:.3g}"


def run_usage(args: argparse.Namespace) -> int:
    """Print sums over ended calls."""
    with common.admin() as client:
        since = args.since / 1e6
        found = client.usage(args.by, session_id=args.session, since=since, limit=args.limit)
    if args.json:
        print_json([each.to_dict() for each in found])
    elif args.csv:
        print_csv(args.by, found)
    elif found:
        print_usage(args.by, found)
    else:
        say("no call has ended that this asks for")
    return common.OK


def print_usage(by: str, found: Sequence[Usages]) -> None:
    """Print a table of sums. CPU in seconds, memory in GiB times hours."""
    headers = [by.upper(), ">CALLS", ">NOT OK", ">CPU S", ">GIB H", ">WALL", ">WAITED", ">PAUSED"]
    headers += [">DISKS", ">NETWORK"]
    rows = [
        [
            each.key or NONE,
            number(sums.calls),
            number(sums.calls_not_ok),
            f"{sums.cpu_usage_usec / 1e6:.1f}",
            _gib_hours(sums.memory_byte_seconds),
            duration(sums.wall_usec),
            duration(sums.waited_usec),
            duration(sums.frozen_usec),
            size(_both(sums.io_read_bytes, sums.io_write_bytes)),
            size(_both(sums.net_receive_bytes, sums.net_send_bytes)),
        ]
        for each in found
        if (sums := each.sums) is not None
    ]
    print_table(headers, rows)


def _both(a: int | None, b: int | None) -> int | None:
    return None if a is None and b is None else (a or 0) + (b or 0)


def print_csv(by: str, found: Sequence[Usages]) -> None:
    """Print sums as comma-separated values, with the names of the protocol; a field that was not
    measured is empty. What a spreadsheet would take for a formula is quoted by an apostrophe."""
    names = [field.name for field in fields(SessionSums) if field.name != "memory_peak_bytes"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([by, *names])
    for each in found:
        key = f"'{each.key}" if each.key.startswith(("=", "+", "-", "@")) else each.key
        values = [getattr(each.sums, name) for name in names]
        writer.writerow([printable(key), *("" if v is None else v for v in values)])
    say(text.getvalue(), end="")


def run_explain(args: argparse.Namespace) -> int:
    """Print the story of a call."""
    with common.either() as client:
        story = client.story(args.call)
    if args.json:
        print_json(story.to_dict())
    else:
        print_story(story)
    return common.OK


def print_story(story: Story) -> None:
    """Print for people what happened, in order, and what to try."""
    head = f"call {story.call_id}  {story.name}  (session {story.session_id})"
    report = story.report
    if report is None:
        is_over = story.state is CallState.UNSPECIFIED
        say(f"{head}: {'nobody saw how it ended' if is_over else story.state}")
    else:
        say(f"{head}: {verdict_text(report.verdict)}")
        if report.argv:
            say(f"  {' '.join(report.argv)}")
    half = (len(story.steps) + 1) // 2 if story.steps_left_out else None
    before = ""
    for place, step in enumerate(story.steps):
        if place == half:
            say(f"  ... {story.steps_left_out} more")
        day = date(step.at_unix_usec)[:10]
        if day != before and step.at_unix_usec:
            say(paint(day, "bold"))
            before = day
        at = _clock(step.at_unix_usec)
        say(f"  {at}  {step.sentence}")
    if story.advice:
        say(paint("what to know, and what to try", "bold"))
        for sentence in story.advice:
            say(f"  {sentence}")


def _clock(unix_usec: int) -> str:
    """Write the time of a moment with milliseconds."""
    if not unix_usec:
        return "when is not known"
    return f"{clock(unix_usec)}.{unix_usec // 1000 % 1000:03}"
