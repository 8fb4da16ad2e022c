"""`make test`: every suite in the place it belongs, and one line of totals at the end.

    host      unit tests, and those that any Linux host with root can run, at full speed
    guest     the whole daemon on a recent kernel: one boot for all of them
    systemd   the units, under systemd as PID 1: another boot
    kernel    those of the host suite that ask the kernel, on the recent one
    cpu       the CPU scheduler, on the recent one

Where this machine has the controllers itself, all run natively, and nothing twice. Two lanes run
side by side: a guest is one emulating thread. A suite that collects nothing has failed.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.guest.vm import CHECKOUT
from tests.guest.where import Kind, decide

RESULTS = CHECKOUT / "build/test"
PYTEST = [str(CHECKOUT / ".venv/bin/python"), "-m", "pytest", "-p", "no:cacheprovider"]
CPU = ("tests/guest/test_cpu.py", "tests/guest/test_sched.py")
"""A suite of their own, so that both lanes take about as long."""
ANY_KERNEL = tuple(f"tests/kernel/test_{name}.py" for name in (
    "gpu_calls", "hostile", "policy_reload", "readme"
))  # fmt: skip
"""What they show does not depend on the kernel's age: the host is enough."""
NO_TESTS = 5  # pytest's exit status when it collected nothing


@dataclass(frozen=True, slots=True)
class Suite:
    """Some tests, and the place and the time that they get.

    marks: pytest's -m. test_limit_sec: for one test; limit_sec: for all, the boot included.
    """

    name: str
    paths: tuple[str, ...]
    where: Kind
    limit_sec: int
    test_limit_sec: int = 120
    marks: str = ""
    guest_options: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        """Where pytest writes what happened."""
        return RESULTS / f"{self.name}.xml"

    def argv(self, extra: Sequence[str] = ()) -> list[str]:
        """The command that runs it."""
        pytest = [*PYTEST, f"--junit-xml={self.results}", f"--timeout={self.test_limit_sec}"]
        if self.marks:
            pytest += ["-m", self.marks]
        pytest += [*extra, *self.paths]
        if self.where == "native":
            return pytest
        pytest.insert(len(PYTEST), "-v")  # slow, so each test shows as it ends
        guest = [sys.executable, "-m", "tests.guest.vm", f"--timeout={self.limit_sec}"]
        return [*guest, *self.guest_options, "--", *pytest]


def plan(where: Kind, systemd_here: bool) -> tuple[list[list[Suite]], list[str]]:
    """Suites in lanes: lanes run side by side, the suites of one in turn. And what is left out.

    systemd_here: PID 1 is systemd.
    """
    if where == "guest":
        host = Suite(
            "host", ("tests/unit", "tests/kernel"), "native", 1800, marks="not controllers"
        )
        daemon, cpu, kernel = (
            Suite(
                name,
                paths,
                "guest",
                limit_sec=2700,
                test_limit_sec=600,
                marks="not full_speed",
                guest_options=("--memory=2048",),
            )
            for name, paths in (
                ("guest", ("tests/guest", *(f"--ignore={path}" for path in CPU))),
                ("cpu", CPU),
                ("kernel", ("tests/kernel", *(f"--ignore={path}" for path in ANY_KERNEL))),
            )
        )
        systemd = Suite(
            "systemd",
            ("tests/systemd",),
            "guest",
            limit_sec=900,
            test_limit_sec=240,
            guest_options=("--systemd",),
        )
        # So that both lanes take about as long.
        return [[host, kernel], [daemon, systemd, cpu]], []
    suites = [Suite("host", ("tests/unit", "tests/kernel", "tests/guest"), "native", 1100)]
    if systemd_here:
        return [[*suites, Suite("systemd", ("tests/systemd",), "native", 280)]], []
    return [suites], ["systemd: not PID 1 here (AGENTCG_WHERE=guest runs everything in the guest)"]


@dataclass(slots=True)
class Totals:
    """Tests by how they ended; a suite that broke counts as one failure."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, suite: Suite, status: int) -> None:
        """Count a suite by its results file and exit status."""
        try:
            root = ElementTree.parse(suite.results).getroot()
        except (FileNotFoundError, ElementTree.ParseError):
            self._broke(suite, f"no results, exit status {status}")
            return
        tests = failed = skipped = 0
        for element in root.iter("testsuite"):
            tests += int(element.get("tests", 0))
            failed += int(element.get("failures", 0)) + int(element.get("errors", 0))
            skipped += int(element.get("skipped", 0))
        self.passed += max(0, tests - failed - skipped)
        self.failed += failed
        self.skipped += skipped
        if status == NO_TESTS or tests == 0:
            self._broke(suite, "collected no tests")
        elif status != 0 and failed == 0:
            self._broke(suite, f"exit status {status}")

    def _broke(self, suite: Suite, reason: str) -> None:
        self.failed += 1
        self.broken.append(f"{suite.name}: {reason}")

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


class Runner:
    """Runs lanes of suites and relays their output, each line with its suite's name."""

    def __init__(self, extra: Sequence[str]) -> None:
        self.totals = Totals()
        self._extra = extra
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._stopping = False

    def run(self, lanes: Sequence[Sequence[Suite]], *, side_by_side: bool) -> None:
        """Run all; returns when the last suite has ended."""
        if not side_by_side:
            lanes = [[suite for lane in lanes for suite in lane]]
        threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self._stop()
            for thread in threads:
                thread.join()
            raise

    def _lane(self, suites: Sequence[Suite]) -> None:
        for suite in suites:
            if self._stopping:
                return
            self._suite(suite)

    def _suite(self, suite: Suite) -> None:
        suite.results.unlink(missing_ok=True)
        begin = time.monotonic()
        self._say(suite.name, f"{' '.join(suite.paths)} ({suite.where})")
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
        # The guest has its own limit, with a better message: this one is for what it misses.
        grace_sec = 30 if suite.where == "guest" else 0
        timer = threading.Timer(suite.limit_sec + grace_sec, self._expired, (suite, process))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            self._say(suite.name, line.rstrip("\n"))
        status = process.wait()
        timer.cancel()
        with self._lock:
            del self._running[suite.name]
            self.totals.add(suite, status)
        self._say(suite.name, f"exit status {status} after {time.monotonic() - begin:.0f} s")

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
            print(f"{name:>7} | {line}", flush=True)


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
    sources = ["agent_sdk", "daemon", "tests", "bench"]
    argv = [PYTEST[0], "-m", "compileall", "-q", *sources]
    subprocess.run(argv, cwd=CHECKOUT, check=False)


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
    signal.signal(signal.SIGTERM, _terminated)
    where = decide()
    print(f"tests of the daemon run: {where.kind} ({where.reason})", flush=True)
    lanes, left_out = plan(where.kind, Path("/run/systemd/system").is_dir())
    if arguments.only:
        lanes = [[suite for suite in lane if suite.name in arguments.only] for lane in lanes]
    RESULTS.mkdir(parents=True, exist_ok=True)
    compile_bytecode()
    runner = Runner(arguments.pytest)
    try:
        runner.run(lanes, side_by_side=not arguments.serial and (os.cpu_count() or 1) > 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    for line in [*left_out, *runner.totals.broken]:
        print(f"! {line}")
    print(runner.totals, flush=True)
    return 1 if runner.totals.failed else 0


if __name__ == "__main__":
    sys.exit(main())
