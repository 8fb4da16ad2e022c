"""Benchmark `reaction`: what a call still takes once the guard has said no.

A call grows without end, in one of several ways, beside a more important call that grows as well
and therefore goes first. The guard pauses it, and is asked afterwards when that was (the audit
log). An observer outside the pool has read memory.current in a tight loop meanwhile: how much the
call's session grew after that moment, for how long, and how far beyond its mark the pool was. The
same with a hundred
growers at once; with the daemon stopped (SIGSTOP) for five seconds while they grow; with the
daemon killed and started again; and, with --open, beside so many open calls and others that begin
and end all the time. Each part ends in bounded time, whatever happens.

Kernel rungs: memory.max and denied growth, in bytes past what was set.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.config import GuardConfig
from agentcgroupd.policy.engine import marks
from bench.growers import WAYS, daemon_with_pool, grower, policy_for
from bench.report import BenchReport, Target, quantile
from bench.scale.benchmark import CONFIG, Agent, begin_all, end_all
from tests.harness import EXEC, SLOW, AgentProcess, DaemonProcess, wait_until

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB, GIB = 1 << 20, 1 << 30
ROUNDS = 10
QUIET_S = 0.3
"""Without growth for this long, all growers have been held back."""
MOST_S = 60.0
"""No part of the benchmark looks longer than this."""
STOPPED_S = 5.0
MOST_PAST = 16 * MIB
KILLED_MOST = 64 * MIB
MANY = 100
START = """
import os
read, write = os.pipe()
tools = [
    subprocess.Popen([EXEC, "--name", f"g{i}", "--", *argv], stdin=read, stdout=subprocess.DEVNULL)
    for i in range(count)
]
os.close(read)
"""
GO = "os.close(write)"
KILL = """
for tool in tools:
    tool.kill()
    tool.wait()
"""
BEGIN_AND_END = """
import agentcgroup, threading
over, agent, ended = threading.Event(), agentcgroup.Agent(), []
def begin_and_end():
    while not over.wait(0.01):
        try:
            with agent.tool_call("short", wait="0"):
                pass
        except agentcgroup.AgentcgError:
            continue  # there is no room for it now
        ended.append(time.monotonic())
