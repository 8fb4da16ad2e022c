"""`make test`: every suite in the place it belongs, and what each did in a table at the end.

    host      unit tests, and those that any Linux host with root can run, at full speed
    waits     of these, the ones that wait for seconds and need no CPU meanwhile
    uml       what needs cgroup controllers: the whole daemon on user-mode Linux, without programs
    programs  BPF programs, pressure and what else a full kernel has, on a recent one in QEMU
    sched     the CPU scheduler, on the same kernel in QEMU
    systemd   the units, under systemd as PID 1, in user-mode Linux
    pins      of the units, what needs BPF programs, under systemd in QEMU

Where this machine has the controllers itself, all run natively, and nothing twice. Two suites run
side by side, as a guest is one thread, and `waits` beside both. A suite that collects nothing has
failed. Up to ten tests that fail so are run once more, a suite at a time with nothing beside: the
load of another suite is no fault of theirs, and both results are printed. docs/testing.md says
which test belongs where.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.guest.vm import CHECKOUT
from tests.guest.where import decide
from tests.suites import PYTEST, RESULTS, Suite, plan
from tools import wheel_venv

NO_TESTS = 5  # pytest's exit status when it collected nothing
RUN_AGAIN_MAX = 10
"""Failed tests of a suite that are run once more. Where more fail, load is not the reason."""
GOES_FIRST_NICE = -10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a suite did: its tests by how they ended, how long it took, and CPU time of that.

    Where the CPU time is far less, the suite has waited: for its own sleeps, or for a busy machine.
    """

    suite: Suite
    passed: int
    failed: int
    skipped: int
    took_sec: float
    cpu_sec: float
    broken: str = ""
    """Why it counts as failed although no test has: it collected nothing, or broke."""
    failures: tuple[str, ...] = ()
    """The tests that failed, as pytest names them."""

    def to_run_again(self) -> Suite | None:
        """Make a suite of what failed, None when that is nothing, too much, or not known."""
        if self.broken or not 0 < len(self.failures) <= RUN_AGAIN_MAX:
            return None
        name = f"{self.suite.name}-again"
        return replace(self.suite, name=name, paths=self.failures, marks="")


