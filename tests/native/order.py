"""Scenarios for the scheduler's order: simulated CPUs and tasks, and what each cgroup gets.

    scenario = Scenario(cpus=4)
    a = scenario.cgroup(weight=300)
    scenario.hogs(a, 6)
    result = scenario.run(seconds=5)
    result.used_ns[a]

The order is the header that the BPF program includes, compiled by the machine's compiler.
`python -m tests.native.order` measures how many switches a second it makes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

HERE = Path(__file__).parent
FOREVER_USEC = 10**12
WARM_UP_S = 1
WORD = (1 << 64) - 1


@cache
def build(name: str) -> Path:
    """Compile a program of this folder; once for the process. Returns its path."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("clang")
    assert compiler, "no C compiler"
    program = Path(mkdtemp(prefix="agentcg-order-")) / name
    machine = f'-DSCHED_MACHINE_H="{HERE / "machine.h"}"'
    warnings = ("-Wall", "-Wno-unused-function", "-Werror")
    source = HERE / f"{name}.c"
    command = (compiler, "-O2", *warnings, "-pthread", machine, "-o", str(program), str(source))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a scenario: CPU time by cgroup, and what the dispatches cost."""

    used_ns: dict[int, int]
    dispatches: int
    steps: int
    """Turns of loops, in all dispatches."""
    steps_most: int
    """In one dispatch."""
    locks: int
    time_ns: int
    """What all dispatches took, on this machine."""

    def shares(self, cgroups: list[int]) -> list[float]:
        """Shares in percent of what these had together."""
        total = sum(self.used_ns[cgroup] for cgroup in cgroups)
        return [100 * self.used_ns[cgroup] / total for cgroup in cgroups]


@dataclass(frozen=True, slots=True)
class Speed:
    """Switches between the tasks of a tree in which all have something to run."""

    per_second: float
    """Switches of all threads together, by the CPU time of each."""
    steps: float
    """Turns of loops, of one switch."""
    locks: float
    """Locks taken, of one switch."""


def speed(sessions: int, calls: int, threads: int, rounds: int = 200_000) -> Speed:
    """Measure on this machine's CPUs, one for each thread; `calls`: of each session."""
    command = [str(build("switches")), *map(str, (sessions, calls, threads, rounds))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    return Speed(*map(float, done.stdout.split()))


@dataclass(slots=True)
class Scenario:
    """Cgroups, tasks and CPUs; CPUs that are `away` run none of these tasks."""

    cpus: int
    slice_usec: int = 4000
    away: tuple[int, ...] = ()
    lines: list[str] = field(default_factory=list)
    cgroups: int = 0

    def cgroup(self, parent: int = 0, weight: int = 100) -> int:
        """Make a cgroup; returns its number."""
        self.lines.append(f"cgroup {parent} {weight}")
        self.cgroups += 1
        return self.cgroups

    def task(
        self,
        cgroup: int,
        on: Iterable[int] | None = None,
        since_s: float = 0,
        until_s: float | None = None,
        run_usec: int = 0,
        sleep_usec: int = 0,
    ) -> None:
        """Add a task that may run on these CPUs (None: on all). It always has something to run, or
        sleeps for `sleep_usec` after each `run_usec`."""
        end = FOREVER_USEC if until_s is None else round(until_s * 1e6)
        mask = sum(1 << cpu for cpu in (range(self.cpus) if on is None else set(on)))
        words = ",".join(f"{mask >> 64 * i & WORD:x}" for i in range(self.cpus // 64 + 1))
        times = f"{round(since_s * 1e6)} {end} {run_usec} {sleep_usec}"
        self.lines.append(f"task {cgroup} {words} {times}")

    def hogs(self, cgroup: int, count: int) -> None:
        """Add tasks that always have something to run, anywhere."""
        for _ in range(count):
            self.task(cgroup)

    def run(self, seconds: float = 5, warm_up_s: float = WARM_UP_S) -> Result:
        """Simulate `seconds` after the warm-up, which is not counted."""
        times = f"{round(warm_up_s * 1e6)} {round((warm_up_s + seconds) * 1e6)}"
        lines = [
            *(f"away {cpu}" for cpu in self.away),
            *self.lines,
            f"run {self.cpus} {self.slice_usec} {times}",
        ]
        text = "\n".join(lines) + "\n"
        done = subprocess.run(
            [build("order")], input=text, capture_output=True, text=True, check=True, timeout=100
        )
        used: dict[int, int] = {}
        for line in done.stdout.splitlines():
            what, *numbers = line.split()
            if what == "used":
                used[int(numbers[0])] = int(numbers[1])
        dispatches, steps, most, locks, time_ns = map(int, numbers)
        return Result(used, dispatches, steps, most, locks, time_ns)


def main() -> None:
    """Print switches a second for some trees, with one thread and with one for each CPU."""
    threads = min(8, len(os.sched_getaffinity(0)))
    print("sessions  calls  threads  switches/s  loops  locks")
    for sessions, calls in ((1, 1000), (50, 20), (1000, 10)):
        for count in sorted({1, threads}):
            found = speed(sessions, calls, count, 1_000_000)
            numbers = f"{found.per_second:10,.0f}  {found.steps:5.0f}  {found.locks:5.1f}"
            print(f"{sessions:8}  {calls:5}  {count:7}  {numbers}")


if __name__ == "__main__":
    main()
