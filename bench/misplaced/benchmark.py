"""Benchmark `misplaced`: how much of what an undeclared call touches before it is moved stays
charged to its agent.

A program that grows as fast as it can is started by a process in a session, again and again. It
says how much it had touched when it found itself in its call, and, where the kernel has the memory
controller, how many bytes of its own are charged to the agent's leaf, by the kernel's word for each
page. So nothing else that the agent does is counted. What the same start costs is measured as well:
the time of the agent's spawn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.misplaced.fanotify import Holder
from bench.report import BenchReport, Target, spread
from tests.harness import SLOW, AgentProcess, DaemonProcess, controllers

SOURCE = Path(__file__).with_name("grower.c")
CALLS, MOST_KIB = 200, 256
TOUCHED, CHARGED = "touched before it was moved", "charged to the agent"
GROWN_MIB = 24
NICE = -10
"""Priority as the daemon's unit gives it."""
ONE = """
began = time.perf_counter()
child = subprocess.Popen([program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
spawned = time.perf_counter() - began
told = child.stdout.readline()
where = open(f"/proc/{child.pid}/cgroup").read()
child.stdin.close()
child.wait()
result = (*map(int, told.split()), "/call-" in where, spawned * 1e3)
"""


def measure(
    daemon: DaemonProcess, agent: AgentProcess, program: Path, mib: int, count: int
) -> dict[str, Any]:
    """Start the program that often: bytes misplaced of each, and the times."""
    has_memory = "memory" in controllers()
    leaf = (daemon.cgroup_dir / "bench/agent").stat().st_ino if has_memory else 0
    values: dict[str, Any] = {"program": str(program), "arguments": [str(mib), str(leaf)]}
    rows = [agent.run(ONE, **values) for _ in range(count + 2)][2:]
    moved = [
        entry["since_exec_usec"] / 1e3
        for entry in map(json.loads, daemon.audit_lines())
        if entry["event"] == "call_moved"
    ]
    return {
        "touched_kib": spread([touched / 1024 for touched, _, _, _ in rows]),
        "charged_kib": spread([charged / 1024 for _, charged, _, _ in rows]) if has_memory else {},
        "in_a_call": sum(in_call for _, _, in_call, _ in rows),
        "spawn_ms": spread([ms for _, _, _, ms in rows]),
        "moved_ms": spread(moved or [0.0]),
    }


def _is_met(case: dict[str, Any], key: str, share: str) -> bool:
    return share != "p99" or case[key][share] <= MOST_KIB


def main() -> int:
    """Start a daemon, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS if SLOW == 1 else 60)
    parser.add_argument("--mib", type=int, default=GROWN_MIB, help="how far each call grows")
    parser.add_argument("--way", choices=("as is", "fanotify"), default="as is")
    parser.add_argument("--exec-hold", default="20ms", help="`cpu.exec_hold` of the daemon")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
        program = Path(directory) / "grower"
        options = ["-O2", "-Wall", "-Wextra", "-Werror", "-static"]
        subprocess.run(["cc", *options, "-o", str(program), str(SOURCE)], check=True)
        config = f'[boundaries]\nenabled = true\n[cpu]\nexec_hold = "{arguments.exec_hold}"\n'
        daemon = DaemonProcess(Path(directory), config)
        try:
            daemon.start()
            agent = daemon.open("bench")
            assert daemon.process is not None
            for who in (daemon.process.pid, 0):  # what answers goes before what waits for it
                os.setpriority(os.PRIO_PROCESS, who, NICE)
            holder = None
            if arguments.way == "fanotify":
                # Beside the pool, where the daemon removes nothing that it does not know.
                ahead = daemon.cgroup_dir.with_name("call-ahead-" + daemon.cgroup_dir.name)
                ahead.mkdir()
                holder = Holder(program, ahead)
            try:
                case = measure(daemon, agent, program, arguments.mib, arguments.calls)
            finally:
                if holder is not None:
                    holder.close()
                    holder.leaf.rmdir()
        finally:
            daemon.close()
    targets = [
        *(
            Target(f"{name}, {share}", case[key][share], "KiB", limit, _is_met(case, key, share))
            for key, name in (("touched_kib", TOUCHED), ("charged_kib", CHARGED))
            for share, limit in (("p50", "none"), ("p99", f"<= {MOST_KIB}"))
            if case[key]
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
