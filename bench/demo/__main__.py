"""`make demo`: the same three recorded agents on the same small pool, three times.

Picks three recordings, a pool that is too small for all their peaks at once, and how much to shrink
both so that it ends in time; runs them with no control, with a static split, and with this daemon;
prints a table and draws memory over time. Every number comes from a rule below, from the recordings
and from how fast this machine is; what was chosen and why is printed and kept in the result.

Where this machine cannot run the daemon, the runs take place in the test guest (one boot) and the
picture is drawn out here.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentcgroup_lab.replay import engine, result
from agentcgroup_lab.replay.backends import STRATEGIES, ReplayError
from agentcgroup_lab.trace import format as trace_format
from agentcgroup_lab.trace import plan
from agentcgroupd.errors import AgentcgroupdError
from tests.guest.where import decide

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = ROOT / "bench/recordings"
OUTPUT = ROOT / "build/demo"
EMULATED = os.environ.get("AGENTCG_EMULATED") == "1"
GUEST_MIB, GUEST_TIMEOUT_S = 2048, 900

SESSIONS = 3
WINDOW_S = 100.0
"""Recorded seconds replayed, around the recording's peak: room for a dozen calls before and
after."""
PLAN_S = 45.0 if EMULATED else 13.0
"""Seconds that a strategy takes when all runs on time: three of them, the delays that they cause,
and the start of guest and daemon stay below 5 minutes emulated and 1 minute natively."""
CANDIDATES = 8
"""Number of recordings, those whose calls rise highest, of which every three are weighed."""
HEADROOM = 1.12
"""The pool over what must fit: below some 6 % of free memory the daemon holds calls back."""
FIXED_BYTES = 8_000_000
"""A session's part that does not shrink with the recording: interpreter, launcher, page tables."""
MEMORY_SHARE = 0.5
"""Share of this machine's free memory that the pool may have."""
RISE_SHARE = 0.06
"""Share of the time in which all sessions may rise to their peaks together: on a machine that
touches memory slowly the peaks, which recorded calls reach in a second or two, would not meet."""
SPAWN_SHARE = 0.2
"""Share of the time that may be spent on starting calls."""
SPAWNS_PER_CALL = 3.0
"""A call costs about so many plain spawns: fork, launcher, the daemon's answer, the load."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of this machine."""

    touch_bytes_per_s: float
    spawn_s: float
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Three plans, the first of them the important session's, and the pool for them."""

    names: tuple[str, ...]
    plans: tuple[plan.Plan, ...]
    offsets_s: tuple[float, ...]
    pool_bytes: int
    demand: plan.Demand


def say(line: str) -> None:
    """Progress, as it happens."""
    print(line, file=sys.stderr, flush=True)


def measure() -> Speed:
    """Start some processes, and touch some memory as calls do. The best of three counts: a guest's
    memory is its host's only once it has been touched."""
    load, spawns, n_bytes = engine.find_load(), 5, 64 << 20
    started = time.monotonic()
    for _ in range(spawns):
        subprocess.run([load, "--help"], stdout=subprocess.DEVNULL, check=True)
    spawn_s = (time.monotonic() - started) / spawns
    touches_s = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([load], input=f"0 {n_bytes} 0\n", text=True, check=True)
        touches_s.append(max(time.monotonic() - started - spawn_s, 0.001))
    fields = dict(line.split(":", 1) for line in open("/proc/meminfo", encoding="ascii"))
    free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    return Speed(n_bytes / min(touches_s), spawn_s, free_bytes)


def load_recordings(directory: Path) -> dict[str, trace_format.Trace]:
    """Read all recordings of a directory, by name."""
    paths = sorted([*directory.glob("*.jsonl.gz"), *directory.glob("*.jsonl")])
    return {
        path.name.removesuffix(".gz").removesuffix(".jsonl"): trace_format.read(path)
        for path in paths
    }


