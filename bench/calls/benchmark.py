"""Benchmark `calls`: what a call costs, and whether any is left behind.

Added wall time is measured side by side: a bare spawn and a call take turns, and the quantiles of
the differences within each pair are reported, beside the difference of the quantiles. Everything
runs in a process inside a session, as an agent would.

Needs no controllers: it runs natively wherever there is a cgroup2 mount.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import agentcgroup
from agentcgroup.v1 import agentcgroup_pb2 as pb
from bench.report import BenchReport, Target, quantile, run_directory, spread
from tests.harness import EXEC, DaemonProcess, wait_until

TRUE = "/bin/true"
FRONT, SHELL = (str(Path(EXEC).with_name(name)) for name in ("agentcg", "agentcg-sh"))
ROUNDS = 5
PER_ROUND = 400
LEAK_CALLS = 10_000
AT_A_TIME = 64


def _spawn(argv: list[str]) -> Callable[[], None]:
    def once() -> None:
        pid = os.posix_spawn(argv[0], argv, os.environ)
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit(f"{argv}: wait status {status}")

    return once


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def _pairs(bare: Callable[[], object], call: Callable[[], object], n: int) -> list[list[float]]:
    """n times (bare, call) in milliseconds, in turns, which of the two goes first in turns too."""
    rows = []
    for number in range(n):
        if number % 2:
            with_call = _timed(call)
            rows.append([_timed(bare), with_call])
        else:
            without = _timed(bare)
            rows.append([without, _timed(call)])
    return rows


def inside(n: int) -> dict[str, Any]:
    """Measure; called in a process of a session."""
    agent = agentcgroup.Agent()
    subprocess_bare = lambda: subprocess.run([TRUE], check=True)  # noqa: E731
    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "exec": (_spawn([TRUE]), _spawn([FRONT, "exec", "--", TRUE])),
        "launcher": (_spawn([TRUE]), _spawn([EXEC, "--", TRUE])),
        "sdk": (subprocess_bare, lambda: agent.run([TRUE], check=True)),
        "shell": (_spawn(["/bin/bash", "-c", ":"]), _spawn([SHELL, "-c", ":"])),
    }
    result: dict[str, Any] = {name: [] for name in cases}
    for name, (bare, call) in cases.items():
        _pairs(bare, call, 20)
        for _ in range(ROUNDS):
            result[name].append(_pairs(bare, call, n))
            print(f"calls: {name}: round {len(result[name])} of {ROUNDS}", file=sys.stderr)
    return result


def many(count: int) -> float:
    """`count` calls, 64 at a time; seconds. Called in a process of a session."""
    argv = [FRONT, "exec", "--", TRUE]
    started = time.perf_counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        codes = list(pool.map(lambda _: subprocess.call(argv), range(count)))
    if any(codes):
        raise SystemExit(f"{sum(map(bool, codes))} of {count} calls did not run")
    return time.perf_counter() - started


def _summary(rounds: list[list[list[float]]]) -> dict[str, Any]:
    pairs = [pair for rows in rounds for pair in rows]
    bare, call = [p[0] for p in pairs], [p[1] for p in pairs]
    added = [p[1] - p[0] for p in pairs]
    return {
        "bare_ms": spread(bare),
        "call_ms": spread(call),
        "added_ms": spread(added),
        "added_p50_by_round_ms": [quantile([p[1] - p[0] for p in rows], 0.5) for rows in rounds],
        "difference_of_quantiles_ms": {
            "p50": quantile(call, 0.5) - quantile(bare, 0.5),
            "p99": quantile(call, 0.99) - quantile(bare, 0.99),
        },
    }


def main() -> int:
    """Start a daemon, measure inside a session of it, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-round", type=int, default=PER_ROUND)
    parser.add_argument("--leak-calls", type=int, default=LEAK_CALLS)
    parser.add_argument("--inside", choices=("time", "many"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        small = arguments.inside == "time"
        print(json.dumps(inside(arguments.per_round) if small else many(arguments.leak_calls)))
        return 0
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory, run_directory() as run:
        daemon = DaemonProcess(Path(directory), run_dir=run)
        try:
            daemon.start()
            report = _measure(daemon, arguments)
        finally:
            daemon.close()
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(t.met for t in report.targets) else 1


def _in_session(daemon: DaemonProcess, arguments: argparse.Namespace, what: str) -> Any:
    counts = ["--per-round", str(arguments.per_round), "--leak-calls", str(arguments.leak_calls)]
    inner = [sys.executable, "-m", "bench.calls.benchmark", "--inside", what, *counts]
    argv = [EXEC, "--session", "bench", "--", *inner]
    env = {**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _measure(daemon: DaemonProcess, arguments: argparse.Namespace) -> BenchReport:
    spec = pb.SessionSpec(id="bench")
    daemon.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
    cases = {k: _summary(v) for k, v in _in_session(daemon, arguments, "time").items()}
    before = daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended
    seconds = _in_session(daemon, arguments, "many")
    wait_until("all calls have ended", lambda: not daemon.call_dirs(), 30)
    leaked = len(daemon.call_dirs())
    ended = daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended - before
    targets = []
    labels = {
        "exec": "agentcg exec -- /bin/true",
        "sdk": "agent.run(['/bin/true'])",
        "shell": "agentcg-sh -c : over bash -c :",
    }
    for name, label in labels.items():
        added = cases[name]["added_ms"]
        for share, limit in (("p50", 2.0), ("p99", 10.0)):
            value = added[share]
            row = f"added by {label}, {share}"
            targets.append(Target(row, value, "ms", f"<= {limit:g}", value <= limit))
    count = arguments.leak_calls
    row = f"leaked cgroups after {count} calls, {AT_A_TIME} at a time"
    targets.append(Target(row, leaked, "", "0", leaked == 0))
    targets.append(Target("calls with a report", ended, "", str(count), ended == count))
    where = "guest" if "QEMU" in _vendor() else "host"
    many = {
        "calls": arguments.leak_calls,
        "seconds": seconds,
        "per_second": arguments.leak_calls / seconds,
    }
    n = arguments.per_round * ROUNDS
    return BenchReport("calls", where, n, targets, {"cases": cases, "many": many})


def _vendor() -> str:
    path = Path("/sys/class/dmi/id/sys_vendor")
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
