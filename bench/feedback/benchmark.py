"""Benchmark `feedback`: how many tasks are finished by an agent that obeys what it is told, and by
ones that see only an exit status.

A task is a command that fails because of one of five causes, and by how much its limit is too small
is recorded: the calls that grew past a limit that fits half of the large ones (the median peak of
those above 64 MiB), each in proportion to that limit. Memory is taken as recorded, scaled down; the
seconds and processes of the other tasks are their limit times the same proportion. Each scripted
agent may try each task twice:

- `obeys` reads the line that `agentcg exec` writes, and does what that says;
- `retries` runs the command again, as it is;
- `guesses` knows what the status most often means: after 137 it asks for twice the memory, after
  143 for twice the time, else it runs the command again.

Needs controllers; user-mode Linux has what it takes:
python -m tests.guest.uml -- .venv/bin/python -m bench.feedback.benchmark
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agentcgroup_lab.trace import format as trace_format
from bench.learning.predictors import rows_of
from bench.report import BenchReport, Target, recordings
from tests.harness import EXEC, AgentProcess, DaemonProcess

MIB = 1 << 20
LARGE_BYTES, SCALE, LEAST_BYTES = 64 * MIB, 16, 4 * MIB
ATTEMPTS, CASES_MAX = 2, 10
TIMEOUT_S, PIDS, SESSION_MIB, HELD_MIB, TAKEN_MIB, HELD_S = 2, 8, 64, 18, 40, 8
DISK_MIB, OLD_MIB, NEW_MIB = 8, 4, 6
CAUSES = ("memory", "timeout", "processes", "disk", "session")
LOAD = str(Path(EXEC).with_name("agentcg-load"))
FRONT = str(Path(EXEC).with_name("agentcg"))
MANY = (
    "import subprocess, sys\n"
    "begun = [subprocess.Popen(['sleep', '0.3']) for _ in range(int(sys.argv[1]))]\n"
    "for each in begun: each.wait()\n"
)
RUN = """
done = subprocess.run([front, "exec", *options, "--", "sh", "-c", script], capture_output=True,
                      text=True, cwd=cwd)
result = (done.returncode, done.stderr)
"""
HOLD = """
tool = subprocess.Popen([EXEC, "--name", "holder", "--", load], stdin=subprocess.PIPE, text=True)
tool.stdin.write(f"1 {mib << 20} 0\\n{seconds * 1000} {mib << 20} 0\\n")
tool.stdin.close()
def held():
    with open(f"/proc/{tool.pid}/status") as file:
        found = [line.split()[1] for line in file if line.startswith("RssAnon")]
    return int(found[0]) if found else 0
