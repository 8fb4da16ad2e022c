"""Benchmark `isolation`: recorded agents on pools that are too small for them.

Each mix is one important session and some others, replayed as real processes under every strategy
on a pool that their demand exceeds by a given ratio. A group - one mix at one ratio - runs the
important session alone on the same pool and then every strategy, one after the other, so that what
is compared ran side by side. Memory and time are scaled to what this machine can do; the scales are
in the result. No swap is used.

Where this machine has no cgroup controllers the runs take place in the test guest, at a small
scale. Groups may run in several lanes at once; one run lasts `--length` seconds and a little more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentcgroup_lab.replay import result
from agentcgroup_lab.replay.backends import STRATEGIES, ReplayError
from agentcgroup_lab.trace import format as trace_format
from agentcgroupd.errors import AgentcgroupdError
from bench.isolation.machine import EMULATED, Speed, measure
from bench.isolation.mixes import Mix, Settings, folders, headers, make_mix
from bench.isolation.oomd import find_oomd
from bench.isolation.oomd_package import ensure as ensure_oomd
from bench.isolation.report import TARGET_RATIO, cells, table, targets, totals
from bench.isolation.runs import Group, Run, run_group, say
from bench.report import RESULTS, ROOT, BenchReport
from tests.guest.where import decide
from tools.debian_suites import SuiteError

ALL = ("none", "static", "high", "oomd", "ours")
RATIOS = (1.1, 1.5, 2.0, 3.0)
LENGTH_S = 24.0 if EMULATED else 10.0
REPEATS = 1 if EMULATED else 5
SESSIONS_MAX = 7 if EMULATED else 12
KEPT_MIXES = 2
"""Number of mixes whose first runs at the target ratio are kept whole, for pictures."""
GUEST_MIB, GUEST_TIMEOUT_S = 2048, 6 * 3600

Found = tuple[Run, result.StrategyResult]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""

    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    def ratios(text: str) -> tuple[float, ...]:
        values = tuple(float(word) for word in text.split(","))
        if min(values) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: numbers above 0")
        return values

    parser = argparse.ArgumentParser(
        prog="python -m bench.isolation.benchmark", description=__doc__
    )
    add = parser.add_argument
    add("--mixes", type=int, default=8, help="how many (default: 8)")
    add("--ratios", type=ratios, default=RATIOS, help="demand over pool")
    add("--strategies", type=words, default=ALL, help=f"of {','.join(ALL)}")
    add("--repeat", type=int, default=REPEATS, help="of each group")
    length_help = "of a recorded minute when replayed"
    add("--length", type=float, default=LENGTH_S, metavar="S", help=length_help)
    add("--lanes", type=int, default=1, help="groups at once (default: 1)")
    add("--sessions", type=int, default=SESSIONS_MAX, help="of a mix, at most")
    add("--minutes", type=float, help="begin no group after so many")
    resume_help = "with the settings and groups of last time, add the rest"
    add("--resume", action="store_true", help=resume_help)
    add("--no-plot", action="store_true", help="draw nothing")
    args = parser.parse_args(argv)
    if unknown := set(args.strategies) - set(ALL) - set(STRATEGIES):
        parser.error(f"--strategies: {', '.join(unknown)}; allowed: {', '.join(ALL)}")
    if min(args.mixes, args.repeat, args.lanes, args.sessions - 1) < 1 or args.length <= 0:
        parser.error("--mixes, --repeat, --lanes and --length are above 0, --sessions above 1")
    return args


class Journal:
    """File of all runs so far, one JSON object a line; the first line holds the settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings: Settings | None = None
        self.runs: list[Run] = []

    def read(self) -> None:
        """Read what an earlier time left, if anything."""
        if not self.path.exists():
            return
        first, *rest = self.path.read_text(encoding="utf-8").splitlines()
        told = json.loads(first)
        self.settings = Settings(**{**told, "speed": Speed(**told["speed"])})
        self._take([Run.from_json(json.loads(line)) for line in rest])

    def _take(self, runs: Sequence[Run]) -> None:
        """A group that was run again, with more strategies, takes the place of what it had."""
        known = {(run.mix, run.ratio, run.repeat, run.strategy): run for run in self.runs}
        known.update({(run.mix, run.ratio, run.repeat, run.strategy): run for run in runs})
        self.runs = list(known.values())

    def begin(self, settings: Settings) -> None:
        """Start anew, with these settings."""
        self.settings = settings
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for old in self.path.parent.glob("mix*"):
            old.unlink()
        self.path.write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")

    def add(self, runs: Sequence[Run]) -> None:
        """Append the runs of a whole group."""
        self._take(runs)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(run.to_json()) + "\n" for run in runs))

    def has(self, group: Group) -> bool:
        """Return whether every run of this group is here."""
        done = {
            run.strategy
            for run in self.runs
            if (run.mix, run.ratio, run.repeat) == (group.mix, group.ratio, group.repeat)
        }
        return done >= set(group.order)


