"""Benchmark `scale`: 1,000 sessions with 10,000 open calls.

A daemon is given that many: how many calls begin and end in a second, how late its loop is
meanwhile, and what it costs when nothing happens. Beside it, what one look at so many calls and the
decision after it take (bench/scale/look.py).

Needs no controllers: it runs natively wherever there is a cgroup2 mount. Without a memory
controller the daemon runs without its guard, and what growing calls hold is made up.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from agentcgroup import packets
from agentcgroup.v1 import agentcgroup_pb2 as pb
from bench.report import BenchReport, Target, quantile, run_directory, spread
from bench.scale import look
from tests.floods import rss_bytes
from tests.guest.where import decide
from tests.harness import DaemonProcess, wait_until

SESSIONS, CALLS = 1_000, 10_000
GROWING = (0, 1, 100, 1_000)
GROWING_MOST = 100
"""Beyond, there is no target."""
ROUNDS = 100
ASKED_S, IDLE_S = 20.0, 60.0
"""Seconds measured: long enough to include what the daemon does every ten seconds or minute."""
RPC = b"ACG1\0rpc\0"
PING_S = 0.01
PING = b"ACG1\0ping\0"
MIB = 1 << 20
CONFIG = """
[calls]
attach_timeout = "2h"
idle_timeout = "2h"
keep_room = "2h"
"""


class Pings:
    """Asks the daemon for a sign of life again and again: it answers from its loop, so its lag is
    at most what an answer takes. How late this process itself is woken says what of that is the
    machine's."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._path = str(daemon.run_dir / "admin/attach.sock")
        self.ms: list[float] = []
        self.late_ms: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._stop.is_set():
            asleep = time.perf_counter()
            time.sleep(PING_S)
            began = time.perf_counter()
            self.late_ms.append((began - asleep - PING_S) * 1e3)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(self._path)
                sock.send(PING)
                sock.recv(4096)
            self.ms.append((time.perf_counter() - began) * 1e3)

    def __enter__(self) -> Pings:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()


class Agent:
    """An agent of one session after the other, which is this process."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._path = str(daemon.run_dir / "agent/attach.sock")
        self._home = Path("/proc/self/cgroup").read_text().splitlines()[-1].partition("::")[2]

    def enter(self, session: str) -> None:
        """Go into a session's agent leaf."""
        leaf = self._daemon.cgroup_dir / session / "agent/cgroup.procs"
        leaf.write_text(str(os.getpid()))

    def leave(self) -> None:
        """Go back to where this process was."""
        mount = self._daemon.cgroup_dir.parent
        (mount / self._home.strip("/") / "cgroup.procs").write_text(str(os.getpid()))

    def begin(self) -> str:
        """Begin a call that is held open; returns its id."""
        reply: pb.Call = self._ask("BeginCall", pb.BeginCallRequest(name="tool"))
        return reply.id

    def end(self, call_id: str) -> None:
        """End it."""
        self._ask("EndCall", pb.EndCallRequest(call_id=call_id))

    def _ask(self, method: str, request: Message) -> Any:
        data = RPC + method.encode() + b"\0" + request.SerializeToString()
        return packets.ask(self._path, method, data, 60)


def cpu_s(daemon: DaemonProcess) -> float:
    """CPU time of the daemon so far."""
    assert daemon.process is not None
    text = Path(f"/proc/{daemon.process.pid}/stat").read_text()
    user, system = text[text.rindex(")") + 2 :].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _of_daemon(daemon: DaemonProcess, sessions: int, calls: int) -> dict[str, Any]:
    """Open sessions, begin calls in turn, wait, and end them all."""
    began = time.perf_counter()
    for number in range(sessions):
        daemon.admin.OpenSession(pb.OpenSessionRequest(spec=pb.SessionSpec(id=f"s{number}")))
    found: dict[str, Any] = {"sessions_s": time.perf_counter() - began}
    agent, opened = Agent(daemon), dict[str, list[str]]()
    try:
        with Pings(daemon) as pings:
            found["begin_s"], found["begin_cpu_s"] = _timed(
                daemon, lambda: opened.update(begin_all(agent, sessions, calls))
            )
        found["begin_lag_ms"], found["begin_late_ms"] = spread(pings.ms), spread(pings.late_ms)
        time.sleep(2)
        with Pings(daemon) as pings:
            before = cpu_s(daemon)
            time.sleep(ASKED_S)
            found["asked_cpu_share"] = (cpu_s(daemon) - before) / ASKED_S
        found["idle_lag_ms"], found["idle_late_ms"] = spread(pings.ms), spread(pings.late_ms)
        before = cpu_s(daemon)
        time.sleep(IDLE_S)
        found["idle_cpu_share"] = (cpu_s(daemon) - before) / IDLE_S
        found["rss_mib"] = rss_bytes(daemon) / MIB
        with Pings(daemon) as pings:
            found["end_s"], found["end_cpu_s"] = _timed(daemon, lambda: end_all(agent, opened))
        found["end_lag_ms"], found["end_late_ms"] = spread(pings.ms), spread(pings.late_ms)
    finally:
        agent.leave()
    wait_until("all calls have ended", lambda: not daemon.call_dirs(), 60)
    return found


