"""Benchmark `overhead`: what the programs in the kernel cost where memory is touched and processes
are made.

The same work is timed without the programs and with them, in turns: one round of a case is four
legs, "without, with, with, without" or the other way round, so that a drift falls on both sides
alike. The programs are loaded for each leg and taken away after it, and for those without them
detached in between, so that all legs are alike but for that; what the programs tell is read, as the
daemon reads it, on another CPU. A round gives one ratio, and a case its median with an
interval from order statistics, which holds whatever the noise is distributed like. A target is met
when the whole interval is below it. The control does all this with nothing attached: what it shows
is the noise.

The work is done in a call of a session of a pool, in its agent leaf, each time two cgroups below
(a container that makes one for itself), and where no cgroup is managed, as deep as systemd puts a
user's terminal. Marks and rates are set and never reached, and as many sessions are protected as
there is room for.

Needs no controllers, but without them there is nothing for the memory programs to do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agentcgroupd.bpf import abi, features
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId
from bench.report import RESULTS, BenchReport, Target

SOURCE = Path(__file__).with_name("overhead.c")
CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-static", "-Wall", "-Wextra", "-Werror"]
MOST_PERCENT = 1.0
CONFIDENCE = 0.95
OBJECTS = ("lifecycle", "memory")
CONTAINER_LEVELS, USER_LEVELS = 2, 5
FAR = 1 << 50
"""Bytes, or events per second, that nothing here reaches."""
WORK = {"faults": "page fault", "spawn": "spawn", "fork": "fork", "mmap": "mmap and munmap"}
TARGETS = ("faults", "spawn")
CALL, AGENT, UNMANAGED = "managed, in a call", "managed, agent leaf", "unmanaged"
STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")


# Arithmetic


@dataclass(frozen=True, slots=True)
class Round:
    """ns for one operation, of each leg without the programs and of each with them."""

    without: tuple[float, ...]
    with_them: tuple[float, ...]

    @property
    def percent(self) -> float:
        """Percent by which the legs with the programs took longer."""
        return (sum(self.with_them) / sum(self.without) - 1) * 100

    @property
    def added_ns(self) -> float:
        """Nanoseconds that the programs added to an operation."""
        return statistics.mean(self.with_them) - statistics.mean(self.without)


@dataclass(frozen=True, slots=True)
class Interval:
    """Interval that holds a median; `confidence` is the exact one, as near above the wanted as
    ranks allow, or below it where there are too few values."""

    low: float
    high: float
    confidence: float


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The narrowest pair of values, one rank from either end, between which the true median is with
    that confidence. The number of values below the median is binomial (n, 1/2)."""
    ordered, n = sorted(values), len(values)
    outside = 0.0  # that at most `rank` values are on one side of the median
    chosen = Interval(ordered[0], ordered[-1], 1 - 2 * 0.5**n)
    for rank in range(n // 2):
        outside += math.comb(n, rank) * 0.5**n
        if 1 - 2 * outside < confidence:
            break
        chosen = Interval(ordered[rank], ordered[n - 1 - rank], 1 - 2 * outside)
    return chosen


def verdict(interval: Interval, most: float) -> str:
    """Judge "<= most": `kept`, `broken`, or `open` where the interval has both."""
    if interval.confidence < CONFIDENCE:
        return "open"
    if interval.high <= most:
        return "kept"
    return "broken" if interval.low > most else "open"


def legs(number: int) -> tuple[bool, ...]:
    """Legs of a round, true where the programs are attached: ABBA and BAAB by turns."""
    return (False, True, True, False) if number % 2 == 0 else (True, False, False, True)


def to_round(attached: Sequence[bool], values: Sequence[float]) -> Round:
    """Sort the legs of a round by what was attached."""
    pairs = list(zip(attached, values, strict=True))
    return Round(tuple(v for a, v in pairs if not a), tuple(v for a, v in pairs if a))


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Summarize a case: the median of the rounds' ratios, its interval, and the times
    themselves."""
    percents = [r.percent for r in rounds]
    interval = median_interval(percents)
    quarters = statistics.quantiles(percents, n=4)
    return {
        "percent": statistics.median(percents),
        "interval_percent": asdict(interval),
        "verdict": verdict(interval, MOST_PERCENT),
        "without_ns": statistics.median(v for r in rounds for v in r.without),
        "added_ns": statistics.median(r.added_ns for r in rounds),
        "spread_percent": {
            "min": min(percents),
            "quarter": quarters[0],
            "three_quarters": quarters[2],
            "max": max(percents),
        },
        "rounds_percent": percents,
    }


# What is measured


@dataclass(frozen=True, slots=True)
class Case:
    """Some work in one place. `control`: with nothing attached after all."""

    work: str
    where: str
    control: bool = False

    @property
    def name(self) -> str:
        """The case's name in the table."""
        return f"{WORK[self.work]}, {self.where}" + (", control" if self.control else "")


CASES = (
    *(Case(work, where) for work in WORK for where in (CALL, AGENT, UNMANAGED)),
    *(Case(work, CALL, control=True) for work in TARGETS),
)


@dataclass(frozen=True, slots=True)
class Size:
    """Size of the measurement: rounds of each case, chunks of work in a leg (the leg's value is
    their median), and how long a chunk should take."""

    rounds: int
    chunks: int
    chunk_ms: float


LONG, SHORT = Size(20, 7, 5), Size(6, 5, 20)


class Worker:
    """A process that does the work, on one CPU, in one cgroup."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._operations: dict[str, int] = {}

    @classmethod
    async def start(cls, program: Path, cgroup: Cgroup, cpu: int) -> Worker:
        """Start the worker program bound to CPU `cpu`, and move it into `cgroup`."""
        process = await asyncio.create_subprocess_exec(
            program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        os.sched_setaffinity(process.pid, {cpu})
        cgroup.attach(process.pid)
        return cls(process)

    async def run(self, what: str, operations: int, times: int) -> list[float]:
        """ns for one operation, each time. Raises SystemExit when the worker has failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what} {operations} {times}\n".encode())
        answer = (await self._process.stdout.readline()).split()
        if len(answer) != times:
            raise SystemExit(f"the worker ended during {what}")
        return [float(value) for value in answer]

    async def size(self, what: str, chunk_ms: float) -> int:
        """Operations that take about so long; found once."""
        if what not in self._operations:
            await self.run(what, 4, 4)
            each_ns = statistics.median(await self.run(what, 32, 4))
            self._operations[what] = max(1, round(chunk_ms * 1e6 / each_ns))
        return self._operations[what]

    async def leg(self, what: str, size: Size) -> float:
        """The median of the chunks, after one that warms up."""
        operations = await self.size(what, size.chunk_ms)
        return statistics.median((await self.run(what, operations, size.chunks + 1))[1:])

    async def end(self) -> None:
        """End the process: there is no more work."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@dataclass(frozen=True, slots=True)
class Place:
    """The cgroups: pool / session / call and agent, and where the workers are."""

    pool: Cgroup
    session: Cgroup
    call: Cgroup
    agent: Cgroup
    work: dict[str, Cgroup]


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """Cgroups with the controllers there are, as the daemon and systemd make them."""
    root = Cgroup.open(cgroup2_mount())
    own = _make(root, f"agentcg-overhead-{secrets.token_hex(4)}")
    try:
        pool = _make(own, "pool")
        session = _make(pool, "session")
        call = _make(session, "call")
        agent = _make(session, "agent")
        work = {
            CALL: _chain(call, CONTAINER_LEVELS),
            AGENT: _chain(agent, CONTAINER_LEVELS),
            UNMANAGED: _chain(own, USER_LEVELS - 1),
        }
        yield Place(pool, session, call, agent, work)
    finally:
        own.kill_and_remove(30)
        root.close()


def _make(parent: Cgroup, name: str) -> Cgroup:
    parent.enable(parent.read(knobs.CGROUP_CONTROLLERS))
    return parent.make_child(name)


def _chain(cgroup: Cgroup, levels: int) -> Cgroup:
    for level in range(levels):
        cgroup = _make(cgroup, f"level-{level}")
    return cgroup


@dataclass(slots=True)
class Programs:
    """The programs that can be attached here, and whether they are."""

    place: Place
    objects: Path | None = None
    states: dict[str, features.FeatureState] = field(default_factory=dict)
    events: int = 0
    lost: int = 0
    loaded: dict[str, BpfObject] = field(default_factory=dict)
    _close: list[Callable[[], None]] = field(default_factory=list)

    def find(self) -> None:
        """Which of the objects this kernel takes. Raises SystemExit if it takes none."""
        for name in OBJECTS:
            bpf, states = features.load(name, self.objects)
            self.states.update((s.name, s) for s in states)
            if bpf is not None:
                bpf.close()
        if not any(s.works for s in self.states.values()):
            raise SystemExit("; ".join(f"{s.name}: {s.reason}" for s in self.states.values()))

    def load(self) -> None:
        """Load, attach and set up all that works, as the daemon does. Raises BpfError."""
        for name in OBJECTS:
            wanted = {d.name for d in features.definitions_of(name) if self.states[d.name].works}
            if not wanted:
                continue
            bpf, states = features.load(name, self.objects)
            if bpf is None or wanted != {s.name for s in states if s.works}:
                raise BpfError(f"{name} did not load as it had before", 0)
            self.loaded[name] = bpf
            (self._lifecycle if name == "lifecycle" else self._memory)(bpf)

    def _count(self, events: Sequence[object]) -> None:
        self.events += len(events)

    def _lifecycle(self, bpf: BpfObject) -> None:
        lifecycle = Lifecycle(bpf)
        self._close.append(lifecycle.close)
        lifecycle.manage(self.place.call.id, abi.CgroupKind.CALL)
        lifecycle.manage(self.place.agent.id, abi.CgroupKind.AGENT)
        lifecycle.start(self._count)
        self._close.append(lambda: self._add_lost(sum(lifecycle.lost().values())))

    def _memory(self, bpf: BpfObject) -> None:
        memory = MemoryPrograms(bpf, GuardConfig())
        self._close.append(memory.close)
        pool, session = self.place.pool.id, self.place.session.id
        call, agent = self.place.call.id, self.place.agent.id
        memory.watch(pool, abi.CgroupKind.POOL, None)
        memory.watch(session, abi.CgroupKind.SESSION, pool)
        memory.watch(call, abi.CgroupKind.CALL, session)
        memory.watch(agent, abi.CgroupKind.AGENT, session)
        for cgroup in (pool, session, call, agent):
            memory.set_mark(cgroup, FAR, FAR // 2)
            memory.set_rates(cgroup, FAR, FAR)
        # The session itself comes last in the table: the longest search for it.
        others = [(CgroupId(FAR + number), 1) for number in range(abi.ABI_PROTECTED_MAX - 1)]
        memory.protect([*others, (session, 1)], pool)
        memory.start(self._count)
        self._close.append(lambda: self._add_lost(sum(memory.lost().values())))

    def _add_lost(self, count: int) -> None:
        self.lost += count

    def detach(self) -> None:
        """Programs and maps stay, but nothing runs any more."""
        for bpf in self.loaded.values():
            for program in bpf.attached():
                bpf.detach(program)

    def close(self) -> None:
        """Unload what is loaded; no error if nothing is."""
        while self._close:
            self._close.pop()()
        self.loaded.clear()

    def counts(self) -> dict[str, tuple[int, int]]:
        """Runs and ns of each attached program, counted while STATISTICS is on."""
        found = {}
        for bpf in self.loaded.values():
            for name in bpf.attached():
                info = Path(f"/proc/self/fdinfo/{bpf.program_fd(name)}").read_text()
                values = dict(line.split(":\t", 1) for line in info.splitlines())
                found[name] = (int(values["run_cnt"]), int(values["run_time_ns"]))
        return found


@dataclass(slots=True)
class Bench:
    """A run of the benchmark."""

    programs: Programs
    workers: dict[str, Worker]
    size: Size
    rounds: dict[Case, list[Round]] = field(default_factory=dict)

    async def round(self, case: Case, number: int) -> Round:
        """The four legs of a case."""
        worker, values = self.workers[case.where], []
        for attach in legs(number):
            self.programs.load()
            try:
                if not attach or case.control:
                    self.programs.detach()
                values.append(await worker.leg(case.work, self.size))
            finally:
                self.programs.close()
        return to_round(legs(number), values)

    async def measure(self, cases: Sequence[Case]) -> None:
        """Measure all rounds; the cases take turns, so that each is spread over the whole time."""
        started = time.monotonic()
        for number in range(self.size.rounds):
            for case in cases:
                self.rounds.setdefault(case, []).append(await self.round(case, number))
            said = f"overhead: round {number + 1} of {self.size.rounds}, "
            print(f"{said}{time.monotonic() - started:.0f} s", file=sys.stderr)

    async def inside(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Runs of each program per operation and ns per run, as the kernel counts them. It takes
        some ten ns to look at the clock, which are in these ns and in no other number here."""
        result: dict[str, Any] = {}
        for case in cases:
            self.programs.load()
            try:
                worker = self.workers[case.where]
                operations = await worker.size(case.work, self.size.chunk_ms)
                before = self.programs.counts()
                await worker.run(case.work, operations, self.size.chunks)
                after = self.programs.counts()
            finally:
                self.programs.close()
            count = operations * self.size.chunks
            result[case.name] = {
                name: {
                    "runs_per_operation": (runs - before[name][0]) / count,
                    "ns_per_run": (ns - before[name][1]) / (runs - before[name][0]),
                    "ns_per_operation": (ns - before[name][1]) / count,
                }
                for name, (runs, ns) in after.items()
                if runs > before[name][0]
            }
        return result


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """The kernel counts what its programs take."""
    before = STATISTICS.read_text()
    STATISTICS.write_text("1")
    try:
        yield
    finally:
        STATISTICS.write_text(before)


