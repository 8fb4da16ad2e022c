"""Benchmark `misplaced`: how much of what an undeclared call touches before it is moved stays
charged to its agent.

A program that grows as fast as it can is started by a process in a session, again and again; when
it has been moved it counts its own pages that are charged to the agent's leaf, by the kernel's word
for each page. So nothing else that the agent does is counted. What the same start costs is measured
as well: the time of the agent's spawn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import BenchReport, Target, spread
from tests.harness import SLOW, AgentProcess, DaemonProcess

SOURCE = Path(__file__).with_name("grower.c")
CALLS, MOST_BYTES = 200, 256 << 10
GROWN_MIB = 24
ONE = """
began = time.perf_counter()
child = subprocess.Popen([program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
spawned = time.perf_counter() - began
told = child.stdout.readline()
where = open(f"/proc/{child.pid}/cgroup").read()
child.stdin.close()
child.wait()
result = (int(told), "/call-" in where, spawned * 1e3)
"""


def measure(
    daemon: DaemonProcess, agent: AgentProcess, program: Path, mib: int, count: int
) -> dict[str, Any]:
    """Start the program that often: bytes misplaced of each, and the times."""
    leaf = (daemon.cgroup_dir / "bench/agent").stat().st_ino
    values: dict[str, Any] = {"program": str(program), "arguments": [str(mib), str(leaf)]}
    rows = [agent.run(ONE, **values) for _ in range(count + 2)][2:]
    moved = [
        entry["since_exec_usec"] / 1e3
        for entry in map(json.loads, daemon.audit_lines())
        if entry["event"] == "call_moved"
    ]
    return {
        "kib": spread([told / 1024 for told, _, _ in rows]),
        "in_a_call": sum(in_call for _, in_call, _ in rows),
        "spawn_ms": spread([ms for _, _, ms in rows]),
        "moved_ms": spread(moved),
        "each_kib": [told // 1024 for told, _, _ in rows],
    }


def main() -> int:
    """Start a daemon, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS if SLOW == 1 else 60)
    parser.add_argument("--mib", type=int, default=GROWN_MIB, help="how far each call grows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
        program = Path(directory) / "grower"
        options = ["-O2", "-Wall", "-Wextra", "-Werror", "-static"]
        subprocess.run(["cc", *options, "-o", str(program), str(SOURCE)], check=True)
        daemon = DaemonProcess(Path(directory), "[boundaries]\nenabled = true\n")
        try:
            daemon.start()
            agent = daemon.open("bench")
            case = measure(daemon, agent, program, arguments.mib, arguments.calls)
        finally:
            daemon.close()
    targets = [
        Target("bytes in the wrong place, p50", case["kib"]["p50"], "KiB", "none", True),
        Target(
            "bytes in the wrong place, p99",
            case["kib"]["p99"],
            "KiB",
            f"<= {MOST_BYTES >> 10}",
            case["kib"]["p99"] <= MOST_BYTES >> 10,
        ),
        Target("the agent's spawn, p50", case["spawn_ms"]["p50"], "ms", "none", True),
        Target("from exec to moved, p50", case["moved_ms"]["p50"], "ms", "none", True),
        Target("from exec to moved, p99", case["moved_ms"]["p99"], "ms", "none", True),
    ]
    where = "guest" if SLOW > 1 else "host"
    report = BenchReport("misplaced", where, arguments.calls, targets, {"case": case})
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(target.met for target in report.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