def groups(args: argparse.Namespace, mixes: Sequence[Mix]) -> Iterator[Group]:
    """Yield what to run: repeats outermost and the target ratio first, so that whatever is cut off,
    what has been run is as even as can be."""
    number = 0
    ratios = sorted(args.ratios, key=lambda ratio: (ratio != TARGET_RATIO, ratio))
    for repeat in range(args.repeat):
        for ratio in ratios:
            for mix in mixes:
                if mix.feasible(ratio):
                    yield Group(number, mix.number, ratio, repeat, tuple(args.strategies))
                    number += 1


def run_groups(
    todo: Sequence[Group], settings: Settings, minutes: float | None
) -> Iterator[list[Found]]:
    """Run them here, in as many lanes as the settings say."""
    known = headers(folders())
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    if settings.lanes == 1:
        for group in todo:
            if time.monotonic() > until:
                return
            yield run_group(group, known, settings)
        return
    # A process a lane: a run's cgroups are named by the process that made them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.lanes, mp_context=context) as lanes:
        futures = [lanes.submit(run_group, group, known, settings) for group in todo]
        try:
            for future in as_completed(futures):
                if not future.cancelled():
                    yield future.result()
                if time.monotonic() > until:
                    for other in futures:
                        other.cancel()
        finally:
            lanes.shutdown(cancel_futures=True)


def keep(found: Sequence[Found], mix: Mix, directory: Path) -> None:
    """Write whole results of one group, for a picture of memory over time."""
    order = [name for name in ALL for run, _ in found if run.strategy == name]
    by_name = {run.strategy: whole for run, whole in found}
    result.ReplayResult(
        kernel=os.uname().release,
        where="emulated guest" if EMULATED else "native",
        memory_scale=mix.options.memory_scale,
        speed=mix.options.speed,
        strategies=tuple(by_name[name] for name in order),
    ).write(directory / f"mix{mix.number}.json")


def swap_is_on() -> bool:
    """Return whether any swap is in use here."""
    return len(Path("/proc/swaps").read_text(encoding="ascii").splitlines()) > 1


def summarize(
    runs: Sequence[Run], mixes: Sequence[Mix], settings: Settings, asked: Sequence[float]
) -> BenchReport:
    """Make the report; of the ratios asked for, what no strategy could do is named, not counted."""
    tried = sorted({*asked, *(run.ratio for run in runs)})
    infeasible = [
        {"mix": mix.number, "ratio": ratio, "ratio_max": round(mix.ratio_max, 3)}
        for mix in mixes
        for ratio in tried
        if not mix.feasible(ratio)
    ]
    details: dict[str, Any] = {
        "swap": "on" if swap_is_on() else "off",
        "settings": asdict(settings),
        "recordings": sorted({name for mix in mixes for name in mix.names}),
        "mixes": [mix.to_json() for mix in mixes],
        "infeasible": infeasible,
        "totals": totals(runs),
        "cells": cells(runs),
        "runs": [run.to_json() for run in runs],
    }
    at_target = sum(run.strategy == "ours" and run.ratio == TARGET_RATIO for run in runs)
    repeats = len({(run.mix, run.ratio, run.repeat) for run in runs})
    where = "guest" if EMULATED else "host"
    return BenchReport("isolation", where, at_target or repeats, targets(runs, EMULATED), details)


