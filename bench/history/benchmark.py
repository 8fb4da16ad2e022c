"""Benchmark `history`: what keeping it costs a call, and what asking a large one takes.

Two daemons, one that keeps history and one that does not, take turns: an agent of each begins and
ends calls with no process in them, so that nothing but the daemon's own work is timed. Then a store
is filled with reports and entries, by the daemon's own writer, and asked over gRPC; and one of the
default size is filled beyond it.

Needs no controllers: it runs natively wherever there is a cgroup2 mount.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentcgroup import Admin
from agentcgroup.types import Verdict
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.config import HistoryConfig
from agentcgroupd.history.room import Bounds
from agentcgroupd.history.rows import Closed, Ended, Entry, Opened, SessionKey
from agentcgroupd.history.store import Store
from bench.report import BenchReport, Target, quantile, spread
from tests.harness import AgentProcess, DaemonProcess

BLOCKS, PER_BLOCK = 200, 20
ROWS = 1_000_000
SESSIONS = 200
QUESTIONS = 50
MORE_MS, QUERY_MS = 0.05, 100.0
GIB = 1 << 30
MANY_PAGES = "history --limit 500"
"""Asked for in several pages, one after the other; the target is for one question."""
WITHOUT = "[history]\npath = ''\n"

CALLS = """
found = []
for _ in range(count):
    started = time.perf_counter()
    with agent.tool_call("nothing", memory_max="1G"):
        pass
    found.append((time.perf_counter() - started) * 1e3)
result = found
"""


def cost_of_calls(blocks: int) -> dict[str, list[float]]:
    """Milliseconds of a begin and an end, with history and without, in turns."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
        daemons: list[DaemonProcess] = []
        agents: dict[str, AgentProcess] = {}
        try:
            for name, config in (("with", ""), ("without", WITHOUT)):
                (Path(directory) / name).mkdir()
                daemons.append(DaemonProcess(Path(directory) / name, config))
                daemons[-1].start()
                agents[name] = daemons[-1].open("bench")
                agents[name].run(CALLS, count=PER_BLOCK)
            for block in range(blocks):
                order = ("with", "without") if block % 2 else ("without", "with")
                for name in order:
                    found[name] += agents[name].run(CALLS, count=PER_BLOCK)
        finally:
            for daemon in daemons:
                daemon.close()
    return found


