"""`calls`, `end`, `report`, or `call list`, `call end`, `call report`: open and ended calls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from agentcgroup import errors
from agentcgroup.admin import Admin
from agentcgroup.client import Agent
from agentcgroup.types import CpuNumbers, Delays, GpuUsage, NetUsage, Report, Verdict

from . import common
from .output import duration, number, paint, print_fields, print_json, print_table, say, size
from .parser import Parser
from .status import print_calls
from .summaries import ALIASES, summary


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    text = summary("calls")
    _add_calls(common.command(subparsers, "calls", run_calls, text, aliases=ALIASES["calls"]))
    _add_end(common.command(subparsers, "end", run_end, summary("end")))
    _add_report(common.command(subparsers, "report", run_report, summary("report")))
    group = common.group(subparsers, "call", summary("call"))
    _add_calls(common.command(group, "list", run_calls, text))
    _add_end(common.command(group, "end", run_end, summary("end")))
    _add_report(common.command(group, "report", run_report, summary("report")))


def _add_calls(parser: Parser) -> None:
    parser.add_argument("--session", default="", metavar="ID", help="only of this session (root)")


def _add_end(parser: Parser) -> None:
    parser.add_argument("call", metavar="CALL", help="the call's id")
    detach = "leave its processes alone; the call ends when the last one has"
    parser.add_argument("--detach", action="store_true", help=detach)


def _add_report(parser: Parser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("call", nargs="?", metavar="CALL", help="the call's id; else the newest")
    which.add_argument("--last", action="store_true", help="the newest (as without CALL)")
    which.add_argument("--limit", type=whole_number, metavar="N", help="a table of the newest N")
    session = "only of this session, closed or open (root)"
    parser.add_argument("--session", default="", metavar="NAME", help=session)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 unless the verdict is 'ok'"
    )


def whole_number(text: str) -> int:
    """Read a number from the command line; argparse shows the error.

    Raises:
        argparse.ArgumentTypeError: it is not a whole number, 1 or more.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def run_calls(args: argparse.Namespace) -> int:
    """Print the open calls; returns the exit code, as every `run_` function."""
    with common.either() as client:
        if isinstance(client, Admin):
            calls = client.calls(args.session)
        else:
            if args.session:
                _check_own(client.session().id, args.session)
            calls = client.calls()
    if args.json:
        print_json([call.to_dict() for call in calls])
    elif calls:
        print_calls(calls)
    else:
        say("no call is open")
    return common.OK


def _check_own(own: str, asked: str) -> None:
    """Refuse to show a session of others. Raises PermissionDenied."""
    if asked != own:
        raise errors.PermissionDenied(
            f"only the operator sees calls of session {asked!r}: this process is in session {own}",
            field="session",
            value=asked,
            allowed=own,
        )


def run_end(args: argparse.Namespace) -> int:
    """End a call and print its report."""
    with common.either() as client:
        report = client.end_call(args.call, detach=args.detach)
    if args.json:
        print_json(report.to_dict())
    elif args.detach:
        say(f"call {args.call} ends when its last process has")
    else:
        print_report(report)
    return common.OK


def run_report(args: argparse.Namespace) -> int:
    """Print the report of one call, or a table of the newest."""
    if args.call and args.session:
        say("agentcg: a call's id and --session are not asked for together", file=sys.stderr)
        return common.USAGE
    with common.either() as client:
        if args.limit or args.session:
            reports = newest_of(client, args.session, args.limit or 1)
        else:
            reports = [client.report(args.call)]
    if args.json:
        dicts = [report.to_dict() for report in reports]
        print_json(dicts if args.limit else dicts[0])
    elif args.limit:
        print_reports(reports)
    else:
        print_report(reports[0])
    bad = any(report.verdict is not Verdict.OK for report in reports)
    return common.BAD if args.check and bad else common.OK


def newest_of(client: Admin | Agent, session: str, limit: int) -> list[Report]:
    """Return the newest reports of a session, open or closed; of all for no name.

    Raises:
        CallNotFound: a session was named, and no call of it is known to have ended.
        PermissionDenied: this is not the operator, and it is another session.
    """
    if isinstance(client, Admin):
        reports = client.reports(limit, session)
    elif session in ("", client.session().id):
        reports = client.reports(limit)
    else:
        raise errors.PermissionDenied(f"session {session!r} is not the one that this process is in")
    if session and not reports:
        raise errors.CallNotFound(f"there is no report of a call of session {session!r}")
    return reports


def verdict_text(verdict: Verdict) -> str:
    """Return a verdict in its colour."""
    return paint(str(verdict), "green" if verdict is Verdict.OK else "red")