thread = threading.Thread(target=begin_and_end, daemon=True)
thread.start()
"""
"""Calls one after the other with pauses of 10 ms: below 100 a second."""
END = """
alive = thread.is_alive()
over.set()
thread.join(30)
result = alive, len(ended)
"""
LEAD = """
tool = subprocess.Popen([EXEC, "--name", "lead", "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""


@dataclass(frozen=True, slots=True)
class Reaction:
    """What the observer saw of one part."""

    case: str
    decided: bool
    """Whether the guard paused a grower; else none passed its credit, or none could be held."""
    stopped_after_ms: float
    """From the last pause that was decided to the last growth."""
    past_bytes: int
    """Growth after that."""
    past_mark_bytes: int
    """The most that the pool held beyond its mark; below 0: what was left to the mark."""
    limit_hit: int


class Observer:
    """Reads one memory.current as fast as it can, in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._samples: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        highest = 0
        fd = os.open(self._path, os.O_RDONLY)
        try:
            while not self._over.is_set():
                usage = int(os.pread(fd, 32, 0))
                if usage > highest:
                    highest = usage
                    self._samples.append((time.time(), usage))
                if SLOW > 1 or "AGENTCG_GUEST" in os.environ:
                    time.sleep(0.002)  # the only CPU is needed by what is observed
        finally:
            os.close(fd)

    def quiet(self, least_s: float, most_s: float) -> None:
        """Wait until nothing has grown for a while, but at least `least_s` and at most `most_s`."""
        began = time.time()
        while True:
            now = time.time()
            last = self._samples[-1][0] if self._samples else began
            if now - began > most_s or (now - began > least_s and now - last > QUIET_S * SLOW**0.5):
                return
            time.sleep(0.01)

    def close(self) -> list[tuple[float, int]]:
        """End the reading; returns (unix time, bytes) at each time that use rose above all
        before."""
        self._over.set()
        self._thread.join()
        return self._samples


def at(samples: list[tuple[float, int]], moment: float) -> int:
    """The highest use until a moment."""
    before = [usage for when, usage in samples if when <= moment]
    return before[-1] if before else samples[0][1]


def judge(
    case: str,
    samples: list[tuple[float, int]],
    decided: list[float],
    past_mark_bytes: int,
    limit_hit: int,
) -> Reaction:
    """What is left to say of a part. `samples`: of what the growers hold; `decided`: the unix times
    of all pauses; `past_mark_bytes`: of the pool."""
    end, highest = samples[-1]
    moment = max(decided) if decided else end
    return Reaction(
        case=case,
        decided=bool(decided),
        stopped_after_ms=max(0.0, end - moment) * 1e3,
        past_bytes=max(0, highest - at(samples, moment)),
        past_mark_bytes=past_mark_bytes,
        limit_hit=limit_hit,
    )


def _events(daemon: DaemonProcess) -> int:
    lines = (daemon.cgroup_dir / "memory.events").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("max "))


def _pauses(daemon: DaemonProcess, since: int) -> list[float]:
    """Unix times of the pauses in the audit log after an offset in bytes."""
    with daemon.audit_path.open() as file:
        file.seek(since)
        entries = [json.loads(line) for line in file]
    return [e["at_unix_usec"] / 1e6 for e in entries if e["event"] == "freeze"]


@contextmanager
def growers(
    daemon: DaemonProcess, batch: AgentProcess, count: int, way: str, size_bytes: int
) -> Iterator[None]:
    """Growers that wait for GO, ended in the end."""
    batch.run(START, argv=grower(way, size_bytes, 3600), count=count)
    try:
        wait_until(
            "all have begun",
            lambda: len(list(daemon.cgroup_dir.glob("batch/call-*"))) == count,
            60,
        )
        time.sleep(1.2)  # they rest, and have only a small credit
        yield
    finally:
        batch.run(KILL)
        wait_until("they have ended", lambda: not list(daemon.cgroup_dir.glob("batch/call-*")), 60)
        time.sleep(0.3)


def observed(
    daemon: DaemonProcess,
    batch: AgentProcess,
    case: str,
    count: int,
    way: str,
    pool_bytes: int,
    stopped_s: float = 0.0,
) -> Reaction:
    """Have growers grow, together twice as much as the pool."""
    mark, _ = marks(policy_for(pool_bytes), pool_bytes)
    size = max(2 * pool_bytes // count, 64 * MIB)
    with growers(daemon, batch, count, way, size):
        since, before = daemon.audit_path.stat().st_size, _events(daemon)
        pool = Observer(daemon.cgroup_dir / "memory.current")
        # The session of the growers: the important one goes on growing.
        observer = Observer(daemon.cgroup_dir / "batch/memory.current")
        assert daemon.process is not None
        if stopped_s:
            daemon.process.send_signal(signal.SIGSTOP)
        batch.run(GO)
        if stopped_s:
            time.sleep(stopped_s)
            daemon.process.send_signal(signal.SIGCONT)
        observer.quiet(0.5 * SLOW**0.5, MOST_S)
        samples = observer.close()
        past_mark = pool.close()[-1][1] - mark
        hit = _events(daemon) - before
        return judge(case, samples, _pauses(daemon, since), past_mark, hit)


def killed(daemon: DaemonProcess, batch: AgentProcess, count: int, pool_bytes: int) -> int:
    """Kill the daemon beside growers that are held, and start it again a second later. Returns by
    how many bytes they grew from the one moment to the other."""
    with growers(daemon, batch, count, "touch", max(2 * pool_bytes // count, 64 * MIB)):
        observer = Observer(daemon.cgroup_dir / "memory.current")
        batch.run(GO)
        observer.quiet(0.5 * SLOW**0.5, MOST_S)
        observer.close()
        current = daemon.cgroup_dir / "memory.current"
        before = int(current.read_text())
        daemon.kill()
        time.sleep(1.0)
        after = int(current.read_text())
        daemon.start()
        return after - before


def crowded(
    daemon: DaemonProcess, batch: AgentProcess, calls: int, rounds: int, pool_bytes: int
) -> Iterator[Reaction]:
    """What a single grower is seen to do beside so many open calls in a tenth as many sessions,
    and others that begin and end."""
    sessions = max(1, calls // 10)
    calls = sessions * (calls // sessions)
    for number in range(sessions):
        spec = pb.SessionSpec(id=f"s{number}")
        daemon.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
    agent = Agent(daemon)
    try:
        opened = begin_all(agent, sessions, calls)
    finally:
        agent.leave()
    busy = daemon.open("busy")
    busy.run(BEGIN_AND_END)
    began = time.monotonic()
    try:
        for way in WAYS:
            for _ in range(rounds):
                yield observed(daemon, batch, f"{way}, {calls} calls open", 1, way, pool_bytes)
    finally:
        alive, ended = busy.run(END)
        took_s = time.monotonic() - began
        print(f"reaction: {ended} calls in {took_s:.0f} s beside these", file=sys.stderr)
        try:
            end_all(agent, opened)
        finally:
            agent.leave()
        if not alive:
            raise SystemExit("the calls beside the growers stopped")


def kernel_rungs(daemon: DaemonProcess, call_bytes: int) -> list[Any]:
    """Bytes past memory.max."""
    agent = daemon.open("rungs", priority="batch")
    schedule = f"1000 {2 * call_bytes} 0\n"
    agent.run(
        LEAD.replace('"lead", ', '"max", "--memory-max", size, '),
        LOAD=LOAD,
        schedule=schedule,
        size=str(call_bytes),
    )
    agent.run("tool.wait()")
    report = _last(daemon, "rungs")
    past = report.memory_peak_bytes - report.grant.memory_max_bytes
    return [{"rung": "memory.max", "verdict": pb.Verdict.Name(report.verdict), "past_bytes": past}]


def deny_rung(daemon: DaemonProcess, pool_bytes: int) -> list[Any]:
    """Bytes past the mark and its allowance of a call whose growth is denied."""
    eager = daemon.open("eager", priority="batch")
    since = daemon.audit_path.stat().st_size
    schedule = f"1000 {2 * pool_bytes} 0\n"
    eager.run(
        LEAD.replace('"lead", ', '"eager", "--on-pressure", "deny", '), LOAD=LOAD, schedule=schedule
    )
    eager.run("result = tool.wait()")
    report = _last(daemon, "eager")
    with daemon.audit_path.open() as file:
        file.seek(since)
        denied = [e for line in file if (e := json.loads(line))["event"] == "denied"]
    if not denied:
        return []
    allowed = denied[0]["mark_bytes"] + GuardConfig().deny_allowance
    past = report.memory_peak_bytes - allowed
    return [{"rung": "denied growth", "exit_code": report.exit_code, "past_bytes": past}]


def _features(daemon: DaemonProcess) -> list[str]:
    """Names of the programs that work in this kernel, as the daemon says."""
    found = [line.partition("in the kernel: ")[2] for line in daemon.log.read_text().splitlines()]
    return next((words.split(", ") for words in found if words), [])


def _last(daemon: DaemonProcess, session: str) -> pb.Report:
    wait_until("it has ended", lambda: not list(daemon.cgroup_dir.glob(f"{session}/call-*")), 60)
    request = pb.ListReportsRequest(session_id=session, limit=1)
    return daemon.admin.ListReports(request).reports[0]


def main() -> int:
    """Start a daemon with a pool of its own, measure, print and write the result."""
    in_guest = SLOW > 1 or "AGENTCG_GUEST" in os.environ
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2 if in_guest else ROUNDS)
    parser.add_argument("--open", type=int, default=0, help="calls that are open beside a grower")
    arguments = parser.parse_args()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pool_bytes = int(min(4 * GIB, memory // 3)) // MIB * MIB
    many = 20 if in_guest else MANY
    found: list[Reaction] = []
    with tempfile.TemporaryDirectory(prefix="agentcg-") as directory:
        daemon = daemon_with_pool(Path(directory), pool_bytes, CONFIG)

        def note(reaction: Reaction) -> None:
            found.append(reaction)
            print(
                f"reaction: {reaction.case}: {reaction.past_bytes / MIB:.1f} MiB and "
                f"{reaction.stopped_after_ms:.1f} ms after the pause; "
                f"{reaction.past_mark_bytes / MIB:.0f} MiB past the mark",
                file=sys.stderr,
                flush=True,
            )

        try:
            daemon.start()
            vip, batch = daemon.open("vip", priority="important"), daemon.open("batch")
            # It grows all the time, gives back what it took, and is thus the first to get more.
            vip.run(LEAD, LOAD=LOAD, schedule=f"1000 {96 * MIB} 0\n10 {64 * MIB} 0\n" * 1000)
            for way in WAYS:
                for _ in range(arguments.rounds):
                    note(observed(daemon, batch, way, 1, way, pool_bytes))
            if arguments.open:
                beside = crowded(daemon, batch, arguments.open, arguments.rounds, pool_bytes)
                for reaction in beside:
                    note(reaction)
            for way in ("touch", "populate"):
                note(observed(daemon, batch, f"{many} {way}", many, way, pool_bytes))
                case = f"{many} {way}, daemon stopped"
                note(observed(daemon, batch, case, many, way, pool_bytes, STOPPED_S))
            grown = killed(daemon, batch, 4, pool_bytes)
            vip.run("tool.kill(); tool.wait()")
            rungs = kernel_rungs(daemon, min(GIB, pool_bytes // 8))
            if "deny growth" in _features(daemon):
                rungs += deny_rung(daemon, pool_bytes)
        finally:
            features = _features(daemon)
            daemon.close()
    report = summarize(found, grown, rungs, in_guest)
    report.details.update(features=features, pool_bytes=pool_bytes)
    report.show()
    print(f"  written: {report.write()}")
    return 0 if all(t.met for t in report.targets) else 1


def summarize(
    found: list[Reaction], killed_bytes: int, rungs: list[Any], in_guest: bool
) -> BenchReport:
    """Targets from what was measured; times are none in a guest."""
    targets = []
    for rung in rungs:
        past = rung["past_bytes"]
        name = f"kernel rung {rung['rung']}: bytes past the limit"
        targets.append(Target(name, past, "B", "<= 0", past <= 0))
    for case in dict.fromkeys(r.case for r in found):
        mine = [r for r in found if r.case == case]
        past = max(r.past_bytes for r in mine)
        targets.append(
            Target(f"{case}: growth after the pause", past / MIB, "MiB", "<= 16", past <= MOST_PAST)
            if case.partition(",")[0] in WAYS
            else _past_mark(case, mine)
        )
        hit = sum(r.limit_hit for r in mine)
        targets.append(Target(f"{case}: pool's limit hit", hit, "", "0", hit == 0))
    met = killed_bytes <= KILLED_MOST
    name = "daemon killed: growth in the second before the next"
    targets.append(Target(name, killed_bytes / MIB, "MiB", "<= 64", met))
    if not in_guest:
        for beside in dict.fromkeys(r.case.partition(",")[2] for r in found):
            cases = [f"{way},{beside}" if beside else way for way in WAYS]
            times = [r.stopped_after_ms for r in found if r.case in cases]
            if times:
                targets += _times(times, beside)
    details = {
        "reactions": [asdict(r) for r in found],
        "killed_bytes": killed_bytes,
        "kernel_rungs": rungs,
    }
    where = "guest" if in_guest else "host"
    return BenchReport("reaction", where, len(found), targets, details)


def _times(times: list[float], beside: str) -> Iterator[Target]:
    for share, limit in ((0.5, 1.0), (0.99, 5.0)):
        value = quantile(times, share)
        name = f"from the pause to no more growth,{beside} p{share * 100:g}"
        yield Target(name, value, "ms", f"<= {limit:g}", value <= limit)


def _past_mark(case: str, mine: list[Reaction]) -> Target:
    past = max(r.past_mark_bytes for r in mine)
    return Target(f"{case}: use past the mark", past / MIB, "MiB", "<= 0", past <= 0)


if __name__ == "__main__":
    sys.exit(main())
