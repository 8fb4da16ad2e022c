"""Benchmark `cpu`: who gets the CPU, and how soon, under three schedulers with the same weights.

EEVDF (the kernel's own), scx_flatcg (which the AgentCgroup paper used) and ours take turns in
every round, on the same tree: an important call that wakes and runs a little beside four times as
many CPU-bound tasks as there are CPUs; leaves with different weights; calls with cpu.max, of which
scx_flatcg knows nothing. Before them comes EEVDF as it is without control: all weights the same.
Latency is what the waking task sees: from when its sleep is over to when it runs.

A scheduler is attached anew for each measurement, after the tree's root is made and until before it
is removed. scx_flatcg 7.3 needs that on Linux 7.3: it lets go of a removed cgroup's tasks that are
still dying, which then wait for ever, and fails at the first cgroup that is made after one was
removed (deleting from its hash map leaves the node behind that it then does not expect).

In the guest both CPUs are run by one host thread: ratios within a run count there, not times.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.sched import SchedSettings, Scheduler
from agentcgroupd.config import CpuConfig
from agentcgroupd.cpu.scheduling import INTERACTIVE_FACTOR, SESSION_FACTOR
from agentcgroupd.errors import BpfError
from agentcgroupd.intents.grant import weight_of_priority
from agentcgroupd.units import PRIORITY_WORDS, CgroupId
from bench.cpu import flatcg, plot
from bench.report import BenchReport, Target, quantile
from tests.guest.cpu_load import SCHED_EXT, Load, shares
from tests.guest.where import decide

SCHEDULERS = ("plain", "eevdf", "flatcg", "ours")
"""plain: EEVDF with all weights the same."""
ROUNDS = 5
WAKEUPS = 150
SLEEP_MS = (5, 30)
RUN_USEC = (200, 2000)
"""Work of an interactive call between two waits: drawn anew each time."""
OVERSUBSCRIBED = 4
IMPORTANT, NORMAL = PRIORITY_WORDS["important"], PRIORITY_WORDS["normal"]
SHARES = {"a": 50, "b": 100, "c": 200, "d": 400}
LIMITS = {"a": 200, "b": 350, "c": 500}
"""cpu.max in thousandths of a CPU."""


@dataclass(frozen=True, slots=True)
class Round:
    """Results of a scheduler in a round."""

    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    share_error_points: float | None
    max_error_percent: float | None
    throughput_cpus: float


@contextmanager
def scheduled_by(name: str) -> Iterator[Scheduler | None]:
    """The scheduler is the kernel's for the block. Ours is given out, to be told what is what."""
    config = CpuConfig()
    if name == "ours":
        chosen = SchedSettings(
            slice_usec=config.slice,
            wait_max_usec=config.wait_max,
            boost_lead_usec=config.boost_lead,
            penalty_most=config.penalty_most,
        )
        scheduler = Scheduler.load(chosen)
        try:
            scheduler.attach()
            yield scheduler
            if scheduler.ending() is not None:
                raise SystemExit(f"the kernel let go of ours: {scheduler.ending()}")
        finally:
            scheduler.close()
    elif name == "flatcg":
        with flatcg.Flatcg():
            yield None
    else:
        yield None


def policy_for(name: str) -> int:
    """Scheduling policy of the load."""
    return os.SCHED_OTHER if name in ("plain", "eevdf") else SCHED_EXT


def describe(scheduler: Scheduler | None, load: Load, session: str, call: str) -> None:
    """Tell the scheduler of an important session and its call, as the daemon does."""
    if scheduler is None:
        return
    config = CpuConfig()
    cap = config.boost * INTERACTIVE_FACTOR
    permille = config.boost_refill_percent * 10 * INTERACTIVE_FACTOR
    whole = cap * SESSION_FACTOR, permille * SESSION_FACTOR
    scheduler.describe(CgroupId(load.id(session)), abi.CgroupKind.SESSION, *whole)
    scheduler.describe(CgroupId(load.id(call)), abi.CgroupKind.CALL, cap, permille)


def wakeups(name: str, seed: int) -> tuple[list[float], float]:
    """Return how late the important call was each time, in ms, and how many CPUs all used
    together."""
    late = (ctypes.c_double * WAKEUPS).from_buffer(mmap.mmap(-1, WAKEUPS * 8))
    dice = random.Random(seed)
    plan = [(dice.uniform(*SLEEP_MS) / 1e3, dice.uniform(*RUN_USEC) / 1e6) for _ in range(WAKEUPS)]

    def wake() -> None:
        for i, (sleep_s, run_s) in enumerate(plan):
            due = time.monotonic() + sleep_s
            time.sleep(sleep_s)
            now = time.monotonic()
            late[i] = (now - due) * 1e3
            while time.monotonic() < now + run_s:
                pass

    important = weight_of_priority(NORMAL if name == "plain" else IMPORTANT)
    with Load(policy_for(name)) as load, scheduled_by(name) as scheduler:
        load.make("vip", important)
        load.make("vip/call", important)
        describe(scheduler, load, "vip", "vip/call")
        for i in range(OVERSUBSCRIBED * (os.cpu_count() or 1)):
            load.make(f"s{i}", weight_of_priority(NORMAL))
            load.make(f"s{i}/call", weight_of_priority(NORMAL))
            load.start(f"s{i}/call")
        time.sleep(0.3)
        began, before = time.monotonic(), load.usage_usec(".")
        load.wait(load.start("vip/call", wake))
        used = (load.usage_usec(".") - before) / 1e6 / (time.monotonic() - began)
    return sorted(late), used


