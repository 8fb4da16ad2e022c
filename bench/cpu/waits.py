"""How long an important call waits from when it is queued to when it runs, as the kernel sees it.

    python -m bench.cpu.waits [--wakeups 2000] [--cpus 2]

The load is that of the benchmark `cpu`: a call that wakes and runs a little, beside four times as
many CPU-bound calls as there are CPUs, under EEVDF and under ours with the same weights. The times
are those of the kernel's tracepoints sched_wakeup (the task is in a queue) and sched_switch (it
runs), so nothing of the program that wakes is in them, nor of what it takes to end a sleep.

Wake-ups are told apart by where the task gets its CPU. On the CPU that wakes it, that CPU switches
at its next chance. On another one, an interrupt has to reach it first; QEMU runs all CPUs in turn
in one thread, so that one waits for its turn to be run at all. With `--cpus 1` there is no other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from agentcgroupd.intents.grant import weight_of_priority
from bench.cpu.benchmark import (
    IMPORTANT,
    NORMAL,
    OVERSUBSCRIBED,
    RUN_USEC,
    SLEEP_MS,
    describe,
    policy_for,
    scheduled_by,
)
from bench.report import RESULTS, ROOT, quantile
from tests.guest.cpu_load import Load
from tests.guest.where import decide

WAKEUPS = 2000
TRACING = Path("/sys/kernel/tracing")
EVENT = re.compile(r"\[(\d+)\] \S+ +(\d+\.\d+): (sched_wakeup|sched_switch): ")


@dataclass(frozen=True, slots=True)
class Wait:
    """A wake-up: the time in a queue, in us, and whether the CPU that woke the task ran it."""

    usec: float
    here: bool


class Trace:
    """The kernel's trace of one task's wake-ups, on for the length of a `with`."""

    def __init__(self, pid: int) -> None:
        """`pid`: of the task."""
        if not (TRACING / "trace").exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
        self._write("trace_clock", "mono")
        self._write("buffer_size_kb", "8192")
        self._write("trace", "")
        self._write("events/sched/sched_wakeup/filter", f"pid == {pid}")
        self._write("events/sched/sched_switch/filter", f"next_pid == {pid}")

    def _write(self, name: str, value: str) -> None:
        (TRACING / name).write_text(value)

    def __enter__(self) -> Trace:
        for name in ("wakeup", "switch"):
            self._write(f"events/sched/sched_{name}/enable", "1")
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("wakeup", "switch"):
            self._write(f"events/sched/sched_{name}/enable", "0")

    def waits(self) -> list[Wait]:
        """Return what was seen: each wake-up with the switch to the task that follows."""
        found: list[Wait] = []
        woke: tuple[float, str] | None = None
        for line in (TRACING / "trace").read_text(encoding="ascii", errors="replace").splitlines():
            event = EVENT.search(line)
            if not event:
                continue
            cpu, at, what = event.groups()
            if what == "sched_wakeup":
                woke = float(at), cpu
            elif woke:
                found.append(Wait((float(at) - woke[0]) * 1e6, cpu == woke[1]))
                woke = None
        return found


def measure(name: str, wakeups: int, seed: int) -> list[Wait]:
    """Let the important call wake as often beside its load under a scheduler."""
    dice = random.Random(seed)
    plan = [(dice.uniform(*SLEEP_MS) / 1e3, dice.uniform(*RUN_USEC) / 1e6) for _ in range(wakeups)]

    def wake() -> None:
        time.sleep(1)
        for sleep_s, run_s in plan:
            time.sleep(sleep_s)
            end = time.monotonic() + run_s
            while time.monotonic() < end:
                pass

    with Load(policy_for(name)) as load, scheduled_by(name) as scheduler:
        load.make("vip", weight_of_priority(IMPORTANT))
        load.make("vip/call", weight_of_priority(IMPORTANT))
        describe(scheduler, load, "vip", "vip/call")
        for i in range(OVERSUBSCRIBED * (os.cpu_count() or 1)):
            load.make(f"s{i}", weight_of_priority(NORMAL))
            load.make(f"s{i}/call", weight_of_priority(NORMAL))
            load.start(f"s{i}/call")
        pid = load.start("vip/call", wake)
        with Trace(pid) as trace:
            load.wait(pid)
        return trace.waits()


def summary(waits: list[Wait]) -> dict[str, float]:
    """Count and quantiles, of all and by where the task ran."""
    found: dict[str, float] = {}
    parts = {
        "all": waits,
        "here": [wait for wait in waits if wait.here],
        "elsewhere": [wait for wait in waits if not wait.here],
    }
    for part, some in parts.items():
        times = sorted(wait.usec for wait in some)
        found[f"{part}_n"] = len(times)
        if times:
            found[f"{part}_p50_usec"] = round(quantile(times, 0.5))
            found[f"{part}_p99_usec"] = round(quantile(times, 0.99))
            found[f"{part}_max_usec"] = round(times[-1])
    return found


def inside(wakeups: int) -> int:
    """Measure on this very kernel."""
    found = {}
    for name in ("eevdf", "ours"):
        found[name] = summary(measure(name, wakeups, 1))
        print(f"{name}: {found[name]}", flush=True)
    ratio = found["ours"]["all_p99_usec"] / found["eevdf"]["all_p99_usec"]
    print(f"p99 of ours over EEVDF's: {ratio:.2f} (target: at most 0.5)")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"cpu-waits-{os.cpu_count()}.json"
    path.write_text(json.dumps({"kernel": os.uname().release, "ratio": ratio, **found}, indent=1))
    return 0


def main() -> int:
    """Measure where that can be done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wakeups", type=int, default=WAKEUPS)
    parser.add_argument("--cpus", type=int, default=2, help="of the guest")
    parser.add_argument("--inside", action="store_true", help="measure on this very kernel")
    chosen = parser.parse_args()
    if chosen.inside or decide().kind == "native":
        return inside(chosen.wakeups)
    python = [sys.executable, "-m"]
    guest = [*python, "tests.guest.vm", "--timeout", "2400", "--cpus", str(chosen.cpus), "--"]
    measured = [*python, "bench.cpu.waits", "--inside", "--wakeups", str(chosen.wakeups)]
    os.chdir(ROOT)
    os.execv(guest[0], [*guest, *measured])


if __name__ == "__main__":
    sys.exit(main())
