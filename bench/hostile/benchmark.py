"""Benchmark `hostile`: a victim's calls beside each flood of another session.

A victim begins and ends calls while a process of another session sends what it can. What that
costs is compared with a process of that session that only computes, since a flood takes a CPU as
well. The most memory that the daemon held is read meanwhile.

Needs no controllers: it runs natively wherever there is a cgroup2 mount.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from bench.report import BenchReport, Target
from tests.floods import ATTACKS, SPIN, beside, call_ms, rss_bytes
from tests.harness import DaemonProcess

ROUNDS = 3
MORE_MS = 20.0
MIB = 1 << 20
MEMORY_MIB = 512


class Peak:
    """The most memory that a daemon held while this was in force."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.bytes = max(self.bytes, rss_bytes(self._daemon))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()


def _measure(directory: Path, names: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds and MiB by attack; of each number the median round is kept."""
    cases: dict[str, Any] = {}
    for name in names:
        own = directory / str(len(cases))
        own.mkdir()
        daemon = DaemonProcess(own)
        daemon.start()
        try:
            hostile, victim = daemon.open("hostile"), daemon.open("victim")
            alone = sorted(call_ms(victim, 2.0) for _ in range(rounds))
            spins = [beside(hostile, victim, SPIN) for _ in range(rounds)]
            with Peak(daemon) as peak:
                floods = [beside(hostile, victim, ATTACKS[name]) for _ in range(rounds)]
        finally:
            daemon.close()
        middle = rounds // 2
        cases[name] = {
            "alone_p50_ms": alone[middle][0],
            "alone_p99_ms": sorted(p99 for _, p99 in alone)[middle],
            "busy_p50_ms": sorted(p50 for p50, _ in spins)[middle],
            "busy_p99_ms": sorted(p99 for _, p99 in spins)[middle],
            "flood_p50_ms": sorted(p50 for p50, _ in floods)[middle],
            "flood_p99_ms": sorted(p99 for _, p99 in floods)[middle],
            "rss_peak_mib": peak.bytes / MIB,
        }
        print(f"  {name:20}", "  ".join(f"{k} {v:.1f}" for k, v in cases[name].items()), flush=True)
    return cases


def main() -> int:
    """Measure, print the table and write the report; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attack", action="append", choices=ATTACKS, help="these alone")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="h") as directory:
        cases = _measure(Path(directory), chosen.attack or list(ATTACKS), chosen.rounds)
    targets = []
    for name, case in cases.items():
        most = 2 * case["busy_p99_ms"] + MORE_MS
        p99 = case["flood_p99_ms"]
        targets.append(Target(f"p99 beside {name}", p99, "ms", f"<= {most:.1f}", p99 <= most))
    peak = max(case["rss_peak_mib"] for case in cases.values())
    limit = f"<= {MEMORY_MIB}"
    targets.append(Target("memory of the daemon", peak, "MiB", limit, peak <= MEMORY_MIB))
    report = BenchReport("hostile", "host", chosen.rounds, targets, {"cases": cases})
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(target.met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