def _rows(count: int) -> Iterator[Opened | Closed | Ended | Entry]:
    """So many calls of many sessions, each with an entry for its begin, over the last ten days."""
    day_usec = 86_400_000_000
    first = time.time_ns() // 1000 - 10 * day_usec
    step = 10 * day_usec // count
    per_session = max(1, count // SESSIONS)
    intent = '{"name":"pytest","intent":{"memory":"512 MiB","memory_max":"2 GiB"}}'
    for number in range(count):
        at = first + number * step
        key = SessionKey(f"s{number // per_session}", first + number // per_session * step)
        if number % per_session == 0:
            message = pb.Session(id=key.name, priority=50, opened_unix_usec=key.opened_usec)
            yield Opened(key, message.SerializeToString())
        bad = number % 50 == 0
        report = pb.Report(
            call_id=f"{number:012x}",
            session_id=key.name,
            name="pytest",
            argv=["pytest", "-q", f"tests/test_{number}.py"],
            verdict=pb.VERDICT_FAILED if bad else pb.VERDICT_OK,
            sentence="It ended with exit status 1." if bad else "It ended well.",
            exit_code=int(bad),
            began_unix_usec=at,
            wall_usec=70_000,
            memory_peak_bytes=200 << 20,
            cpu_usage_usec=60_000,
            grant=pb.Grant(memory_max_bytes=2 * GIB, pids_max=4096, priority=50),
        )
        report.facts.add(
            what="the main process (1234) ended with status 0",
            source="the kernel's wait status",
            at_unix_usec=at,
        )
        yield Entry(key, report.call_id, at, "call_begun", intent)
        yield Ended.of(key, report)


def fill(path: Path, count: int, max_bytes: int) -> dict[str, float]:
    """Fill a store; returns seconds, and the largest sizes of its files in bytes."""
    store = Store(path, Bounds(max_bytes, 100, 30 * 86_400_000_000))
    store.thread.start()
    largest = wal = 0
    started = time.perf_counter()
    for number, row in enumerate(_rows(count)):
        store.put(row)
        if number % 2000 == 0:
            store.mark().reached.result()
            largest = max(largest, path.stat().st_size)
            wal = max(wal, Path(f"{path}-wal").stat().st_size)
    if not store.close(60):
        raise SystemExit("the store did not end")
    seconds = time.perf_counter() - started
    if store.lost:
        raise SystemExit(f"{store.lost} rows were lost")
    return {"seconds": seconds, "file_bytes": max(largest, path.stat().st_size), "wal_bytes": wal}


def _asked(question: Callable[[], Any]) -> dict[str, float]:
    times = []
    for _ in range(QUESTIONS):
        started = time.perf_counter()
        question()
        times.append((time.perf_counter() - started) * 1e3)
    return spread(times)


def questions(directory: Path, count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of questions to a daemon with that store."""
    daemon = DaemonProcess(
        directory, f"[history]\npath = '{directory}/full.db'\nmax_bytes = '8G'\n"
    )
    middle = f"{count // 2:012x}"
    try:
        daemon.start()
        with Admin(str(daemon.run_dir)) as admin:
            day_ago = time.time() - 86_400
            return {
                "history": _asked(admin.history),
                MANY_PAGES: _asked(lambda: admin.history(limit=500)),
                "history --session": _asked(lambda: admin.history("s7")),
                "history --verdict bad": _asked(
                    lambda: admin.history(verdicts=[v for v in list(Verdict)[1:] if v != "ok"])
                ),
                "history --session --verdict, none there": _asked(
                    lambda: admin.history("s7", verdicts=[Verdict.OOM_POOL])
                ),
                "history --since, none there": _asked(lambda: admin.history(since=time.time())),
                "history --since 1d --verdict": _asked(
                    lambda: admin.history(since=day_ago, verdicts=[Verdict.FAILED])
                ),
                "history --sessions": _asked(admin.past_sessions),
                "report CALL": _asked(lambda: admin.report(middle)),
                "explain CALL": _asked(lambda: admin.story(middle)),
            }
    finally:
        daemon.close()


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"of {PER_BLOCK} calls each")
    parser.add_argument("--rows", type=int, default=ROWS, help="calls in the large store")
    arguments = parser.parse_args()
    times = cost_of_calls(arguments.blocks)
    p50 = {name: quantile(found, 0.5) for name, found in times.items()}
    more = p50["with"] - p50["without"]
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
        place = Path(directory)
        filled = fill(place / "full.db", arguments.rows, 8 * GIB)
        asked = questions(place, arguments.rows)
        (place / "full.db").unlink()
        bound = HistoryConfig().max_bytes
        bounded = fill(place / "bounded.db", arguments.rows, bound)
    slowest = max(found["p99"] for name, found in asked.items() if name != MANY_PAGES)
    size = bounded["file_bytes"]
    targets = [
        Target("added to a begin and an end, p50", more, "ms", f"<= {MORE_MS:g}", more <= MORE_MS),
        Target(
            f"slowest question to {arguments.rows} calls, p99",
            slowest,
            "ms",
            f"<= {QUERY_MS:g}",
            slowest <= QUERY_MS,
        ),
        Target("largest file over its bound", size / bound, "", "<= 1", size <= bound),
    ]
    details = {
        "calls_ms": {name: spread(found) for name, found in times.items()},
        "filled": filled,
        "bounded": bounded,
        "asked_ms": asked,
    }
    report = BenchReport("history", "host", len(times["with"]), targets, details)
    report.show()
    for name, found in asked.items():
        print(f"  {name}: p50 {found['p50']:.2f} ms, p99 {found['p99']:.2f} ms")
    print(f"  {details['calls_ms']}\n  filled: {filled}\n  bounded: {bounded}")
    print(f"  written: {report.write()}")
    return 0 if all(target.met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
