"""Benchmark `reaction`: from the moment an allocator passes its limit to the moment it is stopped.

Kernel rungs: memory.max and denied growth, in bytes past what was set. Daemon rung: a call of low
priority takes the pool past the guard's mark beside an important one and is paused. Time and bytes
are read by an observer outside the pool that looks at memory.current in a tight loop; the daemon's
own word is not asked, and is only shown beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.config import GuardConfig
from agentcgroupd.policy.engine import marks
from agentcgroupd.policy.load import load_policy
from bench.report import BenchReport, Target, quantile
from tests.harness import EXEC, SLOW, AgentProcess, DaemonProcess, wait_until

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB, GIB = 1 << 20, 1 << 30
RATES_GB_S = (0.5, 1.0, 2.0, 4.0)
ROUNDS = 30
QUIET_S = 0.15
"""Without growth for this long, the allocator has been held back."""
START = """
tool = subprocess.Popen([EXEC, *options, "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""


@dataclass(frozen=True, slots=True)
class Reaction:
    """A crossing of the mark as the observer saw it."""

    rate_gb_s: float
    reached_gb_s: float
    """Rate of the allocator in the last 20 ms before the mark."""
    stopped_after_ms: float
    past_bytes: int
    daemon_says_ms: float | None


class Observer:
    """Reads one memory.current as fast as it can."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)

    def watch(self, mark_bytes: int, timeout_s: float) -> list[tuple[float, int]]:
        """(time, bytes) at every change, from well before the mark until growth has ended."""
        samples: list[tuple[float, int]] = []
        highest, last_growth = 0, time.perf_counter()
        started = last_growth
        while True:
            usage = int(os.pread(self._fd, 32, 0))
            now = time.perf_counter()
            if usage > highest:
                highest, last_growth = usage, now
                samples.append((now, usage))
            if highest > mark_bytes and now - last_growth > QUIET_S * SLOW:
                return samples
            if now - started > timeout_s:
                raise SystemExit(f"no crossing of {mark_bytes} in {timeout_s} s: {samples[-1:]}")

    def close(self) -> None:
        """Give the file up."""
        os.close(self._fd)


def judge(samples: list[tuple[float, int]], mark_bytes: int) -> tuple[float, float, int]:
    """(rate in bytes/s before the mark, seconds from the mark to the last growth, bytes past it).
    The crossing is put between the two samples around it, in proportion."""
    after = next(i for i, (_, usage) in enumerate(samples) if usage > mark_bytes)
    time_b, usage_b = samples[after]
    time_a, usage_a = samples[after - 1] if after else samples[after]
    share = (mark_bytes - usage_a) / (usage_b - usage_a) if usage_b > usage_a else 0.0
    crossed = time_a + (time_b - time_a) * share
    window = [(t, u) for t, u in samples[: after + 1] if t >= crossed - 0.02]
    span = window[-1][0] - window[0][0]
    rate = (window[-1][1] - window[0][1]) / span if span > 0 else 0.0
    end, highest = samples[-1]
    return rate, max(0.0, end - crossed), highest - mark_bytes


def _start(agent: AgentProcess, name: str, schedule: str, *options: str) -> None:
    """agentcg-load in a call."""
    agent.run(START, LOAD=LOAD, options=["--name", name, *options], schedule=schedule)


def _gone(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """End the tool and wait for its memory."""
    agent.run("tool.kill(); tool.wait()")
    for call in daemon.admin.ListCalls(pb.ListCallsRequest(session_id="batch")).calls:
        with contextlib.suppress(grpc.RpcError):  # it has ended in the meantime
            daemon.admin.EndCall(pb.EndCallRequest(call_id=call.id))
    wait_until(
        "its call has ended",
        lambda: not [d for d in daemon.call_dirs() if d.parent.name == "batch"],
    )


def _said(daemon: DaemonProcess, since: int) -> float | None:
    """The daemon's own reaction time in ms, from the audit log after an offset in bytes."""
    with daemon.audit_path.open() as file:
        file.seek(since)
        events = [json.loads(line) for line in file]
    told = [e["reaction_usec"] for e in events if e["event"] == "mark" and e["decisions"]]
    return told[0] / 1e3 if told else None


def _ramp(pool_bytes: int, rate_gb_s: float) -> str:
    """Three quarters of the pool as fast as it goes, a pause, then all of it at the rate."""
    start = pool_bytes * 3 // 4
    ms = int((pool_bytes - start) / (rate_gb_s * 1e9) * 1e3)
    return f"10 {start} 0\n{int(300 * SLOW**0.5)} {start} 0\n{ms} {pool_bytes} 0\n"


def _wait_below(current: Path, low_bytes: int) -> None:
    wait_until("its memory is back", lambda: int(current.read_text()) < low_bytes)
    time.sleep(0.3)  # the guard looks at a calm pool four times a second


def daemon_rung(
    daemon: DaemonProcess, pool_bytes: int, rates: list[float], rounds: int
) -> list[Reaction]:
    """Crossings of the pool's mark at each rate."""
    mark, low = marks(load_policy(None, None).policy, pool_bytes)
    vip, batch = daemon.open("vip", priority="important"), daemon.open("batch", priority="batch")
    _start(vip, "vip", f"100 {16 * MIB} 0\n3600000 {16 * MIB} 0\n")
    current = daemon.cgroup_dir / "memory.current"
    observer = Observer(current)
    found = []
    for rate in rates:
        for number in range(rounds):
            since = daemon.audit_path.stat().st_size
            _start(batch, "burst", _ramp(pool_bytes, rate))
            samples = observer.watch(mark, 60 * SLOW)
            reached, seconds, past = judge(samples, mark)
            found.append(Reaction(rate, reached / 1e9, seconds * 1e3, past, _said(daemon, since)))
            print(
                f"reaction: {rate} GB/s, round {number + 1} of {rounds}: stopped after "
                f"{seconds * 1e3:.2f} ms and {past / MIB:.1f} MiB",
                file=sys.stderr,
            )
            _gone(daemon, batch)
            _wait_below(current, low - 16 * MIB)
    observer.close()
    vip.run("tool.kill(); tool.wait()")
    return found


def kernel_rungs(daemon: DaemonProcess, rates: list[float], call_bytes: int) -> list[Any]:
    """Bytes past memory.max at each rate."""
    agent = daemon.open("rungs", priority="batch")
    rows = []
    for rate in rates:
        total_ms = int(2 * call_bytes / (rate * 1e9) * 1e3)
        schedule = f"{total_ms} {2 * call_bytes} 0\n"
        _start(agent, "max", schedule, "--memory-max", str(call_bytes))
        agent.run("tool.wait()")
        report = _last(daemon, "rungs")
        row = {
            "rung": "memory.max",
            "rate_gb_s": rate,
            "verdict": pb.Verdict.Name(report.verdict),
            "past_bytes": report.memory_peak_bytes - report.grant.memory_max_bytes,
        }
        rows.append(row)
    return rows


def deny_rung(daemon: DaemonProcess, pool_bytes: int, rates: list[float]) -> list[Any]:
    """Bytes past the mark and its allowance of a call whose growth is denied at the pool's mark;
    nothing where this kernel cannot deny."""
    vip, eager = daemon.open("vip2", priority="important"), daemon.open("eager", priority="batch")
    _start(vip, "vip", f"100 {16 * MIB} 0\n3600000 {16 * MIB} 0\n")
    rows = []
    for rate in rates:
        since = daemon.audit_path.stat().st_size
        _start(eager, "eager", _ramp(pool_bytes, rate), "--on-pressure", "deny")
        eager.run("result = tool.wait()")
        report = _last(daemon, "eager")
        with daemon.audit_path.open() as file:
            file.seek(since)
            denied = [e for line in file if (e := json.loads(line))["event"] == "denied"]
        allowed = denied[0]["mark_bytes"] + GuardConfig().deny_allowance
        row = {
            "rung": "denied growth",
            "rate_gb_s": rate,
            "exit_code": report.exit_code,
            "past_bytes": report.memory_peak_bytes - allowed,
        }
        rows.append(row)
        _wait_below(daemon.cgroup_dir / "memory.current", pool_bytes // 2)
    vip.run("tool.kill(); tool.wait()")
    return rows


def _features(daemon: DaemonProcess) -> list[str]:
    """Names of the programs that work in this kernel, as the daemon says."""
    found = [line.partition("in the kernel: ")[2] for line in daemon.log.read_text().splitlines()]
    return next((words.split(", ") for words in found if words), [])


def _last(daemon: DaemonProcess, session: str) -> pb.Report:
    wait_until("it has ended", lambda: not list(daemon.cgroup_dir.glob(f"{session}/call-*")))
    request = pb.ListReportsRequest(session_id=session, limit=1)
    return daemon.admin.ListReports(request).reports[0]


def main() -> int:
    """Start a daemon with a pool of its own, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS if SLOW == 1 else 5)
    arguments = parser.parse_args()
    emulated = SLOW > 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pool_bytes = int(min(2 * GIB, memory // 3)) // MIB * MIB
    # Emulated memory is filled at some 150 MB/s at best.
    rates = [0.05, 0.1] if emulated else list(RATES_GB_S)
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
        daemon = DaemonProcess(Path(directory), f'[pool]\nmemory_max = "{pool_bytes}"\n')
        try:
            daemon.start()
            crossings = daemon_rung(daemon, pool_bytes, rates, arguments.rounds)
            rungs = kernel_rungs(daemon, rates, min(GIB, pool_bytes // 4))
            if "deny growth" in _features(daemon):
                rungs += deny_rung(daemon, pool_bytes, rates)
        finally:
            features = _features(daemon)
            daemon.close()
    report = summarize(crossings, rungs, emulated)
    report.details["features"] = features
    report.details["pool_bytes"] = pool_bytes
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(t.met for t in report.targets) else 1


def summarize(crossings: list[Reaction], rungs: list[Any], emulated: bool) -> BenchReport:
    """Targets from what was measured; times are none where the CPU is emulated."""
    targets = []
    for rung in sorted({row["rung"] for row in rungs}):
        past = max(row["past_bytes"] for row in rungs if row["rung"] == rung)
        name = f"kernel rung {rung}: bytes past the limit, most"
        targets.append(Target(name, past, "B", "<= 0", past <= 0))
    times = [c.stopped_after_ms for c in crossings]
    by_rate = {}
    for rate in sorted({c.rate_gb_s for c in crossings}):
        mine = [c for c in crossings if c.rate_gb_s == rate]
        by_rate[str(rate)] = {
            "reached_gb_s_p50": quantile([c.reached_gb_s for c in mine], 0.5),
            "stopped_after_ms_p50": quantile([c.stopped_after_ms for c in mine], 0.5),
            "stopped_after_ms_max": max(c.stopped_after_ms for c in mine),
            "past_mib_p50": quantile([c.past_bytes for c in mine], 0.5) / MIB,
            "past_mib_max": max(c.past_bytes for c in mine) / MIB,
        }
    if not emulated:
        for share, limit in ((0.5, 1.0), (0.99, 5.0)):
            value = quantile(times, share)
            name = f"daemon rung, a paused call: from the mark to no more growth, p{share * 100:g}"
            targets.append(Target(name, value, "ms", f"<= {limit:g}", value <= limit))
    details = {
        "by_rate": by_rate,
        "crossings": [asdict(c) for c in crossings],
        "kernel_rungs": rungs,
    }
    where = "guest" if emulated else "host"
    return BenchReport("reaction", where, len(crossings), targets, details)


if __name__ == "__main__":
    sys.exit(main())