def pool_for(plans: Sequence[plan.Plan]) -> int:
    """The smallest pool on which some order of things lets everything finish, with some headroom:
    any one session at its peak, while the others' agents, which cannot be stopped, stay."""
    most = max(
        one.peak_bytes + sum(other.agent_peak_bytes for other in plans if other is not one)
        for one in plans
    )
    return int(most * HEADROOM) + FIXED_BYTES * len(plans)


def choose(recordings: dict[str, trace_format.Trace], options: plan.Options) -> Choice:
    """Choose, among the recordings whose calls rise highest, the three whose demand, when their
    peaks meet, exceeds their pool most and longest (its area above it). The one with the highest
    peak is the important session: it is the one that a kernel without further advice would kill
    first."""
    plans = {
        name: plan.make_plan(
            recorded, replace(options, window_s=plan.busiest_window(recorded, WINDOW_S))
        )
        for name, recorded in recordings.items()
    }
    rises = {
        name: max((call.peak_bytes for call in one.calls), default=0) for name, one in plans.items()
    }
    highest = sorted(plans, key=lambda name: rises[name], reverse=True)[:CANDIDATES]
    best: tuple[float, Choice] | None = None
    for names in itertools.combinations(highest, SESSIONS):
        ordered = tuple(sorted(names, key=lambda name: plans[name].peak_bytes, reverse=True))
        chosen = tuple(plans[name] for name in ordered)
        offsets_s = tuple(plan.start_offsets_s(chosen))
        demand = plan.Demand(chosen, offsets_s)
        pool_bytes = pool_for(chosen)
        weight = demand.area_above(pool_bytes) / pool_bytes
        if best is None or weight > best[0]:
            best = weight, Choice(ordered, chosen, offsets_s, pool_bytes, demand)
    assert best is not None
    return best[1]


def shrink(choice: Choice, speed: Speed) -> float:
    """The factor for memory: what this machine has and can touch in time, and no more than 1."""
    rises = sum(max(call.peak_bytes for call in one.calls) for one in choice.plans)
    by_time = RISE_SHARE * PLAN_S * speed.touch_bytes_per_s / max(rises, 1)
    by_memory = MEMORY_SHARE * speed.free_bytes / choice.pool_bytes
    factor = min(1.0, by_time, by_memory)
    # A round number reads better; rounding down keeps both limits.
    return next((f for f in (1.0, 0.75, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15) if f <= factor), factor)


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.0f} MB"


def rules(choice: Choice, speed: Speed, options: plan.Options) -> dict[str, str]:
    """Say in plain words what was chosen, and why."""
    plans, demand = choice.plans, choice.demand
    planned_s = max(
        offset + one.duration_s for offset, one in zip(choice.offsets_s, plans, strict=True)
    )
    sessions = [
        f"{name} (peak {_mb(one.peak_bytes)}, agent {_mb(one.agent_peak_bytes)}, "
        f"{len(one.calls)} calls)"
        for name, one in zip(choice.names, plans, strict=True)
    ]
    return {
        "machine": f"touches {speed.touch_bytes_per_s / 1e6:.0f} MB/s, starts a process in "
        f"{speed.spawn_s * 1000:.1f} ms, has {_mb(speed.free_bytes)} free",
        "sessions": ", ".join(sessions),
        "scale": f"memory x{options.memory_scale:g}, {options.speed:.3g} times as fast as "
        f"recorded; one strategy takes {planned_s:.0f} s when all runs on time",
        "pool": f"{_mb(choice.pool_bytes)}: any one session's peak fits beside the other agents, "
        f"with {HEADROOM - 1:.0%} to spare",
        "demand": f"mean {_mb(demand.mean_bytes)}, peak {_mb(demand.peak_bytes)}, for "
        f"{demand.seconds_above(choice.pool_bytes):.1f} s more than the pool; all sessions' peaks: "
        f"{_mb(sum(one.peak_bytes for one in plans))}",
    }


