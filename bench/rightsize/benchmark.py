"""Benchmark `rightsize`: what becomes of ten fixed commands that size themselves by the machine, in
calls of two CPUs and a small limit of memory, with `calls.rightsize` and without.

Each worker takes a fixed amount of memory, of which two fit into the call and one for each CPU of
the machine do not. The commands ask for CPUs as real ones do: `nproc`, OpenMP, the CPUs that they
may run on, ninja's own way; three count as the documentation of a tool says that it does.

Needs controllers and eight CPUs or more:
python -m tests.guest.vm -c 8 -m 3000 -t 1800 -- .venv/bin/python -m bench.rightsize.benchmark
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from agentcgroup.v1 import agentcgroup_pb2 as pb
from bench.report import BenchReport, Target
from tests.harness import EXEC, AgentProcess, DaemonProcess, wait_until

MIB = 1 << 20
CPUS, MEMORY_MIB, WORKER_MIB = 2, 128, 32
LOAD = str(Path(EXEC).with_name("agentcg-load"))
ON = '[calls]\nrightsize = ["caps", "jobs", "affinity"]\n'
OFF = "[calls]\nrightsize = []\n"
RUN = """
done = subprocess.run([EXEC, "--cpu-max", cpus, "--memory-max", memory, "--", "bash", "-c", script],
                      cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
result = done.returncode
"""
WORK = "./work"
AFFINE = "import os, subprocess as s; n = len(os.sched_getaffinity(0)); "
SPAWN = "p = [s.Popen(['./work']) for _ in range(n)]; raise SystemExit(max(x.wait() for x in p))"
XDIST = (
    "import os; n = int(os.environ.get('PYTEST_XDIST_AUTO_NUM_WORKERS') or os.cpu_count()); "
    "import subprocess as s; "
)
ALL = "$(nproc --all)"
COMMANDS = {
    "make -j$(nproc)": "make -s -j$(nproc)",
    "ninja": "ninja --quiet",
    "xargs -P$(nproc)": f"seq 16 | xargs -P $(nproc) -I@ {WORK}",
    "a loop of jobs": f"for i in $(seq $(nproc)); do {WORK} & done; wait",
    "OpenMP": "./omp",
    "OpenMP, twice": "./omp && ./omp",
    "workers by affinity": f'{sys.executable} -S -c "{AFFINE}{SPAWN}"',
    "as pytest-xdist counts": f'{sys.executable} -S -c "{XDIST}{SPAWN}"',
    "as cargo counts": f"seq 16 | xargs -P ${{CARGO_BUILD_JOBS:-{ALL}}} -I@ {WORK}",
    "as Go counts": f"seq 16 | xargs -P ${{GOMAXPROCS:-{ALL}}} -I@ {WORK}",
}
OMP = """
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(void)
{
#pragma omp parallel
	{
		char *held = malloc(SIZE);
		memset(held, 1, SIZE);
		usleep(500000);
		free(held);
	}
	return 0;
}
"""


def prepare(folder: Path) -> None:
    """Write what the commands run: a worker, a makefile, a ninja file, an OpenMP program."""
    schedule = f"1 {WORKER_MIB * MIB} 0\n1000 {WORKER_MIB * MIB} 0\n"
    (folder / "schedule").write_text(schedule)
    (folder / "work").write_text(f"#!/bin/sh\nexec {LOAD} < schedule\n")
    (folder / "work").chmod(0o755)
    names = [f"t{n}" for n in range(16)]
    targets = "\n".join(f"{name}:\n\t@{WORK}\n" for name in names)
    (folder / "Makefile").write_text(f"all: {' '.join(names)}\n{targets}")
    builds = "\n".join(f"build {name}: work" for name in names)
    (folder / "build.ninja").write_text(f"rule work\n  command = {WORK}\n{builds}\n")
    (folder / "omp.c").write_text(OMP.replace("SIZE", str(WORKER_MIB * MIB)))
    compiler = ["gcc", "-O1", "-fopenmp", "-o", str(folder / "omp"), str(folder / "omp.c")]
    subprocess.run(compiler, check=True)


def measure(config: str, folder: Path, runs: int) -> list[pb.Report]:
    """The report of each command, run so often."""
    found: list[pb.Report] = []
    with tempfile.TemporaryDirectory(prefix="rs-") as directory:
        daemon = DaemonProcess(Path(directory), f'[pool]\nmemory_max = "1G"\n{config}')
        daemon.forks_agents = False
        try:
            daemon.start()
            agent = daemon.open("bench")
            for script in list(COMMANDS.values()) * runs:
                found.append(_run(daemon, agent, script, folder))
        finally:
            daemon.close()
    return found


def _run(daemon: DaemonProcess, agent: AgentProcess, script: str, folder: Path) -> pb.Report:
    agent.run(RUN, cpus=str(CPUS), memory=f"{MEMORY_MIB}M", script=script, cwd=str(folder))
    wait_until("it has ended", lambda: not daemon.call_dirs())
    report = daemon.admin.GetReport(pb.GetReportRequest())
    print(f"  {script[:60]:60} {report.memory_peak_bytes >> 20} MiB {report.sentence[:60]}")
    return report


def was_stopped(report: pb.Report) -> bool:
    """Whether a call, or a part of it, was killed or paused."""
    return bool(report.oom_kills or report.frozen_usec or report.verdict == pb.VERDICT_STOPPED)


def main() -> int:
    """Run the benchmark, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1, help="of each command, each way")
    runs = parser.parse_args().runs
    if (os.cpu_count() or 1) < 4 * CPUS or shutil.which("ninja") is None:
        raise SystemExit("this needs eight CPUs, gcc, make and ninja")
    with tempfile.TemporaryDirectory(prefix="rs-") as directory:
        prepare(Path(directory))
        found = {
            name: measure(config, Path(directory), runs)
            for name, config in (("off", OFF), ("on", ON))
        }
    stopped = {name: sum(map(was_stopped, reports)) for name, reports in found.items()}
    peaks = {name: sum(r.memory_peak_bytes for r in reports) for name, reports in found.items()}
    fewer = 100 * (1 - stopped["on"] / max(1, stopped["off"]))
    less = 100 * (1 - peaks["on"] / peaks["off"])
    targets = [
        Target("fewer calls killed or paused", fewer, "%", ">= 90", fewer >= 90),
        Target("less memory at the peak, all together", less, "%", ">= 60", less >= 60),
    ]
    where = os.environ.get("AGENTCG_GUEST", "host")
    details = {"stopped": stopped, "peaks_bytes": peaks, "cpus_granted": CPUS}
    report = BenchReport("rightsize", where, len(COMMANDS) * runs, targets, details)
    report.show()
    print(f"written: {report.write()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