def share_error(name: str) -> float:
    """The largest deviation of a share from its weight's, in points."""
    cpus = os.cpu_count() or 1
    with Load(policy_for(name)) as load, scheduled_by(name):
        for leaf, weight in SHARES.items():
            load.make(leaf, weight)
            for _ in range(cpus):
                load.start(leaf)
        time.sleep(0.5)
        found = shares(load.used_usec(list(SHARES), 3.0))
    total = sum(SHARES.values())
    return max(abs(found[n] - 100 * w / total) for n, w in SHARES.items())


def max_error(name: str) -> float:
    """The largest deviation from a cpu.max, in percent of it, beside a task without limit."""
    with Load(policy_for(name)) as load, scheduled_by(name):
        for leaf, permille in LIMITS.items():
            load.make(leaf, 100, f"{permille * 100} 100000")
            load.start(leaf)
        load.make("free")
        load.start("free")
        time.sleep(0.6)
        began = time.monotonic()
        used = load.used_usec(LIMITS, 4.0)
        took = time.monotonic() - began
    return max(abs(used[n] / took / (p * 1000) - 1) * 100 for n, p in LIMITS.items())


def measure(name: str, seed: int) -> Round:
    """Run a round of a scheduler."""
    late, cpus = wakeups(name, seed)
    return Round(
        late_p50_ms=quantile(late, 0.5),
        late_p99_ms=quantile(late, 0.99),
        late_max_ms=late[-1],
        share_error_points=share_error(name) if name != "plain" else None,
        max_error_percent=max_error(name) if name != "plain" else None,
        throughput_cpus=cpus,
    )


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: list[Round]) -> dict[str, dict[str, float]]:
    """The spread of each number that all have."""
    found = {name: [getattr(r, name) for r in rounds] for name in Round.__slots__}
    return {name: spread(values) for name, values in found.items() if None not in values}


def show(rows: dict[str, dict[int, Round]]) -> None:
    """The table: medians, with least and most."""
    names = (
        "late_p50_ms",
        "late_p99_ms",
        "late_max_ms",
        "share_error_points",
        "max_error_percent",
        "throughput_cpus",
    )
    print(f"{'':<20}" + "".join(f"{name:>28}" for name in rows))
    for name in names:
        line = f"{name:<20}"
        for rounds in rows.values():
            values = [getattr(r, name) for r in rounds.values()]
            if None in values or not values:
                line += f"{'-':>28}"
                continue
            found = spread(values)
            text = f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"
            line += f"{text:>28}"
        print(line)


def inside(rounds: int) -> int:
    """Measure on this kernel, which has cgroup controllers and sched_ext."""
    built = flatcg.program(os.uname().release).exists()
    wanted = [name for name in SCHEDULERS if name != "flatcg" or built]
    rows: dict[str, dict[int, Round]] = {name: {} for name in wanted}
    lost: list[str] = []
    for i in range(rounds):
        for name in wanted:
            try:
                rows[name][i] = measure(name, i)
            except flatcg.Ejected as error:
                lost.append(f"scx_flatcg: ejected: {error}")
                print(f"round {i + 1} of {rounds}, {lost[-1]}", flush=True)
                continue
            except BpfError as error:
                raise SystemExit(f"{name}: {error}\n{error.detail}") from None
            print(f"round {i + 1} of {rounds}, {name}: {rows[name][i]}", flush=True)
    show(rows)
    for line in lost:
        print(line)
    ours = rows["ours"]
    ratios = {
        name: [ours[i].late_p99_ms / theirs.late_p99_ms for i, theirs in rows[name].items()]
        for name in wanted
        if name != "ours" and rows[name]
    }
    ratio = statistics.median(ratios["eevdf"])
    share = statistics.median(r.share_error_points or 0.0 for r in ours.values())
    limit = statistics.median(r.max_error_percent or 0.0 for r in ours.values())
    details: dict[str, Any] = {
        "schedulers": {name: summary([*found.values()]) for name, found in rows.items() if found},
        "lost": lost,
        "late_p99_ratio": {f"ours/{name}": spread(found) for name, found in ratios.items()},
    }
    if "flatcg" not in wanted:
        details["left_out"] = "scx_flatcg could not be built here"
    report = BenchReport(
        "cpu",
        "guest" if "AGENTCG_EMULATED" in os.environ else "native",
        rounds,
        [
            Target("wake-up p99 over EEVDF's", ratio, "x", "<= 0.5", ratio <= 0.5),
            Target("shares by weight, off by", share, "pts", "<= 2", share <= 2),
            Target("cpu.max, off by", limit, "%", "<= 2", limit <= 2),
        ],
        details,
    )
    report.show()
    path = report.write()
    print(f"written: {path}")
    picture = plot.draw(json.loads(path.read_text()))
    print(f"drawn: {picture}" if picture else "not drawn: matplotlib is not installed")
    return 0


def main() -> int:
    """Build what is compared with, and measure where that can be done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--inside", action="store_true", help="measure on this very kernel")
    chosen = parser.parse_args()
    if chosen.inside or decide().kind == "native":
        return inside(chosen.rounds)
    # Imported here: a machine that measures natively needs no guest.
    from tests.guest.kernel import ensure

    kernel = ensure()
    try:
        flatcg.build(kernel.directory / "vmlinux", kernel.release)
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        print(f"cpu: without scx_flatcg, which could not be built: {error}", file=sys.stderr)
    python = [sys.executable, "-m"]
    measured = [*python, "bench.cpu.benchmark", "--inside", "--rounds", str(chosen.rounds)]
    command = [*python, "tests.guest.vm", "--timeout", "2400", "--", *measured]
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
