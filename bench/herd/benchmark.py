"""Benchmark `herd`: calls of which nothing is known begin to grow at the same moment, in a pool
that is too small for all of them, beside an important call.

All are to end well, without the pool's limit being hit, and in little more time than it would take
if the pool were always full: so many rounds as the herd is larger than the pool, each as long as
one call takes alone. A part stops the daemon (SIGSTOP) right before they grow.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from bench.growers import daemon_with_pool, grower
from bench.report import BenchReport, Target
from tests.harness import SLOW, AgentProcess, DaemonProcess, wait_until

MIB, GIB = 1 << 20, 1 << 30
HOLD_S = 1.5
PAGE = 1000
"""Reports that are asked for at a time. A page holds at most 64 KiB, so fewer may come."""
STOPPED_S = 5.0
TIME_MOST = 1.5
"""Times the best possible."""
START = """
import os
read, write = os.pipe()
tools = [
    subprocess.Popen([EXEC, "--name", f"g{i}", "--", *argv], stdin=read, stdout=subprocess.PIPE)
    for i in range(count)
]
os.close(read)
"""
GO = "os.close(write)"
END = """
took = [float(t.communicate()[0] or "nan") for t in tools]
result = [t.returncode for t in tools], took
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A herd."""

    calls: int
    each_bytes: int
    pool_bytes: int
    way: str
    stopped: bool = False

    @property
    def name(self) -> str:
        """The case in words."""
        daemon = f", daemon stopped for {STOPPED_S:g} s" if self.stopped else ""
        return f"{self.calls} x {self.each_bytes >> 20} MiB {self.way}{daemon}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a herd."""

    case: str
    pool_bytes: int
    seconds: float
    best_s: float
    lost: int
    verdicts: dict[str, int]
    limit_hit: int
    """Times that the pool's limit was reached (memory.events: max)."""
    oom_kills: int
    peak_bytes: int
    peak_stopped_bytes: int
    """The most that the pool held while the daemon was stopped."""
    paused_s: float
    """Of all calls."""
    important_s: float
    """From the start to the end of the important call."""


def _begin(agent: AgentProcess, count: int, way: str, size_bytes: int) -> None:
    agent.run(START, argv=grower(way, size_bytes, HOLD_S), count=count)


def _used(daemon: DaemonProcess) -> int:
    return int((daemon.cgroup_dir / "memory.current").read_text())


def _reports(daemon: DaemonProcess) -> list[pb.Report]:
    """All reports of ended calls, of every page of the answer."""
    found: list[pb.Report] = []
    request = pb.ListReportsRequest(limit=PAGE)
    while True:
        reply = daemon.admin.ListReports(request)
        found.extend(reply.reports)
        if not reply.next_page_token:
            return found
        request.page_token = reply.next_page_token


def _events(daemon: DaemonProcess) -> dict[str, int]:
    lines = (daemon.cgroup_dir / "memory.events").read_text().splitlines()
    return {key: int(value) for key, value in (line.split() for line in lines)}


def alone(directory: Path, config: str, case: Case) -> float:
    """Seconds that one call of a herd takes with the pool to itself."""
    daemon = daemon_with_pool(directory, case.pool_bytes, config)
    try:
        daemon.start()
        agent = daemon.open("alone")
        _begin(agent, 1, case.way, case.each_bytes)
        began = time.monotonic()
        agent.run(GO)
        agent.run(END)
        return time.monotonic() - began
    finally:
        daemon.close()


