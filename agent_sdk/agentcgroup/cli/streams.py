"""`feedback` and `events`: what the daemon has to say."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from agentcgroup import errors
from agentcgroup.admin import Admin
from agentcgroup.types import Event, Feedback

from . import common
from .calls import verdict_text
from .output import clock, duration, paint, print_json_line, say
from .summaries import summary

if TYPE_CHECKING:
    from agentcgroup.streams import Stream


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    parser = common.command(subparsers, "feedback", run_feedback, summary("feedback"))
    parser.add_argument("--call", metavar="CALL", help="only about this call")
    parser.add_argument("--follow", action="store_true", help="wait for more, until interrupted")
    parser = common.command(subparsers, "events", run_events, summary("events"))
    parser.add_argument("--session", default="", metavar="ID", help="only of this session")
    parser.add_argument("--follow", action="store_true", help="wait for more, until interrupted")


def run_feedback(args: argparse.Namespace) -> int:
    """Print feedback of recent reports, or as it happens; returns the exit code."""
    with common.either() as client:
        if args.follow and isinstance(client, Admin):
            events = client.events()
            items: Iterable[Feedback] = (e.feedback for e in events if e.feedback is not None)
        elif args.follow and not isinstance(client, Admin):
            items = client.feedback(args.call)
        else:
            reports = client.reports()[::-1] if not args.call else [client.report(args.call)]
            items = [item for report in reports for item in report.feedback]
        shown = 0
        for item in items:
            if args.call and item.call_id != args.call:
                continue
            shown += 1
            if args.json:
                print_json_line(item.to_dict())
            else:
                say(feedback_line(item), flush=True)
    if not shown and not args.json:
        say("there is no feedback about calls that have ended; --follow waits for more")
    return common.OK


def feedback_line(item: Feedback) -> str:
    """Write feedback as one line."""
    who = item.call_id or item.session_id
    return f"{clock(item.at_unix_usec)}  {who}  {paint(str(item.code), 'yellow')}: {item.sentence}"


def run_events(args: argparse.Namespace) -> int:
    """Print recent ends of calls, or everything as it happens; returns the exit code."""
    with common.admin() as client:
        if args.follow:
            events: Stream[Event] | list[Event] = client.events(args.session)
        else:
            reports = client.reports(session_id=args.session)
            events = [Event(ended=report) for report in reversed(reports)]
        for event in events:
            if args.json:
                print_json_line(event.to_dict())
            else:
                say(event_line(event), flush=True)
    if not events and not args.json:
        say("no call has ended yet; --follow shows what happens from now on")
    return common.OK


def event_line(event: Event) -> str:
    """Write an event as one line."""
    if event.begun is not None:
        call = event.begun
        return f"{clock(call.began_unix_usec)}  {call.session_id}/{call.id}  begun: {call.name}"
    if event.ended is not None:
        report = event.ended
        at = clock(report.began_unix_usec + report.wall_usec)
        return (
            f"{at}  {report.session_id}/{report.call_id}  ended after "
            f"{duration(report.wall_usec)}: {verdict_text(report.verdict)}: {report.sentence}"
        )
    if event.feedback is not None:
        return feedback_line(event.feedback)
    now = clock(int(time.time() * 1e6))
    if event.session_opened is not None:
        return f"{now}  {event.session_opened.id}  session opened"
    if event.session_changed is not None:
        return f"{now}  {event.session_changed.id}  limits changed"
    if event.session_closed is not None:
        return f"{now}  {event.session_closed.id}  session closed"
    raise errors.AgentcgError("the daemon sent an event of a kind that this version does not know")
