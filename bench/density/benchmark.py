"""Benchmark `density`: how many recorded agents one pool carries.

By simulation (agentcgroup_lab.simulate.run): the most sessions at which, for ten minutes, no call
is killed and no important session takes more than 1.05 times as long as undisturbed, by bisection,
for several seeds. It is compared with the number that fits when everyone's peak is reserved: nobody
knows before who will reach the highest, so everyone gets the highest of all.

For real: as many sessions as this machine carries (where it has no controllers: the test guest) are
replayed under the daemon, and the same plans are simulated. The replay burns no CPU: many sessions
on few cores would wait for those, and it is memory that is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from agentcgroup_lab.replay.backends import ReplayError
from agentcgroup_lab.simulate.plans import Profile, find_recordings, load_profiles
from agentcgroup_lab.simulate.run import Setup, reserved, simulate
from agentcgroup_lab.simulate.types import KernelModel, Strategy
from agentcgroup_lab.trace.plan import Options
from agentcgroupd.errors import AgentcgroupdError
from agentcgroupd.policy.load import load_policy
from bench.density.real import LATE_MOST, compare
from bench.report import ROOT, BenchReport, Target, recordings
from tests.guest.where import decide

GB = 1_000_000_000
GUEST_OPTIONS = ("--memory", "2048", "--timeout", "560")


@dataclass(frozen=True, slots=True)
class Case:
    """A number of sessions to find."""

    name: str
    pool_bytes: int
    strategy: Strategy = "ours"
    zram_ratio: float | None = None
    cold_share: float = 0.8
    target: float | None = None
    """Times what reserving peaks allows."""


CASES = (
    Case("64 GB", 64 * GB, target=9.0),
    Case("64 GB, zram 3:1", 64 * GB, zram_ratio=3.0, target=18.0),
    Case("64 GB, zram 2:1", 64 * GB, zram_ratio=2.0),
    Case("64 GB, zram 3:1, agents 60 % cold", 64 * GB, zram_ratio=3.0, cold_share=0.6),
    Case("8 GB", 8 * GB, target=7.0),
    Case("8 GB, zram 3:1", 8 * GB, zram_ratio=3.0),
    Case("64 GB, no control", 64 * GB, "none"),
    Case("8 GB, no control", 8 * GB, "none"),
    Case("64 GB, static split", 64 * GB, "static"),
)


@lru_cache
def _profiles(paths: tuple[Path, ...]) -> list[Profile]:
    return load_profiles(paths, Options())


def carries(
    case: Case, sessions: int, seed: int, paths: tuple[Path, ...], policy: Path, duration_s: float
) -> tuple[bool, dict[str, Any]]:
    """Return whether so many sessions get through, and the simulation's result."""
    setup = Setup(
        case.pool_bytes,
        sessions,
        seed=seed,
        strategy=case.strategy,
        duration_s=duration_s,
        kernel=KernelModel(zram_ratio=case.zram_ratio, cold_share=case.cold_share),
        until_killed=True,
    )
    result = simulate(load_policy(policy).policy, _profiles(paths), setup)
    killed = result.calls_killed + result.calls_oom + result.sessions_lost
    return killed == 0 and result.important.most <= LATE_MOST, result.to_json()