def print_report(report: Report) -> None:
    """Print a report for people; what was not measured is left out."""
    limit = report.grant.memory_max_bytes if report.grant is not None else None
    peak = size(report.memory_peak_bytes) + (f" of {size(limit)}" if limit else "")
    user, system = duration(report.cpu_user_usec), duration(report.cpu_system_usec)
    cpu_time = f"{duration(report.cpu_usage_usec)} (user {user}, system {system})"
    fields = [
        ("call", f"{report.call_id}  {report.name}  (session {report.session_id})"),
        ("command", " ".join(report.argv)),
        ("verdict", f"{verdict_text(report.verdict)}: {report.sentence}"),
        ("evidence", str(report.evidence)),
        ("exit status", number(report.exit_code)),
        ("signal", number(report.term_signal)),
        ("wall time", duration(report.wall_usec)),
        ("memory peak", peak),
        ("cpu time", cpu_time),
        ("cpu throttled", duration(report.cpu_throttled_usec)),
        ("cpu waited", cpu_text(report.cpu)),
        ("memory throttled", duration(report.memory_throttled_usec)),
        ("frozen", duration(report.frozen_usec) if report.frozen_usec else "-"),
        ("processes peak", number(report.pids_peak)),
        ("read", size(report.io_read_bytes)),
        ("written", size(report.io_write_bytes)),
        ("waited for", delays_text(report.delays)),
        ("network", net_text(report.net)),
        ("oom kills", number(report.oom_kills or None)),
    ]
    if report.gpu is not None:
        fields += _gpu_fields(report.gpu)
    print_fields([(name, value) for name, value in fields if value not in ("", "-")])
    for item in report.feedback:
        say(f"{paint('feedback', 'yellow')}: {item.code}: {item.sentence}")
    for step in () if report.try_next is None else report.try_next.steps:
        say(f"{paint('try next', 'yellow')}: {step}")


def delays_text(delays: Delays | None) -> str:
    """Say what a call waited for, in wall time; `-` where the kernel does not tell, or nothing."""
    if delays is None:
        return "-"
    waits = (
        ("disks", delays.io_usec),
        ("memory", delays.memory_usec),
        ("a CPU", delays.cpu_usec),
    )
    return ", ".join(f"{what} {duration(usec)}" for what, usec in waits if usec) or "-"


def net_text(net: NetUsage | None) -> str:
    """Say what a call received and sent; `-` where nothing counted it, or it was nothing."""
    if net is None or not (net.receive_packets or net.send_packets):
        return "-"
    return (
        f"{size(net.receive_bytes)} received ({net.receive_packets} packets), "
        f"{size(net.send_bytes)} sent ({net.send_packets})"
        + (f", {net.refused_packets} packets held to net_send_max" if net.refused_packets else "")
    )


def _gpu_fields(gpu: GpuUsage) -> list[tuple[str, str]]:
    busy = "-" if gpu.sm_percent is None else f"{gpu.sm_percent:.1f} %"
    energy = "-" if gpu.energy_mj is None else f"{gpu.energy_mj / 1e3:.4g} J"
    return [
        ("gpu memory peak", f"{size(gpu.memory_peak_bytes)} (held by {gpu.memory_held_by})"),
        ("gpu busy", f"{busy} (share held by {gpu.share_held_by})"),
        ("gpu energy", energy),
        ("gpu turns", duration(gpu.held_back_usec) if gpu.held_back_usec else "-"),
        ("gpu refused", number(gpu.refused or None)),
    ]


def cpu_text(cpu: CpuNumbers | None) -> str:
    """Say what the project's CPU scheduler did to a call; `-` where it does not run."""
    if cpu is None:
        return "-"
    longest = duration(cpu.wait_max_usec)
    waited = f"{duration(cpu.wait_usec)} (at most {longest} at a time) for {cpu.slices} slices"
    parts = [waited]
    if cpu.boosts:
        parts.append(f"ahead of others {cpu.boosts} times for {duration(cpu.boosted_usec)}")
    if cpu.penalties:
        parts.append(f"held back for its memory {duration(cpu.penalty_usec)}")
    if cpu.stalls:
        parts.append(f"out of cpu.max {duration(cpu.stalled_usec)}")
    return ", ".join(parts)


def print_reports(reports: Sequence[Report]) -> None:
    """Print a table of reports."""
    headers = ["CALL", "SESSION", "TOOL", "VERDICT", ">EXIT", ">WALL", ">PEAK", ">CPU"]
    rows = [
        [
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