def compile_worker() -> Path:
    """The C program, static, so that starting it costs as little as it can."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    program = RESULTS / "overhead"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *CFLAGS, "-o", str(program), str(SOURCE)], check=True)
    return program


def choose_cpus() -> tuple[int, int]:
    """Choose a CPU for the work, and another for this process, which reads the events."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1], allowed[0]


async def run(size: Size, cases: Sequence[Case], objects: Path | None) -> BenchReport:
    """Measure these cases and return the report. `objects`: directory of BPF objects; None: the
    daemon's own."""
    program = compile_worker()
    work_cpu, own_cpu = choose_cpus()
    os.sched_setaffinity(0, {own_cpu})
    load_before = os.getloadavg()[0]
    with place() as cgroups:
        programs = Programs(cgroups, objects)
        programs.find()
        workers = {
            where: await Worker.start(program, cgroup, work_cpu)
            for where, cgroup in cgroups.work.items()
        }
        bench = Bench(programs, workers, size)
        await bench.measure(cases)
        with counted():
            inside = await bench.inside([case for case in cases if not case.control])
        for worker in workers.values():
            await worker.end()
    results = {case.name: summary(rounds) for case, rounds in bench.rounds.items()}
    details = {
        "cases": results,
        "programs": inside,
        "features": {
            s.name: {"attached": s.works, "programs": s.programs, "reason": s.reason}
            for s in programs.states.values()
        },
        "events": programs.events,
        "lost": programs.lost,
        "cpu": {"work": work_cpu, "events": own_cpu},
        "load": {"before": load_before, "after": os.getloadavg()[0]},
        "size": asdict(size),
    }
    where = "guest" if "QEMU" in _vendor() else "host"
    return BenchReport("overhead", where, size.rounds, targets(cases, results), details)