def most(
    case: Case, seed: int, paths: tuple[Path, ...], policy: Path, duration_s: float
) -> tuple[int, dict[str, Any]]:
    """Find the most sessions that get through, by bisection. Returns their number and the
    simulation's result there; 0 and no result where not even one does."""
    profiles = _profiles(paths)
    mean = sum(p.mean_bytes * p.duration_s for p in profiles) / sum(p.duration_s for p in profiles)
    low, found = 0, dict[str, Any]()
    # More than all agents' cold memory in zram could free is out of reach.
    kept = 1.0 - case.cold_share * (1 - 1 / case.zram_ratio) if case.zram_ratio else 1.0
    high = int(case.pool_bytes / (mean * kept) * 1.1) + 1
    middle = int(high * 0.85)
    while high - low > max(1, high // 200):
        good, details = carries(case, middle, seed, paths, policy, duration_s)
        if good:
            low, found = middle, details
        else:
            high = middle
        middle = (low + high) // 2
    return low, found


def find_all(
    cases: Sequence[Case], seeds: int, paths: tuple[Path, ...], policy: Path, duration_s: float
) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Find every case for every seed, on all cores."""
    jobs = [(case, seed) for case in cases for seed in range(seeds)]
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {case.name: [] for case in cases}
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        running = [workers.submit(most, *job, paths, policy, duration_s) for job in jobs]
        for (case, seed), job in zip(jobs, running, strict=True):
            number, details = job.result()
            found[case.name].append((number, details))
            print(f"{case.name}, seed {seed}: {number} sessions", file=sys.stderr, flush=True)
    return found


def report(
    found: dict[str, list[tuple[int, dict[str, Any]]]],
    cases: Sequence[Case],
    paths: tuple[Path, ...],
    seeds: int,
    real: dict[str, Any] | None,
) -> BenchReport:
    """Put the targets and the details together."""
    profiles = _profiles(paths)
    own_peaks = statistics.mean(p.peak_bytes for p in profiles)
    targets: list[Target] = []
    details: dict[str, Any] = {}
    for case in cases:
        numbers = sorted(number for number, _ in found[case.name])
        fit = max(1, reserved(case.pool_bytes, profiles))
        median = statistics.median(numbers)
        details[case.name] = {
            **asdict(case),
            "sessions": numbers,
            "median": median,
            "reserved": fit,
            "times_reserved": median / fit,
            "times_own_peaks_reserved": median / (case.pool_bytes / own_peaks),
            "use_mean": [run.get("use_mean") for _, run in found[case.name]],
            "paused_share": [run.get("paused_share") for _, run in found[case.name]],
            "important_most": [run["important"]["most"] for _, run in found[case.name] if run],
        }
        if case.target is not None:
            name = (
                f"{case.name}: {median:g} sessions ({numbers[0]} to {numbers[-1]}), reserved {fit}"
            )
            times = median / fit
            limit = f">= {case.target:g}"
            targets.append(Target(name, times, "x", limit, times >= case.target))
    if real is not None:
        targets += [Target(**target) for target in real["targets"]]
    note = "simulated; for real: " + (real["where"] if real else "not run")
    details = {"cases": details, "recordings": len(paths), "real": real}
    return BenchReport("density", note, seeds, targets, details)


def _real(args: argparse.Namespace, paths: tuple[Path, ...], sessions: int) -> dict[str, Any]:
    """Replay here, or in the test guest. Raises ReplayError."""
    if decide().kind == "native":
        return compare(paths, args.policy, args.real_sessions, sessions)
    output = ROOT / "build/density-real.json"
    output.parent.mkdir(exist_ok=True)
    output.unlink(missing_ok=True)
    python = [sys.executable, "-m"]
    inside = [*python, "bench.density.benchmark", "--real-only", str(output)]
    inside += ["--real-sessions", str(args.real_sessions), "--policy", str(args.policy)]
    inside += ["--traces", *map(str, args.traces)]
    command = [*python, "tests.guest.vm", *GUEST_OPTIONS, "--", *inside]
    subprocess.run(command, cwd=ROOT, check=False)
    if not output.exists():
        raise ReplayError("the run in the test guest left no result")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.density.benchmark", description=__doc__)
    parser.add_argument("--traces", type=Path, nargs="+", default=[recordings()])
    parser.add_argument("--half", choices=("even", "odd"), help="only every other recording")
    parser.add_argument("--policy", type=Path, default=Path("default"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=600.0, help="seconds (default: 600)")
    parser.add_argument("--case", action="append", help="only those whose name begins so")
    parser.add_argument("--no-real", action="store_true", help="simulate only")
    parser.add_argument("--real-only", type=Path, metavar="FILE", help="replay only, into FILE")
    parser.add_argument(
        "--real-sessions",
        type=int,
        default=0,
        help="how many at most (default: what this machine carries)",
    )
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; returns 0 when every target was met."""
    args = _arguments()
    paths = tuple(find_recordings(args.traces))
    if args.half:
        paths = paths[args.half == "odd" :: 2]
    try:
        if args.real_only:
            result = compare(paths, args.policy, args.real_sessions, 0)
            args.real_only.write_text(json.dumps(result))
            return 0
        beginnings = tuple(args.case or [""])
        cases = [case for case in CASES if case.name.startswith(beginnings)]
        started = time.monotonic()
        found = find_all(cases, args.seeds, paths, args.policy, args.duration)
        print(f"simulated in {time.monotonic() - started:.0f} s", file=sys.stderr)
        sessions = next((max(n for n, _ in found[case.name]) for case in cases), 0)
        real = None if args.no_real else _real(args, paths, sessions)
    except (ReplayError, AgentcgroupdError, OSError, ValueError) as error:
        print(f"density: {error}", file=sys.stderr)
        return 1
    done = report(found, cases, paths, args.seeds, real)
    done.show()
    print(done.write())
    return 0 if all(target.met for target in done.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
