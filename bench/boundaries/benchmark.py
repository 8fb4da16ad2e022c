"""Benchmark `boundaries`: calls that no agent declares, from the exec to the move.

One after another, then several at a time, shells that live for a moment are started by a process in
a session; the time from the exec in the kernel to the end of the move is the daemon's own, from its
audit log. A storm of shells that end at once shows that none is lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from bench.report import BenchReport, Target, spread
from tests.harness import SLOW, AgentProcess, DaemonProcess, wait_until

CALLS = 1000
STORM = 20_000
SHELLS = """
from concurrent.futures import ThreadPoolExecutor
def one(_):
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ)
    return os.waitpid(pid, 0)[1]
with ThreadPoolExecutor(at_a_time) as pool:
    result = sum(map(bool, pool.map(one, range(count))))
"""


def _run(daemon: DaemonProcess, agent: AgentProcess, **values: Any) -> list[dict[str, Any]]:
    """Start shells; the audit log's entries about them, when all have ended."""
    since = daemon.audit_path.stat().st_size
    before = daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended
    agent.run(SHELLS, **values)
    count = values["count"]
    wait_until("all have ended", lambda: _ended(daemon) >= before + count, 60)
    time.sleep(0.5)  # one too many would come late
    with daemon.audit_path.open() as file:
        file.seek(since)
        return [json.loads(line) for line in file]


def _ended(daemon: DaemonProcess) -> int:
    return daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended


def measure(daemon: DaemonProcess, count: int, storm: int) -> BenchReport:
    """Run all cases."""
    agent = daemon.open("bench", calls_max="1000")
    cases: dict[str, Any] = {}
    for at_a_time in (1, 8):
        events = _run(daemon, agent, script="sleep 0.02; true", at_a_time=at_a_time, count=count)
        moved = [e["since_exec_usec"] / 1e3 for e in events if e["event"] == "call_moved"]
        name = f"{at_a_time} at a time"
        cases[name] = {"moved": len(moved), "ms": spread(moved)}
        print(f"boundaries: {name}: {cases[name]}", file=sys.stderr)
    started = time.monotonic()
    events = _run(daemon, agent, script="exit 0", at_a_time=16, count=storm)
    seconds = time.monotonic() - started
    reports = sum(e["event"] == "call_ended" for e in events)
    moved = [e["since_exec_usec"] / 1e3 for e in events if e["event"] == "call_moved"]
    lost = [e["counts"] for e in events if e["event"] == "events_lost"]
    cases["storm"] = {
        "calls": storm,
        "seconds": seconds,
        "per_second": storm / seconds,
        "moved": len(moved),
        "lost": lost,
    }
    unreported = storm - reports
    name = f"calls without a report, of {storm} in a storm"
    targets = [Target(name, unreported, "", "0", unreported == 0)]
    for name, case in cases.items():
        for share in ("p50", "p99") if "ms" in case else ():
            row = f"from exec to moved, {name}, {share}"
            # Nobody has set a number for this: it is to be seen.
            targets.append(Target(row, case["ms"][share], "ms", "none", True))
    where = "guest" if SLOW > 1 else "host"
    return BenchReport("boundaries", where, count, targets, {"cases": cases})


def main() -> int:
    """Start a daemon, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS if SLOW == 1 else 50)
    parser.add_argument("--storm", type=int, default=STORM if SLOW == 1 else 300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
        daemon = DaemonProcess(Path(directory), "[boundaries]\nenabled = true\n")
        try:
            daemon.start()
            report = measure(daemon, arguments.calls, arguments.storm)
        finally:
            daemon.close()
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(t.met for t in report.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