while held() < mib << 10 and tool.poll() is None: time.sleep(0.05)
"""
LET_GO = "tool.kill(); tool.wait()"
WAIT = "tool.wait()"


@dataclass(slots=True)
class Task:
    """A command, and the options of `agentcg exec` that an agent starts it with."""

    cause: str
    script: str
    options: dict[str, str]
    cwd: str = "/"
    waits: bool = field(default=False)
    """Whether the agent waits until its other calls have ended before the next attempt."""


Next = Callable[[Task, int, str], None]
"""An agent: changes a task after a status, and what was written on standard error."""

ASKED = re.compile(r"(memory_max|timeout|pids_max)=(\w+)")


def obeys(task: Task, status: int, said: str) -> None:
    """Do what the line says."""
    for name, value in ASKED.findall(said):
        task.options["--" + name.replace("_", "-")] = value
    if "remove what this task has made" in said:
        for name in ("old", "new"):
            Path(task.cwd, name).unlink(missing_ok=True)
    task.waits = "until other calls have ended" in said


def retries(task: Task, status: int, said: str) -> None:
    """Run it again."""


def guesses(task: Task, status: int, said: str) -> None:
    """Do what the status most often calls for."""
    if status in (-9, 137) and "--memory-max" in task.options:
        mib = int(task.options["--memory-max"].removesuffix("M"))
        task.options["--memory-max"] = f"{2 * mib}M"
    elif status in (-15, 143) and "--timeout" in task.options:
        seconds = int(task.options["--timeout"].removesuffix("s"))
        task.options["--timeout"] = f"{2 * seconds}s"


AGENTS: dict[str, Next] = {"obeys": obeys, "retries": retries, "guesses": guesses}


def cases(folder: Path) -> tuple[list[int], int]:
    """Peaks of the recorded calls that are killed, in bytes, and the limit that kills them."""
    paths = sorted(folder.glob("*.jsonl*"))
    if not paths:
        raise SystemExit(f"{folder} holds no recordings (*.jsonl, *.jsonl.gz)")
    rows = [row for i, path in enumerate(paths) for row in rows_of(trace_format.read(path), i)]
    large = [row.peak_bytes for row in rows if row.peak_bytes > LARGE_BYTES]
    limit = int(statistics.median(large))
    return sorted(peak for peak in large if peak > limit), limit


def task_of(cause: str, peak: int, limit: int, disk: Path) -> Task:
    """The task of a cause for a recorded peak, and the limit that it went past."""
    over = peak / limit
    if cause == "memory":
        taken, allowed = max(peak // SCALE, LEAST_BYTES), max(limit // SCALE, LEAST_BYTES)
        script = f"echo '1 {taken} 0' | exec {LOAD}"
        return Task(cause, script, {"--memory-max": f"{allowed // MIB}M"})
    if cause == "timeout":
        return Task(cause, f"exec sleep {TIMEOUT_S * over:.2f}", {"--timeout": f"{TIMEOUT_S}s"})
    if cause == "processes":
        many = f'exec {sys.executable} -c "{MANY}" {int(PIDS * over)}'
        return Task(cause, many, {"--pids-max": str(PIDS)})
    if cause == "disk":
        (disk / "new").unlink(missing_ok=True)
        (disk / "old").write_bytes(bytes(OLD_MIB * MIB))
        return Task(cause, f"exec head -c {NEW_MIB}M /dev/zero > new", {}, str(disk))
    script = f"echo '1 {TAKEN_MIB * MIB} 0' | exec {LOAD}"
    return Task(cause, script, {"--priority": "batch"})


def is_finished(agent: AgentProcess, task: Task, follow: Next) -> bool:
    """Whether an agent finishes a task."""
    if task.cause == "session":
        agent.run(HOLD, load=LOAD, mib=HELD_MIB, seconds=HELD_S)
    try:
        for attempt in range(ATTEMPTS):
            words = [word for pair in task.options.items() for word in pair]
            status, said = agent.run(
                RUN, front=FRONT, options=words, script=task.script, cwd=task.cwd
            )
            if status == 0:
                return True
            if attempt < ATTEMPTS - 1:
                follow(task, status, said)
                if task.waits and task.cause == "session":
                    agent.run(WAIT)
        return False
    finally:
        if task.cause == "session":
            agent.run(LET_GO)


@contextmanager
def small_disk() -> Iterator[Path]:
    """A file system with little room."""
    with tempfile.TemporaryDirectory(prefix="fb-") as directory:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}M", "none", directory], check=True
        )
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


def measure(peaks: Sequence[int], limit: int) -> dict[str, dict[str, int]]:
    """Tasks that each agent finished, by cause."""
    found = {name: dict.fromkeys(CAUSES, 0) for name in AGENTS}
    with tempfile.TemporaryDirectory(prefix="fb-") as directory, small_disk() as disk:
        daemon = DaemonProcess(Path(directory), '[pool]\nmemory_max = "640M"\n')
        daemon.forks_agents = False
        try:
            daemon.start()
            for name, follow in AGENTS.items():
                wide = daemon.open(name)
                narrow = daemon.open(f"{name}-narrow", memory_max=f"{SESSION_MIB}M")
                for cause in CAUSES:
                    for peak in peaks:
                        task = task_of(cause, peak, limit, disk)
                        agent = narrow if cause == "session" else wide
                        found[name][cause] += is_finished(agent, task, follow)
                    print(f"{name}: {cause}: {found[name][cause]} of {len(peaks)}", flush=True)
        finally:
            daemon.close()
    return found


def main() -> int:
    """Run the benchmark, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=recordings(), help="directory of recordings")
    parser.add_argument("--cases", type=int, default=CASES_MAX, help="of each cause, evenly taken")
    arguments = parser.parse_args()
    every, limit = cases(arguments.traces)
    step = max(1, len(every) // arguments.cases)
    peaks = every[::step][: arguments.cases]
    found = measure(peaks, limit)
    finished = {name: sum(by_cause.values()) for name, by_cause in found.items()}
    count = len(peaks) * len(CAUSES)
    for name, tasks in finished.items():
        print(f"{name}: {tasks} of {count} tasks finished, with {ATTEMPTS} attempts at each")
    targets = []
    for other in ("retries", "guesses"):
        ratio = finished["obeys"] / max(1, finished[other])
        targets.append(Target(f"tasks finished, over `{other}`", ratio, "x", ">= 2", ratio >= 2))
    where = os.environ.get("AGENTCG_GUEST", "host")
    over = [round(peak / limit, 2) for peak in peaks]
    details = {"finished": found, "limit_bytes": limit, "cases_recorded": len(every), "over": over}
    report = BenchReport("feedback", where, count, targets, details)
    report.show()
    print(f"written: {report.write()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