def _timed(daemon: DaemonProcess, action: Any) -> tuple[float, float]:
    """Seconds that an action takes, and CPU seconds of the daemon meanwhile."""
    began, cpu = time.perf_counter(), cpu_s(daemon)
    action()
    return time.perf_counter() - began, cpu_s(daemon) - cpu


def begin_all(agent: Agent, sessions: int, calls: int) -> dict[str, list[str]]:
    """Begin so many calls in all, in sessions `s0` and so on; returns their ids by session."""
    opened: dict[str, list[str]] = {}
    for number in range(sessions):
        name = f"s{number}"
        agent.enter(name)
        opened[name] = [agent.begin() for _ in range(calls // sessions)]
    return opened


def end_all(agent: Agent, opened: dict[str, list[str]]) -> None:
    """End what `begin_all` has begun."""
    for name, ids in opened.items():
        agent.enter(name)
        for call_id in ids:
            agent.end(call_id)


def _targets(found: dict[str, Any], looks: dict[int, look.Took], calls: int) -> list[Target]:
    rows: list[tuple[str, float, str, float, bool]] = [
        ("calls begun a second of the daemon's CPU", calls / found["begin_cpu_s"], "", 1000, False),
        ("calls ended a second of the daemon's CPU", calls / found["end_cpu_s"], "", 1000, False),
        ("loop lag while they begin, p99", found["begin_lag_ms"]["p99"], "ms", 5, True),
        ("loop lag while they end, p99", found["end_lag_ms"]["p99"], "ms", 5, True),
        ("loop lag while they are open, p99", found["idle_lag_ms"]["p99"], "ms", 5, True),
        ("CPU when idle", found["idle_cpu_share"] * 100, "%", 2, True),
        ("memory", found["rss_mib"], "MiB", 200, True),
    ]
    for growing, took in looks.items():
        if growing > GROWING_MOST:
            continue
        both = [a + b for a, b in zip(took.look_ms, took.decide_ms, strict=True)]
        label = f"look and decide, {growing} growing, p50"
        rows.append((label, quantile(both, 0.5), "ms", 5, True))
    return [
        Target(
            name,
            value,
            unit,
            f"{'<=' if is_most else '>='} {limit:g}",
            value <= limit if is_most else value >= limit,
        )
        for name, value, unit, limit, is_most in rows
    ]


def main() -> int:
    """Measure, print the table and write the report; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = parser.parse_args()
    looks = look.measure(chosen.sessions, chosen.calls, GROWING, chosen.rounds)
    for growing, took in looks.items():
        print(f"  {growing} growing: look {spread(took.look_ms)}, decide {spread(took.decide_ms)}")
    with tempfile.TemporaryDirectory(prefix="s") as directory, run_directory() as run:
        daemon = DaemonProcess(Path(directory), CONFIG, run)
        try:
            daemon.start()
            found = _of_daemon(daemon, chosen.sessions, chosen.calls)
        finally:
            daemon.close()
    details = {
        "sessions": chosen.sessions,
        "calls": chosen.calls,
        "has_controllers": decide().kind == "native",
        "daemon": found,
        "look": {
            growing: {"look_ms": spread(took.look_ms), "decide_ms": spread(took.decide_ms)}
            for growing, took in looks.items()
        },
    }
    targets = _targets(found, looks, chosen.calls)
    report = BenchReport("scale", "host", chosen.rounds, targets, details)
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(target.met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