def targets(cases: Sequence[Case], results: dict[str, Any]) -> list[Target]:
    """A row for each case that has a target."""
    rows = []
    for case in cases:
        if case.control or case.work not in TARGETS:
            continue
        found = results[case.name]
        limit, kept = f"<= {MOST_PERCENT:g} %", found["verdict"] == "kept"
        rows.append(Target(case.name, found["percent"], "%", limit, kept))
    return rows


def show(report: BenchReport) -> None:
    """The table of targets, and all cases with their intervals."""
    report.show()
    width = max(len(name) for name in report.details["cases"])
    print(f"\n  {'':<{width}}  without ns   added ns   percent  interval of the median")
    for name, case in report.details["cases"].items():
        where = case["interval_percent"]
        print(
            f"  {name:<{width}} {case['without_ns']:11.0f} {case['added_ns']:10.1f} "
            f"{case['percent']:9.2f}  {where['low']:.2f} to {where['high']:.2f} "
            f"({where['confidence'] * 100:.1f} %): {case['verdict']}"
        )
    for name, programs in report.details["programs"].items():
        parts = [
            f"{p} {v['runs_per_operation']:.3f} x {v['ns_per_run']:.0f} ns"
            for p, v in programs.items()
        ]
        print(f"  {name:<{width}}  {', '.join(parts) or 'no program runs'}")
    for name, feature in report.details["features"].items():
        print(f"  {name}: " + ("attached" if feature["attached"] else feature["reason"]))
    print(
        f"  events read {report.details['events']}, lost {report.details['lost']}; "
        f"load {report.details['load']['before']:.2f} to {report.details['load']['after']:.2f}"
    )


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer rounds, for an emulated CPU")
    parser.add_argument("--rounds", type=int, help="of each case")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="only these")
    parser.add_argument("--objects", type=Path, help="directory of other objects to measure")
    arguments = parser.parse_args()
    chosen = SHORT if arguments.short else LONG
    size = Size(arguments.rounds or chosen.rounds, chosen.chunks, chosen.chunk_ms)
    if size.rounds < 2:
        parser.error("--rounds: 2 or more")
    cases = [case for case in CASES if case.work in arguments.work]
    report = asyncio.run(run(size, cases, arguments.objects))
    show(report)
    print(f"  written: {report.write()}")
    return 0 if all(t.met for t in report.targets) else 1


def _vendor() -> str:
    path = Path("/sys/class/dmi/id/sys_vendor")
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