@dataclass(slots=True)
class Totals:
    """What all suites did; one that broke counts as one failure."""

    outcomes: list[Outcome] = field(default_factory=list)
    passed_alone: list[str] = field(default_factory=list)
    """The tests that failed beside another suite and passed with nothing beside them."""

    def add(self, suite: Suite, status: int, took_sec: float, cpu_sec: float) -> None:
        """Count a suite by its results file and exit status."""
        try:
            root = ElementTree.parse(suite.results).getroot()
        except (FileNotFoundError, ElementTree.ParseError):
            broken = f"no results, exit status {status}"
            self.outcomes.append(Outcome(suite, 0, 1, 0, took_sec, cpu_sec, broken))
            return
        tests = failed = skipped = 0
        for element in root.iter("testsuite"):
            tests += int(element.get("tests", 0))
            failed += int(element.get("failures", 0)) + int(element.get("errors", 0))
            skipped += int(element.get("skipped", 0))
        passed = max(0, tests - failed - skipped)
        failures = _failures(root)
        broken = ""
        if status == NO_TESTS or tests == 0:
            broken = "collected no tests"
        elif status != 0 and failed == 0:
            broken = f"exit status {status}"
        self.outcomes.append(
            Outcome(
                suite, passed, failed + bool(broken), skipped, took_sec, cpu_sec, broken, failures
            )
        )

    def settle(self, beside: Outcome, alone: Totals) -> None:
        """Count what a suite's failed tests did with nothing beside them in place of before."""
        (again,) = alone.outcomes
        if again.broken:
            return
        settled = replace(
            beside,
            passed=beside.passed + again.passed,
            failed=again.failed,
            failures=again.failures,
        )
        self.outcomes[self.outcomes.index(beside)] = settled
        self.passed_alone += [test for test in beside.failures if test not in again.failures]

    @property
    def passed(self) -> int:
        """Tests of all suites that passed."""
        return sum(outcome.passed for outcome in self.outcomes)

    @property
    def failed(self) -> int:
        """Failures of all suites."""
        return sum(outcome.failed for outcome in self.outcomes)

    @property
    def skipped(self) -> int:
        """Tests of all suites that were skipped."""
        return sum(outcome.skipped for outcome in self.outcomes)

    @property
    def broken(self) -> list[str]:
        """What is wrong with the suites that count as failed for another reason than a test."""
        return [f"{o.suite.name}: {o.broken}" for o in self.outcomes if o.broken]

    @property
    def failures(self) -> list[str]:
        """The tests that failed, the suite before each."""
        return [f"{o.suite.name}: {test}" for o in self.outcomes for test in o.failures]

    def table(self, took_sec: float) -> str:
        """Make a line for each suite and one for all, which took `took_sec` together."""
        rows: list[tuple[str, str, int, int, int, float, float]] = [
            (o.suite.name, o.suite.place, o.passed, o.failed, o.skipped, o.took_sec, o.cpu_sec)
            for o in self.outcomes
        ]
        cpu_sec = sum(outcome.cpu_sec for outcome in self.outcomes)
        rows.append(("all", "", self.passed, self.failed, self.skipped, took_sec, cpu_sec))
        form = "{:<10}{:<8}{:>7}{:>8}{:>9}{:>9.0f}{:>9.0f}"
        head = "suite     place    passed  failed  skipped  seconds  CPU sec"
        return "\n".join([head, *(form.format(*row) for row in rows)])

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def _failures(root: ElementTree.Element) -> tuple[str, ...]:
    """Read from pytest's results which tests failed, as it names them on its command line."""
    names: dict[str, None] = {}
    for case in root.iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            continue
        file = case.get("file", "")
        module = file.removesuffix(".py").replace("/", ".")
        classes = case.get("classname", "").removeprefix(module).strip(".")
        names["::".join(filter(None, (file, *classes.split("."), case.get("name"))))] = None
    return tuple(names)


class Runner:
    """Runs suites and relays their output, each line with its suite's name."""

    def __init__(self, suites: Sequence[Suite], extra: Sequence[str]) -> None:
        self.totals = Totals()
        self._waiting = deque(suite for suite in suites if not suite.is_idle)
        self._idle = [suite for suite in suites if suite.is_idle]
        self._extra = extra
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._stopping = False

    def run(self, at_once: int) -> None:
        """Run all, some at once and the idle ones beside them; returns when the last has ended.

        at_once: 1 is one suite after the other, the idle ones first.
        """
        if at_once == 1:
            self._waiting.extendleft(self._idle)
            self._idle = []
        threads = [threading.Thread(target=self._take_turns) for _ in range(at_once)]
        threads += [threading.Thread(target=self._suite, args=(suite,)) for suite in self._idle]
        begun: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                begun.append(thread)
            for thread in begun:
                thread.join()
        except BaseException:
            self._stop()
            for thread in begun:
                thread.join()
            raise

    def run_again(self) -> None:
        """Run what failed once more, with nothing beside it."""
        for outcome in list(self.totals.outcomes):
            suite = outcome.to_run_again()
            if suite is None:
                continue
            alone = Runner([suite], self._extra)
            alone.run(1)
            self.totals.settle(outcome, alone.totals)

    def _take_turns(self) -> None:
        while not self._stopping:
            with self._lock:
                if not self._waiting:
                    return
                suite = self._waiting.popleft()
            self._suite(suite)

    def _suite(self, suite: Suite) -> None:
        suite.results.unlink(missing_ok=True)
        begin = time.monotonic()
        self._say(suite.name, f"{' '.join(suite.paths)} ({suite.place})")
        process = subprocess.Popen(
            suite.argv(self._extra),
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # or a hang hides how far it got
            start_new_session=True,
        )
        with self._lock:
            self._running[suite.name] = process
        if self._stopping:  # since this was decided on
            _end(process)
        elif suite.goes_first:
            _let_go_first(process.pid)
        # The guest has its own limit, with a better message: this one is for what it misses.
        grace_sec = 30 if suite.place != "native" else 0
        timer = threading.Timer(suite.limit_sec + grace_sec, self._expired, (suite, process))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            self._say(suite.name, line.rstrip("\n"))
        cpu_sec = _cpu_sec_at_end(process.pid)
        status = process.wait()
        timer.cancel()
        took_sec = time.monotonic() - begin
        with self._lock:
            del self._running[suite.name]
            self.totals.add(suite, status, took_sec, cpu_sec)
        self._say(suite.name, f"exit status {status} after {took_sec:.0f} s")

    def _expired(self, suite: Suite, process: subprocess.Popen[str]) -> None:
        self._say(suite.name, f"out of time: {suite.limit_sec} s")
        _end(process)

    def _stop(self) -> None:
        self._stopping = True
        with self._lock:
            running = list(self._running.values())
        for process in running:
            _end(process)

    def _say(self, name: str, line: str) -> None:
        with self._lock:
            print(f"{name:>8} | {line}", flush=True)


