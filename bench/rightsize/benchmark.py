"""Benchmark `rightsize`: ten commands that ask the machine how much there is, in a call of two
cores and 2 GiB, by what tells them how much they get (`calls.rightsize`).

`nothing`: they are told nothing. `caps`: the default. `all`: caps, jobs and affinity. Of each
command: whether its call was killed or paused, its peak of memory, its wall time. Several calls run
at a time, the CPUs permitting, each in its own limits. An eleventh command takes an eighth of the
machine's memory: nothing can tell it less, so it is shown and not counted.

Meant for a machine of 16 cores with controllers, some three minutes. Elsewhere --memory and --cpus
make the call smaller: python -m bench.rightsize.benchmark --memory 256 --cpus 1
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.report import RESULTS, BenchReport, Target
from bench.rightsize.commands import MIB, Command, prepare
from tests.harness import DaemonProcess, controllers

ARMS = {"nothing": "[]", "caps": '["caps"]', "all": '["caps", "jobs", "affinity"]'}
KILLED_LESS, PEAK_LESS = 0.9, 0.6
RUN = """
from concurrent.futures import ThreadPoolExecutor
import time
def one(item):
    name, script = item
    begun = time.monotonic()
    done = agent.run(["bash", "-c", script], name=name, cwd=cwd, stdout=-3, stderr=-1,
                     stdin=-3, cpu_max=cpus, memory_max=memory, call_timeout="170s", env=env)
    report = done.report
    return (name, done.returncode, str(report.verdict), report.memory_peak_bytes or 0,
            report.frozen_usec / 1e6, time.monotonic() - begun, done.stderr[-300:].decode())
with ThreadPoolExecutor(at_once) as pool:
    result = list(pool.map(one, items))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A command's end."""

    name: str
    status: int
    verdict: str
    peak_bytes: int
    paused_s: float
    wall_s: float
    stderr: str

    @property
    def is_harmed(self) -> bool:
        """Whether it was killed, was paused or did not finish its work."""
        return self.status != 0 or self.paused_s > 0 or self.verdict.startswith("oom")


def measure(
    arm: str, commands: list[Command], folder: Path, arguments: argparse.Namespace
) -> list[Run]:
    """Run all commands in calls of a daemon of their own."""
    # What a user has set would stay, and `make` has set some of it for its own.
    kept = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "PYTHONPATH", "TMPDIR")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    values = {"cwd": str(folder), "env": env, "cpus": str(arguments.cpus)}
    values |= {"memory": f"{arguments.memory}M"}
    items = [(command.name, command.script) for command in commands]
    with tempfile.TemporaryDirectory(prefix="rs-") as directory:
        config = f"[bpf]\nenabled = false\n[calls]\nrightsize = {ARMS[arm]}\n"
        daemon = DaemonProcess(Path(directory), config)
        # A forked agent shares memory with this process, which the OOM killer counts.
        daemon.forks_agents = False
        try:
            daemon.start()
            agent = daemon.open(arm)
            found = agent.run(RUN, items=items, at_once=arguments.at_once, **values)
        finally:
            daemon.close()
    return [Run(*row) for row in found]


def main() -> int:
    """Run the benchmark, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, default=2048, help="of a call, in MiB")
    parser.add_argument("--cpus", type=int, default=2, help="of a call")
    cpus = os.cpu_count() or 1
    parser.add_argument("--at-once", type=int, default=0, help="calls at a time")
    parser.add_argument("--only", nargs="*", help="names of commands")
    parser.add_argument("--work", type=int, default=3_000_000, help="of a worker, in turns")
    python = "Python of the pools of processes; from 3.13 on, os.cpu_count can be told"
    parser.add_argument("--pool-python", default=sys.executable, metavar="PROGRAM", help=python)
    arguments = parser.parse_args()
    arguments.at_once = arguments.at_once or max(1, cpus // arguments.cpus - 1)
    if "memory" not in controllers():
        print("no memory controller here: that the commands run is all that is seen")
    RESULTS.mkdir(parents=True, exist_ok=True)
    # Files in /tmp may be memory of the call that writes them.
    with tempfile.TemporaryDirectory(prefix="rs-", dir=RESULTS) as directory:
        commands = prepare(Path(directory), arguments.memory, arguments.work, arguments.pool_python)
        commands = [c for c in commands if not arguments.only or c.name in arguments.only]
        runs: dict[str, list[Run]] = {}
        seconds: dict[str, float] = {}
        for arm in ARMS:
            begun = time.monotonic()
            runs[arm] = measure(arm, commands, Path(directory), arguments)
            seconds[arm] = time.monotonic() - begun
            _show(arm, seconds[arm], commands, runs[arm])
    return _report(commands, runs, seconds, arguments)


def _show(arm: str, seconds: float, commands: list[Command], found: list[Run]) -> None:
    print(f"\n{arm}: {seconds:.0f} s")
    for command, run in zip(commands, found, strict=True):
        end = "finished" if not run.is_harmed else f"harmed, {run.verdict}, {run.status}"
        print(
            f"  {command.name:15} {command.asks:30} {run.peak_bytes // MIB:5} MiB "
            f"{run.wall_s:6.1f} s  {end}",
            flush=True,
        )
        if run.status and run.stderr.strip():
            print(f"    {run.stderr.strip()!r}")


def _report(
    commands: list[Command],
    runs: dict[str, list[Run]],
    seconds: dict[str, float],
    arguments: argparse.Namespace,
) -> int:
    counted = {command.name for command in commands if command.is_counted}
    harmed = {a: sum(r.is_harmed for r in found if r.name in counted) for a, found in runs.items()}
    peak = {a: sum(r.peak_bytes for r in found if r.name in counted) for a, found in runs.items()}
    targets = []
    for arm in ("caps", "all"):
        less = 1 - harmed[arm] / max(1, harmed["nothing"])
        targets.append(
            Target(
                f"{arm}: fewer killed or paused ({harmed[arm]} for "
                f"{harmed['nothing']} of {len(counted)})",
                less * 100,
                "%",
                ">= 90",
                less >= KILLED_LESS,
            )
        )
        less = 1 - peak[arm] / max(1, peak["nothing"])
        targets.append(
            Target(
                f"{arm}: less peak memory in sum ({peak[arm] // MIB} for "
                f"{peak['nothing'] // MIB} MiB)",
                less * 100,
                "%",
                ">= 60",
                less >= PEAK_LESS,
            )
        )
    rows = {
        arm: {r.name: [r.status, r.verdict, r.peak_bytes, r.paused_s, r.wall_s] for r in found}
        for arm, found in runs.items()
    }
    details = {
        "runs": rows,
        "seconds": seconds,
        "python": platform.python_version(),
        "pool_python": arguments.pool_python,
        "call": {"cpus": arguments.cpus, "memory_mib": arguments.memory},
        "at_once": arguments.at_once,
    }
    where = os.environ.get("AGENTCG_GUEST", "host")
    report = BenchReport("rightsize", where, len(counted), targets, details)
    report.show()
    print(f"written: {report.write()}")
    return 0 if all(target.met for target in targets if target.name.startswith("all")) else 1


if __name__ == "__main__":
    sys.exit(main())