def prepare(directory: Path) -> tuple[list[engine.SessionSpec], int, plan.Options, dict[str, str]]:
    """Turn the recordings into sessions and a pool. Raises ReplayError, TraceError."""
    recordings = load_recordings(directory)
    if len(recordings) < SESSIONS:
        raise ReplayError(
            f"{directory} holds {len(recordings)} recordings (*.jsonl.gz), {SESSIONS} are needed; "
            "TRACES=dir names another directory"
        )
    speed = measure()
    longest_s = max(min(WINDOW_S, recorded.duration_s) for recorded in recordings.values())
    options = plan.Options(
        speed=max(1.0, longest_s / PLAN_S),
        max_calls=max(4, int(SPAWN_SHARE * PLAN_S / (SPAWNS_PER_CALL * speed.spawn_s))),
        cpu_max_pct=100.0 * (os.cpu_count() or 1),
    )
    options = replace(options, memory_scale=shrink(choose(recordings, options), speed))
    choice = choose(recordings, options)
    specs = [
        engine.SessionSpec(f"s{number}", name, one, important=number == 1, delay_s=offset_s)
        for number, (name, one, offset_s) in enumerate(
            zip(choice.names, choice.plans, choice.offsets_s, strict=True), 1
        )
    ]
    return specs, choice.pool_bytes, options, rules(choice, speed, options)


def run(directory: Path) -> result.ReplayResult:
    """Run all strategies in a row, here."""
    specs, pool_bytes, options, why = prepare(directory)
    for name, text in why.items():
        say(f"{name + ':':<10}{text}")
    how = engine.EngineOptions(memory_scale=options.memory_scale)
    strategies = [engine.run_strategy(name, specs, pool_bytes, how, say) for name in STRATEGIES]
    return result.ReplayResult(
        kernel=os.uname().release,
        where="emulated guest" if EMULATED else "native",
        memory_scale=options.memory_scale,
        speed=options.speed,
        strategies=tuple(strategies),
        rules=why,
    )


def _run_in_guest(arguments: Sequence[str]) -> int:
    """Run the same module in the test guest; its result is left in build/, which is shared."""
    guest = ["tests.guest.vm", "--memory", str(GUEST_MIB), "--timeout", str(GUEST_TIMEOUT_S)]
    if "PYTHONPATH" in os.environ:
        guest += ["--env", "PYTHONPATH"]
    here = [sys.executable, "-m", "bench.demo", "--no-plot", *arguments]
    return subprocess.run([sys.executable, "-m", *guest, "--", *here], cwd=ROOT).returncode


def _plot(found: Path) -> None:
    from agentcgroup_lab.replay.plot import save

    pictures = [found.with_name("memory.png"), found.with_name("memory.svg")]
    save(result.read(found), pictures)
    for picture in (found, *pictures):
        print(os.path.relpath(picture))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all three strategies ran and nothing was left behind."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo")
    parser.add_argument(
        "--traces",
        type=Path,
        default=Path(os.environ.get("TRACES") or RECORDINGS),
        help="directory of recordings (default: $TRACES, or bench/recordings)",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: build/demo")
    parser.add_argument("--no-plot", action="store_true", help="write result.json only")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    found: Path = args.output.absolute() / "result.json"

    where = decide()
    started = time.monotonic()
    if where.kind == "guest":
        say(f"in the test guest, because {where.reason}")
        status = _run_in_guest(
            ["--traces", str(args.traces.absolute()), "--output", str(found.parent)]
        )
        if status:
            return status
    else:
        try:
            replayed = run(args.traces)
        except (ReplayError, AgentcgroupdError, trace_format.TraceError, OSError) as error:
            say(f"demo: {error}")
            return 1
        replayed.write(found)
        print(result.table(replayed.strategies))
        for note in dict.fromkeys(note for one in replayed.strategies for note in one.notes):
            print(f"note: {note}")
        if any(one.leaks for one in replayed.strategies):
            say("demo: cgroups were left behind")
            return 1
    if not args.no_plot:
        _plot(found)
    say(f"took {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
