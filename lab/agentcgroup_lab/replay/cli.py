"""The commands `agentcg record` and `agentcg replay`: arguments, and what they print.

Only the standard library is imported with this module; the rest when a command runs.
Exit status: 0 done, 1 it could not be done (the message says why), 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

EXIT_OK, EXIT_FAILED = 0, 1
_STRATEGIES = ("none", "static", "ours")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_TIME_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def _seconds(text: str) -> float:
    number = text.rstrip("hms")
    factor = _TIME_UNITS_S.get(text[len(number) :], -1.0)
    try:
        value = float(number) * factor
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a time such as 50ms, 30s or 10m")
    return value


def _bytes(text: str) -> int:
    from agentcgroupd.errors import InvalidField
    from agentcgroupd.units import parse_bytes

    try:
        return int(parse_bytes("pool", text))
    except InvalidField as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number above 0")
    return value


def _window(text: str) -> tuple[float, float]:
    start, separator, end = text.partition("-")
    try:
        window = float(start), float(end)
    except ValueError:
        window = 1.0, 0.0
    if not separator or not 0 <= window[0] < window[1]:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: START-END in seconds, as 30-90")
    return window


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `agentcg record`."""
    parser.add_argument("session", metavar="SESSION", help="id of an open session")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True,
        help="where to write it, e.g. run.jsonl.gz (gzipped if it ends in .gz)",
    )  # fmt: skip
    parser.add_argument(
        "--period", metavar="TIME", type=_seconds, default=0.1,
        help="between two samples, 5ms to 100ms (default: 100ms)",
    )  # fmt: skip
    parser.add_argument(
        "--duration", metavar="TIME", type=_seconds,
        help="stop after this time (default: when the session closes, or at Ctrl-C)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run_record(args: argparse.Namespace) -> int:
    """`agentcg record`; returns the exit status."""
    from agentcgroup_lab.trace.record import RecordError, record

    run_dir = os.environ.get("AGENTCG_RUN_DIR") or "/run/agentcgroup"
    try:
        trace = record(
            args.session,
            args.output,
            run_dir=run_dir,
            period_s=args.period,
            duration_s=args.duration,
            say=_say,
        )
    except (RecordError, OSError) as error:
        _say(f"agentcg record: {error}")
        return EXIT_FAILED
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
        print(json.dumps(summary))
    else:
        print(
            f"{args.output}: {trace.duration_s:.1f} s, {len(trace.samples)} samples "
            f"({missed} missed), {len(trace.calls)} calls, peak {trace.peak_mb:.0f} MB"
        )
    return EXIT_OK


def add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `agentcg replay`."""
    parser.add_argument("traces", metavar="TRACE", nargs="+", type=Path, help="one a session")
    parser.add_argument(
        "--strategy", action="append", choices=_STRATEGIES,
        help="may be repeated (default: ours): no control, an even static split, or this daemon",
    )  # fmt: skip
    parser.add_argument(
        "--pool", metavar="SIZE", type=_bytes, required=True,
        help="memory of all sessions together, e.g. 2G",
    )  # fmt: skip
    parser.add_argument(
        "--scale", metavar="FACTOR", type=_positive, default=1.0, help="of memory (default: 1)"
    )
    parser.add_argument(
        "--speed", metavar="FACTOR", type=_positive, default=1.0, help="of time (default: 1)"
    )
    parser.add_argument(
        "--window", metavar="START-END", type=_window, help="recorded seconds (default: all)"
    )
    parser.add_argument(
        "--max-calls", metavar="N", type=int, help="a session; the smallest are left out"
    )
    parser.add_argument(
        "--important", metavar="N", type=int, help="which trace is the important session, from 1"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, action="append", default=[],
                        help="draw memory over time (.png or .svg)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run_replay(args: argparse.Namespace) -> int:
    """`agentcg replay`; returns the exit status: 1 also where something was left behind."""
    from agentcgroup_lab.replay import engine, result
    from agentcgroup_lab.replay.backends import ReplayError
    from agentcgroup_lab.trace import format as trace_format
    from agentcgroup_lab.trace import plan
    from agentcgroupd.errors import AgentcgroupdError

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
            engine.run_strategy(strategy, specs, args.pool, how, say=_say)
            for strategy in args.strategy or ["ours"]
        ]
    except (ReplayError, AgentcgroupdError, ValueError, OSError) as error:
        _say(f"agentcg replay: {error}")
        return EXIT_FAILED
    kernel = os.uname().release
    replayed = result.ReplayResult(kernel, "here", args.scale, args.speed, tuple(strategies))
    if args.plot:
        from agentcgroup_lab.replay.plot import save

        save(replayed, args.plot)
    print(json.dumps(replayed.to_json()) if args.json else result.table(strategies))
    return EXIT_FAILED if any(strategy.leaks for strategy in strategies) else EXIT_OK
