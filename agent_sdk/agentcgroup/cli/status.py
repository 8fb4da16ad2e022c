"""`status`, `sessions`, `budget`, `version`: what there is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from agentcgroup import errors
from agentcgroup.admin import Admin
from agentcgroup.types import Budget, CallInfo, GpuBudget, PoolInfo, SessionInfo

from . import common
from .output import (
    cores,
    labels_text,
    number,
    print_fields,
    print_json,
    print_table,
    say,
    since,
    size,
)
from .summaries import summary

if TYPE_CHECKING:
    from agentcgroup.client import Agent


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    runs = {
        "status": run_status,
        "sessions": run_sessions,
        "budget": run_budget,
        "version": run_version,
    }
    for name, run in runs.items():
        common.command(subparsers, name, run, summary(name))


def run_status(args: argparse.Namespace) -> int:
    """Print the pool for the operator, the session for an agent.

    Returns the exit code, as every `run_` function does.
    """
    with common.either() as client:
        if isinstance(client, Admin):
            _pool_status(client, args.json)
        else:
            _session_status(client, args.json)
    return common.OK


def _pool_status(client: Admin, as_json: bool) -> None:
    pool, sessions, calls = client.pool(), client.sessions(), client.calls()
    if as_json:
        found: dict[str, Any] = {"view": "pool", "pool": pool.to_dict()}
        found["sessions"] = [session.to_dict() for session in sessions]
        found["calls"] = [call.to_dict() for call in calls]
        print_json(found)
        return
    print_fields(_pool_fields(pool))
    if sessions:
        say()
        print_sessions(sessions)
    if calls:
        say()
        print_calls(calls)


def _pool_fields(pool: PoolInfo) -> list[tuple[str, str]]:
    fields = [
        ("pool", pool.cgroup_path),
        ("memory", f"{size(pool.used_bytes)} of {size(pool.memory_max_bytes)}"),
        ("cpu", f"{cores(pool.cpu_millicores)} core{'s' * (pool.cpu_millicores != 1000)}"),
        ("sessions", f"{pool.sessions_open} open"),
        ("calls", f"{pool.calls_open} open, {pool.calls_begun} begun, {pool.calls_ended} ended"),
        ("controllers", " ".join(pool.controllers) or "none"),
    ]
    if pool.not_enforced:
        fields.append(("not enforced", " ".join(pool.not_enforced) + "  (see 'agentcg doctor')"))
    running = f"{pool.version} on kernel {pool.kernel}"
    if pool.started_unix_usec:
        running += f", up {since(pool.started_unix_usec)}"
    return [*fields, ("daemon", running)]


def _session_status(client: Agent, as_json: bool) -> None:
    session, budget, calls = client.session(), client.budget(), client.calls()
    if as_json:
        found: dict[str, Any] = {"view": "session", "session": session.to_dict()}
        found["budget"] = budget.to_dict()
        found["calls"] = [call.to_dict() for call in calls]
        print_json(found)
        return
    print_sessions([session])
    say()
    print_fields(_budget_fields(budget))
    if calls:
        say()
        print_calls(calls)


def print_sessions(sessions: Sequence[SessionInfo]) -> None:
    """Print a table of sessions."""
    headers = ["SESSION", ">PRIORITY", ">MEMORY", ">GUARANTEE", ">LIMIT"]
    has_labels = any(session.labels for session in sessions)
    headers += [">CORES", ">CALLS", ">ENDED", ">OPEN FOR", "KIND", *["LABELS"] * has_labels]
    rows = [
        [
            session.id,
            str(session.priority),
            size(session.usage.memory_current_bytes if session.usage else None),
            size(session.memory_low_bytes),
            size(session.memory_max_bytes),
            cores(session.cpu_max_millicores),
            f"{session.calls_open}/{session.calls_max}",
            str(session.calls_ended),
            since(session.opened_unix_usec),
            session.container.partition(":")[0] or ("adopted" if session.adopted else "own"),
            *([labels_text(session.labels)] if has_labels else []),
        ]
        for session in sessions
    ]
    print_table(headers, rows)


def print_calls(calls: Sequence[CallInfo]) -> None:
    """Print a table of open calls."""
    headers = ["CALL", "SESSION", "TOOL", "STATE", ">MEMORY", ">PEAK", ">LIMIT", ">PIDS", ">FOR"]
    rows = [
        [
            call.id,
            call.session_id,
            call.name,
            f"{call.state} {call.place.position}/{call.place.waiting}"
            if call.place
            else str(call.state),
            size(call.usage.memory_current_bytes if call.usage else None),
            size(call.usage.memory_peak_bytes if call.usage else None),
            size(call.grant.memory_max_bytes if call.grant else None),
            number(call.usage.pids_current if call.usage else None),
            since(call.began_unix_usec),
        ]
        for call in calls
    ]
    print_table(headers, rows)


def run_sessions(args: argparse.Namespace) -> int:
    """Print all sessions."""
    with common.admin() as client:
        sessions = client.sessions()
    if args.json:
        print_json([session.to_dict() for session in sessions])
    elif sessions:
        print_sessions(sessions)
    else:
        say("no session is open; 'agentcg session run NAME COMMAND' opens one")
    return common.OK


def _budget_fields(budget: Budget) -> list[tuple[str, str]]:
    def left(show: Callable[[int | None], str], available: int | None, limit: int | None) -> str:
        if available is None:
            kept = f"a limit of {show(limit)}, not kept on this host"
            return "no limit" if limit is None else kept
        return f"{show(available)} left of {show(limit)}"

    def gpu(g: GpuBudget) -> str:
        memory = left(size, g.memory_available_bytes, g.memory_total_bytes)
        return "lost" if g.lost else f"{g.percent_available} % and {memory}"

    memory = left(size, budget.memory_available_bytes, budget.memory_limit_bytes)
    return [
        ("memory", f"{memory}, session uses {size(budget.memory_used_bytes)}"),
        ("cores", left(cores, budget.cpu_available_millicores, budget.cpu_limit_millicores)),
        ("processes", left(number, budget.pids_available, budget.pids_limit)),
        ("calls", f"{budget.calls_open} open of {budget.calls_max}"),
        *((f"gpu {g.index}", gpu(g)) for g in budget.gpus),
        ("in short", budget.sentence),
    ]


def run_budget(args: argparse.Namespace) -> int:
    """Print what is left for the session."""
    with common.agent() as client:
        budget = client.budget()
    if args.json:
        print_json(budget.to_dict())
    else:
        print_fields(_budget_fields(budget))
    return common.OK


def run_version(args: argparse.Namespace) -> int:
    """Print versions; a daemon that is away is no error here."""
    import platform
    from importlib.metadata import version

    from agentcgroup import __version__

    daemon: str | None = None
    try:
        with common.admin() as client:
            daemon = client.pool().version
    except errors.AgentcgError:
        daemon = None  # away, or not for this user
    found: dict[str, Any] = {
        "agentcg": __version__,
        "daemon": daemon,
        "grpcio": version("grpcio"),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    if args.json:
        print_json(found)
    else:
        print_fields([(name, value or "not reachable") for name, value in found.items()])
    return common.OK
