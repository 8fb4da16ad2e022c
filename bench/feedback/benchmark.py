"""Benchmark `feedback`: how many tasks are finished by an agent that obeys what it is told, and by
one that sees only an exit status.

The cases are the recorded calls that grew past a limit that fits half of the large ones (the median
peak of those above 64 MiB): each is killed there, as recorded. Memory is scaled down; what a call
takes is taken by a program that grows to that. Three scripted agents have four attempts at each:

- `obeys` reads the line that `agentcg exec` writes, and asks for what that names;
- `retries` sees 137 and runs the command again, as it is;
- `guesses` knows what 137 may mean, and tries in turn: again, a longer timeout, twice the memory.

Needs controllers; user-mode Linux has what it takes:
python -m tests.guest.uml -- .venv/bin/python -m bench.feedback.benchmark
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from agentcgroup_lab.trace import format as trace_format
from bench.learning.predictors import rows_of
from bench.report import BenchReport, Target, recordings
from tests.harness import EXEC, AgentProcess, DaemonProcess

MIB = 1 << 20
LARGE_BYTES, SCALE, LEAST_BYTES = 64 * MIB, 16, 4 * MIB
ATTEMPTS, CASES_MAX = 4, 40
LOAD = str(Path(EXEC).with_name("agentcg-load"))
FRONT = str(Path(EXEC).with_name("agentcg"))
ASKED = re.compile(r"memory_max=(\d+)M")
RUN = """
done = subprocess.run([front, "exec", *options, "--", "sh", "-c", script], capture_output=True,
                      text=True)
result = (done.returncode, done.stderr)
"""
Options = dict[str, str]
Next = Callable[[Options, int, str], Options]
"""An agent: its options for the next attempt, from those of the last, the attempt's number, and
what the last one wrote on standard error."""


def obeys(options: Options, attempt: int, said: str) -> Options:
    """Ask for what the line names."""
    found = ASKED.search(said)
    return {**options, "--memory-max": f"{found[1]}M"} if found else options


def retries(options: Options, attempt: int, said: str) -> Options:
    """Run it again."""
    return options


def guesses(options: Options, attempt: int, said: str) -> Options:
    """Try one remedy after the other, without a word on which is the right one."""
    if attempt == 2:
        return {**options, "--timeout": "10m"}
    if attempt == 3:
        mib = int(options["--memory-max"].removesuffix("M"))
        return {**options, "--memory-max": f"{2 * mib}M"}
    return options


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


def attempts_of(agent: AgentProcess, peak_bytes: int, limit_bytes: int, follow: Next) -> int | None:
    """The attempts that an agent needs to finish a task; None: it does not."""
    options = {"--memory-max": f"{max(limit_bytes, LEAST_BYTES) // MIB}M"}
    script = f"echo '1 {peak_bytes} 0' | exec {LOAD}"
    said = ""
    for attempt in range(ATTEMPTS):
        options = follow(options, attempt, said) if attempt else options
        words = [word for pair in options.items() for word in pair]
        status, said = agent.run(RUN, front=FRONT, options=words, script=script)
        if status == 0:
            return attempt + 1
    return None


def measure(peaks: Sequence[int], limit: int) -> dict[str, list[int | None]]:
    """The attempts of each agent at each case."""
    found: dict[str, list[int | None]] = {name: [] for name in AGENTS}
    with tempfile.TemporaryDirectory(prefix="fb-") as directory:
        daemon = DaemonProcess(Path(directory), '[pool]\nmemory_max = "640M"\n')
        daemon.forks_agents = False
        try:
            daemon.start()
            for name, follow in AGENTS.items():
                agent = daemon.open(name)
                for peak in peaks:
                    scaled = max(peak // SCALE, LEAST_BYTES)
                    found[name].append(attempts_of(agent, scaled, limit // SCALE, follow))
        finally:
            daemon.close()
    return found


def main() -> int:
    """Run the benchmark, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=recordings(), help="directory of recordings")
    parser.add_argument("--cases", type=int, default=CASES_MAX, help="evenly taken of all")
    arguments = parser.parse_args()
    every, limit = cases(arguments.traces)
    step = max(1, len(every) // arguments.cases)
    peaks = every[::step][: arguments.cases]
    found = measure(peaks, limit)
    finished = {name: sum(n is not None for n in runs) for name, runs in found.items()}
    for name, runs in found.items():
        tried = sum(ATTEMPTS if n is None else n for n in runs)
        print(f"{name}: {finished[name]} of {len(peaks)} tasks finished, in {tried} attempts")
    targets = []
    for other in ("retries", "guesses"):
        ratio = finished["obeys"] / max(1, finished[other])
        targets.append(Target(f"tasks finished, over `{other}`", ratio, "x", ">= 2", ratio >= 2))
    where = os.environ.get("AGENTCG_GUEST", "host")
    details = {"finished": finished, "limit_bytes": limit, "cases_recorded": len(every)}
    report = BenchReport("feedback", where, len(peaks), targets, details)
    report.show()
    print(f"written: {report.write()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
