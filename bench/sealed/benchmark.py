"""Benchmark `sealed`: what a declared call costs in a sandbox that refuses sockets, and whether
each gets a cgroup of its own and the intent that it declares.

A worker in each kind of sandbox, and one in none, start `agentcg exec` in turns, so that all of
them meet the same machine; each measures the time of its own spawns, without that of its sandbox.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import BenchReport, Target, spread
from tests.harness import EXEC, SLOW, DaemonProcess, wait_until
from tests.sandbox import compile_filter, sandbox

CALLS = 1000
MOST = 1.5
FRONT = str(Path(EXEC).with_name("agentcg"))
BARE = "no sandbox"
SANDBOXES = {
    "socket refused": "socket",
    "connect refused": "connect",
    "bubblewrap, socket refused": "all",
    "bubblewrap, connect refused": "all, connect",
}
WORKER = """
import os, sys, time
front = sys.argv[1]
for line in sys.stdin:
    number = int(line)
    argv = [front, "exec", f"--name={sys.argv[2]}-{number}", "--memory-max", f"{number + 1}M"]
    argv += ["--on-unavailable=refuse", "--", "grep", "-q", "/call-", "/proc/self/cgroup"]
    started = time.perf_counter()
    pid = os.posix_spawn(front, argv, os.environ)
    status = os.waitpid(pid, 0)[1]
    print((time.perf_counter() - started) * 1e3, status, flush=True)
"""
TURNS = """
workers = {
    name: subprocess.Popen(
        [*before, sys.executable, "-c", worker, front, name.replace(" ", "-")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )
    for name, before in sandboxes.items()
}
result = {name: [] for name in workers}
names = list(workers)
for number in range(count):
    for at in range(len(names)):
        name = names[(at + number) % len(names)]
        workers[name].stdin.write(f"{number}\\n")
        workers[name].stdin.flush()
        ms, status = workers[name].stdout.readline().split()
        result[name].append((float(ms), int(status)))
for worker in workers.values():
    worker.stdin.close()
    worker.wait()
"""


def _honoured(begun: list[dict[str, Any]], name: str, count: int) -> int:
    """How many calls of a sandbox began with the intent that they declared."""
    prefix = name.replace(" ", "-") + "-"
    found = set()
    for call in begun:
        number = call["name"].removeprefix(prefix)
        if number != call["name"] and not call["observed"]:
            if call["grant"]["memory_max_bytes"] == (int(number) + 1) << 20:
                found.add(int(number))
    return len(found & set(range(count)))


def measure(daemon: DaemonProcess, directory: Path, count: int) -> BenchReport:
    """Run all sandboxes in turns."""
    refuse = compile_filter(directory)
    before = {name: sandbox(kind, refuse) for name, kind in SANDBOXES.items()}
    agent = daemon.open("bench")
    values: dict[str, Any] = {"worker": WORKER, "front": FRONT, "count": count}
    found = agent.run(TURNS, sandboxes={BARE: [], **before}, **values)
    wait_until("all calls have ended", lambda: not daemon.call_dirs(), 60)
    entries = [json.loads(line) for line in daemon.audit_lines()]
    begun = [entry for entry in entries if entry["event"] == "call_begun"]
    cases = {}
    targets = []
    for name, rows in found.items():
        own = sum(status == 0 for _, status in rows)
        honoured = _honoured(begun, name, count)
        cases[name] = {"ms": spread([ms for ms, _ in rows]), "own": own, "honoured": honoured}
        targets.append(Target(f"{name}: in a leaf of their own", own, "", str(count), own == count))
        row = f"{name}: the declared intent honoured"
        targets.append(Target(row, honoured, "", str(count), honoured == count))
    bare = cases[BARE]["ms"]["p50"]
    for name in SANDBOXES:
        ratio = cases[name]["ms"]["p50"] / bare
        row = f"{name}: median over that in no sandbox ({bare:.2f} ms)"
        targets.append(Target(row, ratio, "x", f"<= {MOST}", ratio <= MOST))
    where = "guest" if SLOW > 1 else "host"
    return BenchReport("sealed", where, count, targets, {"cases": cases})


def main() -> int:
    """Start a daemon, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS if SLOW == 1 else 30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
        daemon = DaemonProcess(Path(directory))
        try:
            daemon.start()
            report = measure(daemon, Path(directory), arguments.calls)
        finally:
            daemon.close()
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(t.met for t in report.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
