"""`make demo`: the same four recorded agents on the same pool, three times.

The largest call of each session holds its peak at the same moment, by agreement, and together they
want more than the pool has. The demo runs them with no control, with a static split, and with this
daemon; beside the last, at the same time and in a pool of its own, the most important session runs
alone. The demo says in three sentences what became of the calls, draws memory over time, and ends
with 1 where what it claims did not hold.

Where this machine cannot run the daemon, the runs take place in user-mode Linux (one boot) and the
picture is drawn out here.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from agentcgroup_lab.replay import engine, result
from agentcgroup_lab.replay.backends import STRATEGIES, ReplayError
from agentcgroup_lab.trace import format as trace_format
from agentcgroupd.errors import AgentcgroupdError
from bench.demo import verdict
from bench.demo.beside import run_beside
from bench.demo.choose import Prepared, prepare
from bench.demo.live import Lines, View, part_title
from tests.guest.where import decide

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = ROOT / "bench/recordings"
OUTPUT = ROOT / "build/demo"
GUEST = os.environ.get("AGENTCG_GUEST", "")
GUEST_MIB, GUEST_TIMEOUT_S = 1536, 600
PLAN_S = 18.0 if GUEST else 8.0
"""Seconds that a strategy takes when all runs on time. Three of them, the delays that they cause,
and the start of guest and daemon stay below 2 minutes in the guest and 45 seconds natively."""
SAMPLE_S = 0.2 if GUEST else 0.05
"""Where the guest has one CPU, looking on is not to take much of it."""
TRIES = 4
Both = tuple[result.StrategyResult, result.StrategyResult]
NICE = -15
BUSY_SHARE = 0.25
"""More than this much other work is worth a word where something did not hold."""
EXIT_OK, EXIT_FAILED = 0, 1


def run(prepared: Prepared, view: Lines | View) -> result.ReplayResult:
    """Run all strategies in a row, here, and beside the last the important session alone."""

    def one(strategy: str, how: engine.EngineOptions) -> result.StrategyResult:
        view.begin(part_title(strategy))
        return engine.run_strategy(
            strategy, prepared.specs, prepared.pool_bytes, how, watch=view.watch
        )

    def alone(how: engine.EngineOptions) -> result.StrategyResult:
        return engine.run_strategy("none", prepared.specs[:1], prepared.pool_bytes, how)

    *others, last = STRATEGIES
    strategies = [one(name, prepared.how) for name in others]
    ours, by_itself = _undisturbed(
        lambda: run_beside(partial(one, last), prepared.how, alone, prepared.how_alone()), view
    )
    return result.ReplayResult(
        kernel=os.uname().release,
        where={"uml": "user-mode Linux", "qemu": "emulated guest"}.get(GUEST, "native"),
        memory_scale=prepared.how.memory_scale,
        speed=prepared.speed,
        strategies=(*strategies, ours),
        rules=prepared.rules,
        alone=by_itself,
    )


def _undisturbed(run_both: Callable[[], Both], view: Lines | View) -> Both:
    """Run all sessions and one alone until the times can be compared, TRIES times at most, and
    return the try that was disturbed least. Other work of this machine only ever adds time to one
    of the two. A call that is lost is lost: then there is no other try."""
    tries: list[Both] = []
    while True:
        tries.append(run_both())
        ratio = verdict.ratio(*tries[-1])
        if verdict.all_lost(tries[-1][0]) or ratio <= verdict.MOST_OF_ALONE:
            return tries[-1]
        if len(tries) == TRIES:
            return min(tries, key=lambda both: verdict.ratio(*both))
        view.say(f"the important session took {ratio:.2f} times as long as alone: once more")


def go_first() -> None:
    """Run before this machine's other work: what takes its CPU away says nothing of memory."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        autogroup = Path("/proc/self/autogroup")
        if autogroup.exists():  # then priorities count within a terminal session alone
            autogroup.write_text(str(NICE), encoding="ascii")
    except PermissionError as error:
        print(f"demo: other work may slow it: {error}", file=sys.stderr)


