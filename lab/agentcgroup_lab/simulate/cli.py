"""`agentcg policy simulate`: arguments, and what it prints.

Modules that need more than the standard library are imported when the command runs.
Exit status: 0 done, 1 it could not be done (the message says why), 2 bad usage.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentcgroup.cli.output import print_json_line, say
from agentcgroup.errors import AgentcgError
from agentcgroup.text import printable
from agentcgroup_lab import arguments
from agentcgroup_lab.simulate.types import STRATEGIES

if TYPE_CHECKING:
    from agentcgroup_lab.simulate.plans import Profile
    from agentcgroup_lab.simulate.run import Result, Setup
    from agentcgroupd.policy.schema import Policy

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
SWEEP = (0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
"""Multiples of --sessions that are simulated."""
_PROGRESS_S = 1.0


def _ratio(text: str) -> float | None:
    if text == "off":
        return None
    value = arguments.number(text)
    if not 1.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: off, or a ratio from 1 to 100")
    return value


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `agentcg policy simulate`."""
    add = parser.add_argument
    add(
        "--trace",
        metavar="PATH",
        type=Path,
        action="append",
        required=True,
        help="a recording, or a folder of them; may be repeated",
    )
    add("--pool", metavar="SIZE", type=arguments.size, required=True, help="e.g. 64G")
    add("--sessions", metavar="N", type=arguments.count, required=True, help="at the same time")
    add(
        "--policy",
        metavar="FILE",
        default="default",
        help="a TOML file, or the name of a policy that came with the daemon",
    )
    add(
        "--strategy",
        action=arguments.Words,
        words=STRATEGIES,
        default=("ours",),
        help="with commas, or several times; of ours, none (the kernel's OOM killer), static (an "
        "even split), reserve (everyone's peak); default: ours",
    )
    add(
        "--zram",
        metavar="RATIO",
        type=_ratio,
        default=None,
        help="swap in compressed memory, so many bytes in one; default: off",
    )
    add(
        "--cold",
        metavar="SHARE",
        type=arguments.share,
        default=0.8,
        help="of an agent's memory, what it does not touch when it wakes up; default: 0.8",
    )
    add(
        "--rise",
        metavar="SIZE",
        type=arguments.size,
        help="a second: how fast a call rises to a recorded level at least; default: evenly, as in "
        "a replay",
    )
    add("--no-signals", action="store_true", help="the guard has its timer only")
    add("--deny", action="store_true", help="the kernel lets growth be denied")
    add(
        "--duration",
        metavar="TIME",
        type=arguments.seconds,
        default=600.0,
        help="of the simulation; a recording that ends is followed by another (default: 10m)",
    )
    add(
        "--spread",
        metavar="SHARE",
        type=arguments.share,
        default=1.0,
        help="each begins at a random point in this part of its recording (default: 1)",
    )
    add("--important", metavar="SHARE", type=arguments.share, default=0.1, help="default: 0.1")
    add("--scale", metavar="FACTOR", type=float, default=1.0, help="of memory (default: 1)")
    add("--seed", metavar="N", type=int, default=0)
    add(
        "--sweep",
        action="store_true",
        help="for several numbers of sessions, 0.4 to 1.5 times --sessions",
    )
    add(
        "--out",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="draw survival, delay and use against the number of sessions (.png or .svg)",
    )
    if not any("--json" in action.option_strings for action in parser._actions):
        add("--json", action="store_true", help="print the results as JSON")


def run_simulate(args: argparse.Namespace) -> int:
    """Run `agentcg policy simulate`; returns the exit status. Raises AgentcgError where it could
    not be done, ModuleNotFoundError where the extra `lab` is not installed."""
    from agentcgroup_lab.simulate.report import table
    from agentcgroup_lab.trace.format import TraceError
    from agentcgroupd.errors import AgentcgroupdError

    if args.out:
        importlib.import_module("matplotlib")  # what is missing is told before the work, not after
    try:
        policy, profiles = _inputs(args)
        results = list(_run(args, policy, profiles))
        if args.out:
            from agentcgroup_lab.simulate.plot import save

            save(results, profiles, args.out)
    except (AgentcgroupdError, TraceError, ValueError, OSError) as error:
        raise AgentcgError(f"simulate: {error}") from error
    if args.json:
        print_json_line([result.to_json() for result in results])
    else:
        say(table(results, profiles))
    return EXIT_OK


def _inputs(args: argparse.Namespace) -> tuple[Policy, list[Profile]]:
    from agentcgroup_lab.simulate.plans import find_recordings, load_profiles
    from agentcgroup_lab.trace.plan import Options
    from agentcgroupd.policy.load import load_policy

    policy = load_policy(Path(args.policy), None, args.pool).policy
    options = Options(memory_scale=args.scale, cpu_max_pct=100.0 * (os.cpu_count() or 1))
    return policy, load_profiles(find_recordings(args.trace), options, args.rise)


def _setup(args: argparse.Namespace, strategy: Any, sessions: int) -> Setup:
    from agentcgroup_lab.simulate.guard import Sampling
    from agentcgroup_lab.simulate.run import Setup
    from agentcgroup_lab.simulate.types import KernelModel

    return Setup(
        pool_bytes=args.pool,
        sessions=sessions,
        seed=args.seed,
        strategy=strategy,
        duration_s=args.duration,
        spread=args.spread,
        important_share=args.important,
        kernel=KernelModel(zram_ratio=args.zram, cold_share=args.cold),
        sampling=Sampling(signals=not args.no_signals),
        can_deny=args.deny,
    )


def _run(args: argparse.Namespace, policy: Policy, profiles: Sequence[Profile]) -> Iterator[Result]:
    from agentcgroup_lab.simulate.run import simulate

    shares = SWEEP if args.sweep else (1.0,)
    counts = sorted({max(1, round(args.sessions * share)) for share in shares})
    for strategy in args.strategy:
        for sessions in counts:
            name = f"{strategy}, {sessions} sessions"
            progress = _Progress(name, args.duration)
            yield simulate(policy, profiles, _setup(args, strategy, sessions), progress)
            progress.done()


class _Progress:
    """A line on a terminal, rewritten at most once a second."""

    def __init__(self, name: str, duration_s: float) -> None:
        self._name, self._duration_s = name, duration_s
        self._next = time.monotonic() + _PROGRESS_S
        self._shown = False

    def __call__(self, at_s: float) -> None:
        now = time.monotonic()
        if now >= self._next and sys.stderr.isatty():
            self._next = now + _PROGRESS_S
            self._shown = True
            print(
                f"\r{printable(self._name)}: {at_s:.0f} of {self._duration_s:.0f} s ",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def done(self) -> None:
        """Remove the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