def show(report: BenchReport, mixes: Sequence[Mix]) -> None:
    """Print what was run, both tables, and the targets."""
    for mix in mixes:
        told = mix.to_json()
        names = [session["recording"] for session in told["sessions"]]
        print(
            f"mix {mix.number}: {names[0]} (important) with {', '.join(names[1:])}; memory "
            f"x{mix.options.memory_scale:g}, time x{mix.options.speed:.3g}; demand "
            f"{mix.demand_bytes / 1e6:.0f} MB, at most {mix.ratio_max:.2f} times a pool"
        )
    print("\n" + table(report.details["cells"]))
    print("\n" + table(report.details["totals"]))
    for one in report.details["infeasible"]:
        print(
            f"infeasible: mix {one['mix']} at {one['ratio']:g}: what its agents hold and its "
            f"largest call fit at {one['ratio_max']:.2f} at most, whatever is decided"
        )
    if report.details["swap"] == "on":
        print("swap is ON: what survived may have survived because of it")
    if report.targets:
        report.show()


def run_here(args: argparse.Namespace) -> int:
    """Run on this machine; returns the exit status."""
    journal = Journal(RESULTS / "isolation/runs.jsonl")
    if args.resume:
        journal.read()
    settings = journal.settings or Settings(
        length_s=args.length,
        speed=measure(),
        cpus=os.cpu_count() or 1,
        emulated=EMULATED,
        lanes=args.lanes,
        sessions_max=args.sessions,
    )
    if journal.settings is None:
        journal.begin(settings)
    if swap_is_on():
        say("isolation: swap is on; the targets are for a machine without")
    known = headers(folders())
    mixes = [make_mix(number, known, settings) for number in range(args.mixes)]
    todo = [group for group in groups(args, mixes) if not journal.has(group)]
    runs_each = len(args.strategies) + 1
    say(
        f"isolation: {len(todo)} groups of {runs_each} runs in {settings.lanes} lanes; some "
        f"{len(todo) * runs_each * (settings.length_s + 4) / settings.lanes / 60:.0f} minutes"
    )
    for found in run_groups(todo, settings, args.minutes):
        journal.add([run for run, _ in found])
        first = found[0][0]
        if first.repeat == 0 and first.ratio == TARGET_RATIO and first.mix < KEPT_MIXES:
            keep(found, mixes[first.mix], journal.path.parent)
    if not journal.runs:
        say("isolation: nothing was run: no ratio is feasible for any mix")
        return 1
    report = summarize(journal.runs, mixes, settings, args.ratios)
    show(report, mixes)
    print(f"  written: {report.write()}")
    leaks = sum(run.leaks for run in journal.runs)
    if leaks:
        say(f"isolation: {leaks} cgroups were left behind")
    return 0 if not leaks and all(target.met for target in report.targets) else 1


def run_in_guest(given: Sequence[str]) -> int:
    """Run the same module in the test guest; what it writes is below build/, which is shared."""
    guest = ["tests.guest.vm", "--memory", str(GUEST_MIB), "--timeout", str(GUEST_TIMEOUT_S)]
    if "PYTHONPATH" in os.environ:
        guest += ["--env", "PYTHONPATH"]
    here = [sys.executable, "-m", "bench.isolation.benchmark", "--no-plot", *given]
    return subprocess.run([sys.executable, "-m", *guest, "--", *here], cwd=ROOT).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0 when all targets were met and nothing was left behind."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = arguments(given)

    where = decide()
    try:
        if "oomd" in args.strategies and not _has_oomd():
            ensure_oomd()
        if where.kind == "guest":
            say(f"isolation: in the test guest, because {where.reason}")
            status = run_in_guest(given)
        else:
            status = run_here(args)
    except SuiteError as error:
        say(f"isolation: oomd cannot be fetched; --strategies leaves it out: {error}")
        return 1
    except (ReplayError, AgentcgroupdError, trace_format.TraceError, OSError) as error:
        say(f"isolation: {error}")
        return 1
    if not args.no_plot and (RESULTS / "isolation.json").exists():
        plot()
    return status


def plot() -> None:
    """Draw what was written, where matplotlib is."""
    try:
        from bench.isolation.plot import draw_all

        pictures = draw_all()
    except ImportError as error:
        say(f"isolation: no pictures ({error}); python -m bench.isolation.plot draws them later")
        return
    for picture in pictures:
        print(os.path.relpath(picture))


def _has_oomd() -> bool:
    try:
        find_oomd()
    except ReplayError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
