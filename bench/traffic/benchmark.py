"""Benchmark `traffic`: what it costs that sockets' bytes and packets are counted.

Two processes of a call talk over TCP on loopback, which is all kernel and no wire, so the dearest
case for a program at each packet: they send MiBs, and a byte there and back. One round is four
legs, without the programs and with them in turns, as in benchmark `overhead`, whose arithmetic this
is. The programs follow the session and the call, as the daemon has them do. Runs anywhere that
cgroup2 is mounted; needs no controllers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator

from agentcgroupd.bpf import net
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from bench.overhead.benchmark import MOST_PERCENT, legs, summary, to_round
from bench.report import BenchReport, Target
from bench.traffic import worker as work

WORK = {"bulk": "a MiB over TCP", "turns": "a byte there and back"}
TARGETS = ("bulk",)
ROUNDS, LEG_S = 20, 0.5


class Worker:
    """The two processes, in a cgroup."""

    def __init__(self, cgroup: Cgroup) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import os; os.read(0, 1); from {work.__name__} import main; main()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        # It forks and opens its sockets in the cgroup that they are counted for.
        cgroup.attach(self._process.pid)
        self._write(b".")
        self._counts: dict[str, int] = {}

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def run(self, what: str, count: int) -> float:
        """Nanoseconds for one. Raises SystemExit when the worker has failed."""
        assert self._process.stdout is not None
        self._write(f"{what} {count}\n".encode())
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker ended during {what}")
        return float(answer)

    def leg(self, what: str) -> float:
        """Nanoseconds for one, over so many as take LEG_S."""
        if what not in self._counts:
            each_ns = self.run(what, max(8, round(0.1e9 / self.run(what, 8))))
            self._counts[what] = max(8, round(LEG_S * 1e9 / each_ns))
        return self.run(what, self._counts[what])

    def end(self) -> None:
        """End both."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def cgroups() -> Iterator[list[Cgroup]]:
    """A pool, a session in it, and a call in that."""
    root = Cgroup.open(cgroup2_mount())
    pool = root.make_child(f"agentcg-traffic-{secrets.token_hex(4)}")
    try:
        session = pool.make_child("session")
        yield [pool, session, session.make_child("call")]
    finally:
        pool.kill_and_remove(30)
        root.close()


@contextlib.contextmanager
def counted(places: list[Cgroup]) -> Iterator[net.NetPrograms]:
    """The programs, attached as the daemon does. Raises SystemExit where the kernel takes none."""
    programs, states = net.load()
    if programs is None:
        raise SystemExit("; ".join(f"{state.name}: {state.reason}" for state in states))
    try:
        pool, *followed = places
        programs.look_from(2)
        for cgroup in followed:
            programs.follow(cgroup.id)
        programs.attach(pool)
        yield programs
    finally:
        programs.close()


def run(rounds: int) -> BenchReport:
    """Measure, and return the report."""
    results = {}
    load_before = os.getloadavg()[0]
    with cgroups() as places:
        worker = Worker(places[-1])
        with counted(places) as programs:
            worker.run("bulk", 8)
            seen = programs.of(places[-1].id)
            if seen is None or seen.send_bytes < 8 * work.MIB:
                raise SystemExit("what the worker sent was not counted")
        for what in WORK:
            found = []
            for number in range(rounds):
                values = []
                for attached in legs(number):
                    with counted(places) if attached else contextlib.nullcontext():
                        values.append(worker.leg(what))
                found.append(to_round(legs(number), values))
            results[what] = summary(found)
        worker.end()
    targets = [
        Target(
            name=WORK[what],
            value=results[what]["percent"],
            unit="%",
            target=f"<= {MOST_PERCENT:g} %",
            met=results[what]["verdict"] == "kept",
        )
        for what in TARGETS
    ]
    load = {"before": load_before, "after": os.getloadavg()[0]}
    return BenchReport("traffic", "host", rounds, targets, {"cases": results, "load": load})


def show(report: BenchReport) -> None:
    """Print the targets, and all cases with their intervals."""
    report.show()
    for what, case in report.details["cases"].items():
        where = case["interval_percent"]
        print(
            f"  {WORK[what]}: {case['without_ns'] / 1000:.1f} us without, {case['percent']:+.2f} % "
            f"({where['low']:.2f} to {where['high']:.2f}): {case['verdict']}"
        )
    load = report.details["load"]
    print(f"  load {load['before']:.2f} to {load['after']:.2f}")


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each case")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: 2 or more")
    report = run(arguments.rounds)
    show(report)
    print(f"  written: {report.write()}")
    return 0 if all(target.met for target in report.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
