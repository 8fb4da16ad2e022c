"""The commands `agentcg record` and `agentcg replay`: arguments, and what they print.

Modules that need more than the standard library are imported when a command runs.
Exit status: 0 done, 1 it could not be done (the message says why), 2 bad usage; of `record` also 3
where the daemon is away, 4 where this user may not, and 5 where no such session is open.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

from agentcgroup import errors
from agentcgroup.cli import common
from agentcgroup.cli.output import complain, print_json_line, say
from agentcgroup.paths import run_dir
from agentcgroup_lab import arguments
from agentcgroup_lab.replay.backends import STRATEGIES
from agentcgroup_lab.replay.progress import MIB

EXIT_OK, EXIT_FAILED = 0, 1


def _tell(line: str) -> None:
    complain(line)


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `agentcg record`."""
    add = parser.add_argument
    add("session", metavar="SESSION", help="id of an open session")
    add(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="where to write it, e.g. run.jsonl.gz (gzipped if it ends in .gz)",
    )
    add(
        "--period",
        metavar="TIME",
        type=arguments.seconds,
        default=0.1,
        help="between two samples, 5ms to 100ms (default: 100ms)",
    )
    add(
        "--duration",
        metavar="TIME",
        type=arguments.seconds,
        help="stop after this time (default: when the session closes, or at Ctrl-C)",
    )
    add("--json", action="store_true", help="print what was written as JSON")


def run_record(args: argparse.Namespace) -> int:
    """Run `agentcg record`; returns the exit status. Raises AgentcgError."""
    from agentcgroup_lab.trace.record import RecordError, record

    with common.admin() as client:
        known = [session.id for session in client.sessions()]
    if args.session not in known:
        raise errors.NotFound(
            f"no session {args.session!r} is open; open now: {', '.join(sorted(known)) or 'none'}",
            code="NOT_FOUND",
            field="session_id",
            value=args.session,
        )
    try:
        trace = record(
            args.session,
            args.output,
            run_dir=run_dir(),
            period_s=args.period,
            duration_s=args.duration,
            say=_tell,
        )
    except (RecordError, OSError) as error:
        raise errors.AgentcgError(f"recording {args.session}: {error}") from error
    missed = trace.extra["missed_samples"]
    if args.json:
        summary = {
            "output": str(args.output),
            "session": trace.task,
            "duration_s": trace.duration_s,
            "samples": len(trace.samples),
            "missed_samples": missed,
            "calls": len(trace.calls),
            "peak_mb": trace.peak_mb,
        }
        print_json_line(summary)
    else:
        say(
            f"{args.output}: {trace.duration_s:.1f} s, {len(trace.samples)} samples "
            f"({missed} missed), {len(trace.calls)} calls, peak {trace.peak_bytes / MIB:.0f} MiB"
        )
    return EXIT_OK


def add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `agentcg replay`."""
    add = parser.add_argument
    add("traces", metavar="TRACE", nargs="+", type=Path, help="one a session")
    add(
        "--strategy",
        action=arguments.Words,
        words=STRATEGIES,
        default=("ours",),
        help="with commas, or several times; of none (no control), static (an even split), ours "
        "(this daemon); default: ours",
    )
    add(
        "--pool",
        metavar="SIZE",
        type=arguments.size,
        required=True,
        help="memory of all sessions together, e.g. 2G",
    )
    factor: dict[str, Any] = {"metavar": "FACTOR", "type": arguments.positive, "default": 1.0}
    add("--scale", help="of memory (default: 1)", **factor)
    add("--speed", help="of time (default: 1)", **factor)
    add(
        "--window",
        metavar="START-END",
        type=arguments.window,
        help="recorded seconds (default: all)",
    )
    add("--max-calls", metavar="N", type=int, help="a session; the smallest are left out")
    add(
        "--important",
        metavar="N",
        type=int,
        help="which trace is the important session, from 1",
    )
    add(
        "--plot",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="draw memory over time (.png or .svg)",
    )
    add("--json", action="store_true", help="print the result as JSON")


def run_replay(args: argparse.Namespace) -> int:
    """Run `agentcg replay`; returns the exit status: 1 also where something was left behind. Raises
    AgentcgError where it could not be done, ModuleNotFoundError where the extra `lab` is not
    installed."""
    from agentcgroup_lab.replay import engine, result
    from agentcgroup_lab.replay.backends import ReplayError
    from agentcgroup_lab.trace import format as trace_format
    from agentcgroup_lab.trace import plan
    from agentcgroupd.errors import AgentcgroupdError

    if args.plot:
        importlib.import_module("matplotlib")  # what is missing is told before the work, not after
    try:
        options = plan.Options(
            memory_scale=args.scale,
            speed=args.speed,
            window_s=args.window,
            max_calls=args.max_calls,
            cpu_max_pct=100.0 * (os.cpu_count() or 1),
        )
        if args.important is not None and not 1 <= args.important <= len(args.traces):
            raise ValueError(f"--important is {args.important}; allowed: 1 to {len(args.traces)}")
        specs = [
            engine.SessionSpec(
                id=f"s{number}",
                recording=path.name.removesuffix(".gz").removesuffix(".jsonl"),
                plan=plan.make_plan(trace_format.read(path), options),
                important=number == args.important,
            )
            for number, path in enumerate(args.traces, 1)
        ]
        how = engine.EngineOptions(memory_scale=args.scale)
        strategies = [
            engine.run_strategy(strategy, specs, args.pool, how, say=_tell)
            for strategy in args.strategy
        ]
    except (ReplayError, AgentcgroupdError, ValueError, OSError) as error:
        raise errors.AgentcgError(f"replay: {error}") from error
    kernel = os.uname().release
    replayed = result.ReplayResult(kernel, "here", args.scale, args.speed, tuple(strategies))
    if args.plot:
        from agentcgroup_lab.replay.plot import save

        save(replayed, args.plot)
    if args.json:
        print_json_line(replayed.to_json())
    else:
        say(result.table(strategies))
    return EXIT_FAILED if any(strategy.leaks for strategy in strategies) else EXIT_OK