def _cpu_sec_at_end(pid: int) -> float:
    """Wait until a child ends, without reaping it; CPU time of it and of what it has waited for."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    # utime, stime, cutime and cstime of proc_pid_stat(5).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _let_go_first(pid: int) -> None:
    """Have a suite, which is a session of its own, run before this machine's other work."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, GOES_FIRST_NICE)
        autogroup = Path(f"/proc/{pid}/autogroup")
        if autogroup.exists():  # then priorities count within a session alone
            autogroup.write_text(str(GOES_FIRST_NICE), encoding="ascii")
    except (PermissionError, ProcessLookupError) as error:
        print(f"other work may slow a suite that measures time: {error}", flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    """End a suite's process and what it started: they are a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
        return


def compile_bytecode() -> None:
    """Compile this checkout's modules here: in the guest, Python is 25 times slower."""
    sources = ["agent_sdk", "daemon", "lab", "tests", "bench"]
    argv = [PYTEST[0], "-m", "compileall", "-q", *sources]
    subprocess.run(argv, cwd=CHECKOUT, check=False)
    # pytest compiles modules with tests in its own way.
    argv = [*PYTEST, "--collect-only", "-q", "tests/guest", "tests/kernel", "tests/systemd"]
    subprocess.run(argv, cwd=CHECKOUT, check=False, stdout=subprocess.DEVNULL)


def _terminated(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites; 0 when nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", metavar="SUITE", help="by name, as above")
    parser.add_argument("--serial", action="store_true", help="one suite after the other")
    parser.add_argument("pytest", nargs="*", help="more options for pytest, after --")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    where = decide()
    print(f"tests of the daemon run: {where.kind} ({where.reason})", flush=True)
    suites, left_out = plan(where.kind, Path("/run/systemd/system").is_dir())
    names = [suite.name for suite in suites]
    for name in arguments.only or ():
        if name not in names:
            parser.error(f"argument --only: {name!r} does not run here, only {', '.join(names)}")
    if arguments.only:
        suites = [suite for suite in suites if suite.name in arguments.only]
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    RESULTS.mkdir(parents=True, exist_ok=True)
    compile_bytecode()
    if any(suite.name == "systemd" for suite in suites):
        # What `agentcg install` is tried with. In the guest it would take minutes to build.
        wheel_venv.make()
    runner = Runner(suites, arguments.pytest)
    try:
        runner.run(1 if arguments.serial else min(2, os.cpu_count() or 1))
        runner.run_again()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    for line in [*left_out, *runner.totals.broken]:
        print(f"! {line}")
    print(runner.totals.table(time.monotonic() - begin))
    for test in runner.totals.passed_alone:
        print(f"failed beside another suite, passed alone: {test}")
    for test in runner.totals.failures:
        print(f"failed: {test}")
    print(runner.totals, flush=True)
    return 1 if runner.totals.failed else 0


if __name__ == "__main__":
    sys.exit(main())