def _run_in_guest(arguments: Sequence[str], output: Path) -> int:
    """Run the same module in the test guest, which shares the directory of its result."""
    guest = ["tests.guest.uml", "--memory", str(GUEST_MIB), "--timeout", str(GUEST_TIMEOUT_S)]
    guest += ["--rw", str(output)]
    if "PYTHONPATH" in os.environ:
        guest += ["--env", "PYTHONPATH"]
    here = [sys.executable, "-m", "bench.demo", "--no-plot", *arguments]
    return subprocess.run([sys.executable, "-m", *guest, "--", *here], cwd=ROOT).returncode


def _run_here(traces: Path, found: Path, view: Lines | View) -> int:
    try:
        prepared = prepare(traces, PLAN_S, SAMPLE_S)
        for name, text in prepared.rules.items():
            view.say(f"{name + ':':<10}{text}")
        replayed = run(prepared, view)
    except (ReplayError, AgentcgroupdError, trace_format.TraceError, OSError) as error:
        view.say(f"demo: {error}")
        return EXIT_FAILED
    replayed.write(found)
    return EXIT_OK


class OtherWork:
    """How busy this machine was with other work than the demo's, since this was made."""

    def __init__(self) -> None:
        self._began = self._read()

    def share(self) -> float:
        """Part of all CPU time that went elsewhere, 0 to 1. Of processes that were waited for."""
        total_s, busy_s, own_s = (
            now - before for now, before in zip(self._read(), self._began, strict=True)
        )
        return max(0.0, busy_s - own_s) / total_s if total_s > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        with open("/proc/stat", encoding="ascii") as stream:
            ticks = [int(word) for word in stream.readline().split()[1:9]]
        idle = ticks[3] + ticks[4]
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        per_s = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / per_s, (sum(ticks) - idle) / per_s, own.ru_utime + own.ru_stime


def _tell(replayed: result.ReplayResult, other_work: float) -> int:
    """Print what was shown. Returns the exit status."""
    print()
    for sentence in verdict.sentences(replayed):
        print(sentence)
    print()
    print(verdict.table(replayed))
    notes = [note for one in replayed.strategies for note in one.notes]
    for note in dict.fromkeys(notes):
        print(f"note: {note}")
    wrong = verdict.failures(replayed)
    for sentence in wrong:
        print(f"demo: not as claimed: {sentence}", file=sys.stderr)
    if wrong and other_work > BUSY_SHARE:
        print(
            f"demo: {other_work:.0%} of this machine's CPU time went to other work meanwhile, so "
            "that times say little; try again when it is idle",
            file=sys.stderr,
        )
    return EXIT_FAILED if wrong else EXIT_OK


def _plot(replayed: result.ReplayResult, directory: Path) -> None:
    from agentcgroup_lab.replay.plot import save

    pictures = [directory / "memory.png", directory / "memory.svg"]
    save(replayed, pictures)
    print(f"picture: {os.path.relpath(pictures[0])}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all ran, nothing was left behind, and the contrast is there."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--traces",
        type=Path,
        default=Path(os.environ.get("TRACES") or RECORDINGS),
        help="directory of recordings (default: $TRACES, or bench/recordings)",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: build/demo")
    parser.add_argument("--no-plot", action="store_true", help="write result.json only")
    parser.add_argument("--live", action="store_true", help="draw in place, as on a terminal")
    args = parser.parse_args(argv)
    output: Path = args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    found = output / "result.json"
    live = args.live or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")
    view: Lines | View = View() if live else Lines()

    where = decide()
    if not GUEST:
        go_first()
    started, other_work = time.monotonic(), OtherWork()
    if where.kind == "guest":
        found.unlink(missing_ok=True)
        view.say(f"in user-mode Linux, because {where.reason}")
        arguments = ["--traces", str(args.traces.absolute()), "--output", str(output)]
        status = _run_in_guest([*arguments, *(["--live"] if live else [])], output)
    else:
        status = _run_here(args.traces, found, view)
    if status or GUEST:
        return status
    replayed = result.read(found)
    status = _tell(replayed, other_work.share())
    if not args.no_plot:
        _plot(replayed, output)
    view.say(f"took {time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