def run(directory: Path, config: str, case: Case, alone_s: float) -> Outcome:
    """Run a herd beside an important call of a sixteenth of the pool."""
    daemon = daemon_with_pool(directory, case.pool_bytes, config)
    peak = peak_stopped = 0
    try:
        daemon.start()
        vip, herd = daemon.open("vip", priority="important"), daemon.open("herd")
        _begin(herd, case.calls, case.way, case.each_bytes)
        _begin(vip, 1, "touch", case.pool_bytes // 16)
        wait_until("all have begun", lambda: len(daemon.call_dirs()) == case.calls + 1, 60)
        time.sleep(1.5 * SLOW**0.5)  # they rest, as calls do that wait for something
        assert daemon.process is not None
        if case.stopped:
            daemon.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        vip.run(GO)
        herd.run(GO)
        stopped, important_s = case.stopped, 0.0
        while daemon.call_dirs():
            now = time.monotonic() - began
            used = _used(daemon)
            peak = max(peak, used)
            if stopped:
                peak_stopped = max(peak_stopped, used)
            if stopped and now > STOPPED_S:
                daemon.process.send_signal(signal.SIGCONT)
                stopped = False
            if not important_s and not any(d.parent.name == "vip" for d in daemon.call_dirs()):
                important_s = now
            if now > 120 * SLOW:
                break
            time.sleep(0.005 * SLOW**0.5)
        seconds = time.monotonic() - began
        events = _events(daemon)
        reports = _reports(daemon)
        for agent in (vip, herd):
            agent.run("for t in tools: t.poll() is None and t.kill()")
    finally:
        daemon.close()
    verdicts = Counter(pb.Verdict.Name(r.verdict).removeprefix("VERDICT_") for r in reports)
    rounds = math.ceil(case.calls * case.each_bytes / case.pool_bytes)
    best = rounds * alone_s + (STOPPED_S if case.stopped else 0.0)
    return Outcome(
        case=case.name,
        pool_bytes=case.pool_bytes,
        seconds=seconds,
        best_s=best,
        lost=case.calls + 1 - verdicts["OK"],
        verdicts=dict(verdicts),
        limit_hit=events["max"],
        oom_kills=events["oom_kill"],
        peak_bytes=peak,
        peak_stopped_bytes=peak_stopped,
        paused_s=sum(r.frozen_usec for r in reports) / 1e6,
        important_s=important_s or seconds,
    )


def cases(memory_bytes: int) -> list[Case]:
    """The herds, as large as the machine has memory for."""
    if memory_bytes >= 10 * GIB:
        pool, small, count = 8 * GIB, 4 * GIB, 100
    else:
        pool, small, count = memory_bytes // 2 >> 20 << 20, memory_bytes // 4 >> 20 << 20, 40
    each = int(pool * 2.44 / count) >> 20 << 20
    return [
        Case(count, each, pool, "touch"),
        Case(count, each, pool, "populate"),
        Case(20, small // 10, small, "touch"),
        Case(count, each, pool, "touch", stopped=True),
        Case(count, each, pool, "populate", stopped=True),
    ]


def main() -> int:
    """Run the herds, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--audit", type=Path, help="folder for the audit log of each herd")
    parser.add_argument("--config", default="", help="TOML that is added to the daemon's own")
    arguments = parser.parse_args()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    outcomes = []
    for case in cases(memory):
        if arguments.only and arguments.only not in case.name:
            continue
        with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
            alone_s = alone(Path(directory), arguments.config, case)
        with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
            outcome = run(Path(directory), arguments.config, case, alone_s)
            if arguments.audit is not None:
                arguments.audit.mkdir(parents=True, exist_ok=True)
                name = case.name.replace(" ", "-")
                copyfile(Path(directory) / "audit.jsonl", arguments.audit / f"{name}.jsonl")
        outcomes.append(outcome)
        print(
            f"herd: {outcome.case}: {outcome.seconds:.1f} s, best {outcome.best_s:.1f}; "
            f"{outcome.verdicts}; limit hit {outcome.limit_hit}; peak "
            f"{outcome.peak_bytes / case.pool_bytes:.0%} of the pool",
            file=sys.stderr,
            flush=True,
        )
    report = summarize(outcomes, SLOW > 1 or "AGENTCG_GUEST" in os.environ)
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(t.met for t in report.targets) else 1


def summarize(outcomes: list[Outcome], in_guest: bool) -> BenchReport:
    """Targets from what was measured; times are none in a guest."""
    targets: list[Target] = []
    for o in outcomes:
        targets.append(Target(f"{o.case}: calls lost", o.lost, "", "0", o.lost == 0))
        hit = o.limit_hit
        targets.append(Target(f"{o.case}: pool's limit hit", hit, "", "0", hit == 0))
        if not in_guest:
            ratio = o.seconds / o.best_s
            name, target = f"{o.case}: time over the best possible", f"<= {TIME_MOST:g}"
            targets.append(Target(name, ratio, "x", target, ratio <= TIME_MOST))
    details: dict[str, Any] = {"outcomes": [asdict(o) for o in outcomes]}
    return BenchReport("herd", "guest" if in_guest else "host", len(outcomes), targets, details)


if __name__ == "__main__":
    sys.exit(main())
