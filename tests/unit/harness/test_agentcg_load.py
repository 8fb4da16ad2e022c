"""agentcg-load: memory and CPU as scheduled, and what it says about them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

MIB = 1 << 20
PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Step:
    """A line of the progress file."""

    number: int
    elapsed_ms: float
    late_ms: float


@dataclass(frozen=True)
class Run:
    """Outcome of a replay."""

    status: int
    error: str
    steps: list[Step]
    wall_s: float
    cpu_s: float


@dataclass
class Load:
    """The program and a directory for its files."""

    program: Path
    directory: Path

    def start(self, schedule: str, *args: str) -> subprocess.Popen[str]:
        """Start a replay whose progress can be read from stdout."""
        file = self.directory / "schedule"
        file.write_text(schedule)
        return subprocess.Popen(
            [str(self.program), "--progress", "1", *args, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, schedule: str, *args: str) -> Run:
        """Run a replay to its end."""
        began = time.monotonic()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with self.start(schedule, *args) as process:
            out, err = process.communicate(timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        steps = []
        for line in out.splitlines():
            number, elapsed_ms, late_ms = line.split()
            steps.append(Step(int(number), float(elapsed_ms), float(late_ms)))
        return Run(
            process.returncode,
            err,
            steps,
            time.monotonic() - began,
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        )


@pytest.fixture
def load(programs: Path, tmp_path: Path) -> Load:
    """The load generator."""
    return Load(programs / "agentcg-load", tmp_path)


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory of a process (RssAnon)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


@pytest.mark.parametrize("fill", ["full", "page"])
def test_memory_is_held_as_scheduled(load: Load, fill: str) -> None:
    targets = [10 * MIB, 50 * MIB + 12345, 0, 3 * MIB + 1, 3 * MIB, 1000, 20 * MIB]
    # After each step a pause that holds, in which its size can be read.
    schedule = "".join(f"40 {n} 0\n150 {n} 0\n" for n in targets)
    with load.start(schedule, "--fill", fill) as process:
        assert process.stdout is not None
        own = None
        for target in targets:
            process.stdout.readline()
            held = anonymous_bytes(process.pid)
            # What the process itself takes, a few pages of stack and heap, is the same throughout.
            own = held - 10 * MIB if own is None else own
            assert 0 <= own < MIB // 2
            assert abs(held - own - target) <= 4 * PAGE
            process.stdout.readline()
        assert process.wait(timeout=10) == 0


def test_growth_is_even(load: Load) -> None:
    sizes = []
    began = time.monotonic()
    with load.start(f"500 {100 * MIB} 0\n100 {100 * MIB} 0\n") as process:
        while time.monotonic() - began < 0.45:
            held = anonymous_bytes(process.pid)
            sizes.append((time.monotonic() - began, held))
            time.sleep(0.01)
        process.communicate(timeout=10)
    assert process.returncode == 0
    # Never ahead of the plan by more than a burst, and not all of it at the end.
    assert all(held < 100 * MIB * since / 0.5 + 2 * MIB for since, held in sizes)
    assert any(20 * MIB < held < 80 * MIB for _, held in sizes)


def test_page_rate(load: Load) -> None:
    run = load(f"10 {20 * MIB} 0\n", "--page-rate", str(40 * MIB))
    assert run.status == 0
    assert 430 < run.steps[0].elapsed_ms < 900  # the last burst starts before the end
    assert run.steps[0].late_ms == pytest.approx(run.steps[0].elapsed_ms - 10, abs=0.01)
    run = load(f"300 {20 * MIB} 0\n", "--page-rate", "0", "--alloc-latency", "/dev/null")
    assert 300 <= run.steps[0].elapsed_ms < 500


def test_pages_do_not_compress_nor_repeat(load: Load) -> None:
    with load.start(f"10 {2 * MIB} 0\n10000 {2 * MIB} 0\n") as process:
        assert process.stdout is not None
        process.stdout.readline()
        pages: list[bytes] = []
        with open(f"/proc/{process.pid}/maps") as maps:
            ranges = [line.split() for line in maps if len(line.split()) == 5]
        with open(f"/proc/{process.pid}/mem", "rb") as memory:
            for words in ranges:
                start, end = (int(part, 16) for part in words[0].split("-"))
                if end - start >= MIB:
                    memory.seek(start)
                    data = memory.read(end - start)
                    pages += [data[i : i + PAGE] for i in range(0, len(data), PAGE)]
        process.send_signal(signal.SIGKILL)
    assert len(set(pages)) == len(pages) == 2 * MIB // PAGE
    assert all(len(zlib.compress(page, 1)) > 0.95 * PAGE for page in pages[:50])


@pytest.mark.parametrize("percent", [0, 3, 25, 80])
def test_cpu_percent(load: Load, percent: int) -> None:
    run = load(f"500 0 {percent}\n500 0 {percent}\n")
    assert run.status == 0
    assert 1.0 <= run.wall_s < 2.0
    assert run.cpu_s == pytest.approx(percent / 100, abs=0.03)


def test_more_than_one_cpu_takes_threads(load: Load) -> None:
    run = load("300 0 250\n100 0 0\n20 0 6400\n")
    assert run.status == 0
    assert run.cpu_s == pytest.approx(0.75 + 1.28, abs=0.15)


def test_no_work_is_skipped_where_cpu_is_short(load: Load) -> None:
    pinned = {min(os.sched_getaffinity(0))}
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, pinned)
    try:
        run = load("200 0 300\n50 0 0\n")
    finally:
        os.sched_setaffinity(0, mine)
    assert run.status == 0
    assert run.cpu_s >= 0.6
    assert run.steps[0].late_ms >= 390
    assert run.steps[1].late_ms >= run.steps[0].late_ms


def test_stopped_is_late_by_as_much(load: Load) -> None:
    schedule = "".join(f"100 {n * MIB} 20\n" for n in range(1, 6))
    with load.start(schedule) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(0.03)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.6)
        process.send_signal(signal.SIGCONT)
        lines += process.stdout.readlines()
    late = [float(line.split()[2]) for line in lines]
    assert process.returncode == 0 and len(late) == 5
    assert late[0] < 100
    assert 480 < late[1] < 900
    assert late == sorted(late)


def test_progress_to_a_file(load: Load) -> None:
    file = load.directory / "progress"
    assert load("10 0 0\n20 0 0\n", "--progress", str(file)).status == 0
    steps = [line.split() for line in file.read_text().splitlines()]
    assert [step[0] for step in steps] == ["1", "2"]
    assert float(steps[1][1]) >= 30


def test_schedule_from_stdin_with_comments(load: Load) -> None:
    result = subprocess.run(
        [str(load.program), "--progress=1"],
        input=b"# recorded\n\n  10\t1048576  12.5 \r\n5.5 0 0",
        capture_output=True,
        timeout=30,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert len(result.stdout.splitlines()) == 2


def test_alloc_latency(load: Load) -> None:
    file = load.directory / "latency.json"
    run = load(f"200 {64 * MIB} 0\n10 0 0\n100 {10 * MIB + 7} 0\n", "--alloc-latency", str(file))
    assert run.status == 0
    numbers = json.loads(file.read_text())
    assert set(numbers) == {"n", "p50_usec", "p95_usec", "p99_usec", "max_usec"}
    assert numbers["n"] == 74
    assert 10 < numbers["p50_usec"] <= numbers["p95_usec"] <= numbers["p99_usec"]
    assert numbers["p99_usec"] <= numbers["max_usec"] < 1e6


def test_alloc_latency_of_nothing_is_not_zero(load: Load) -> None:
    file = load.directory / "latency.json"
    assert load("10 1000 0\n", "--alloc-latency", str(file)).status == 0
    percentiles = ("p50_usec", "p95_usec", "p99_usec", "max_usec")
    assert json.loads(file.read_text()) == {"n": 0, **dict.fromkeys(percentiles)}


def test_memory_refused(load: Load) -> None:
    file = load.directory / "schedule"
    latency = load.directory / "latency.json"
    file.write_text(f"10 {20 * MIB} 0\n10 {500 * MIB} 0\n10 0 0\n")
    script = f'ulimit -v 204800; exec "$0" --progress=1 --alloc-latency={latency} "$1"'
    result = subprocess.run(
        ["sh", "-c", script, str(load.program), str(file)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 3
    assert result.stderr == f"agentcg-load: cannot grow to {500 * MIB} bytes\n"
    assert len(result.stdout.splitlines()) == 1
    assert json.loads(latency.read_text())["n"] > 20


def test_it_tells_and_waits_between_steps(load: Load, tmp_path: Path) -> None:
    told, go = tmp_path / "told it", tmp_path / "go"
    schedule = f"20 {4 * MIB} 0\ntell {told}\nawait {go}\n20 0 0\n"
    with load.start(schedule) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("1 ")
        assert process.stdout.readline().startswith("2 ") and told.exists()
        # It holds its memory for as long as it waits.
        time.sleep(0.2)
        assert process.poll() is None
        assert 4 * MIB <= anonymous_bytes(process.pid) < 5 * MIB
        go.touch()
        assert process.wait(timeout=20) == 0


def test_what_it_cannot_tell_is_an_error(load: Load, tmp_path: Path) -> None:
    run = load(f"tell {tmp_path}/none/file\n")
    assert run.status == 1 and "none/file: No such file" in run.error


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("tell\n", "line 1: tell needs the path of a file"),
        ("await  \n", "line 1: await needs the path of a file"),
        ("awaits x\n", "line 1: duration_ms 'awaits'"),
        ("10 0 0\n10 x 0\n", "line 2: memory_bytes 'x'"),
        ("10 0\n", "line 1: cpu_percent is missing"),
        ("10 0 0 0\n", "line 1: '0' after"),
        ("# c\n\n-1 0 0\n", "line 3: duration_ms '-1'"),
        ("10 nan 0\n", "line 1: memory_bytes 'nan'"),
        ("10 1e30 0\n", "line 1: memory_bytes '1e30'"),
        ("inf 0 0\n", "line 1: duration_ms 'inf'"),
        ("10 0 6401\n", "line 1: cpu_percent '6401'"),
        ("10 0 \0\n", "line 1: holds a NUL"),
        ("%s%n 0 0\n", "line 1: duration_ms '%s%n'"),
        ("", "no steps"),
    ],
)
def test_bad_input_names_the_line(load: Load, schedule: str, said: str) -> None:
    run = load(schedule)
    assert run.status == 2
    assert run.error.startswith("agentcg-load: ") and said in run.error
    assert run.steps == []


@pytest.mark.parametrize(
    "option",
    [
        "--fill=half",
        "--page-rate=-1",
        "--page-rate=1x",
        "--progress=999",
        "--progress=/no/file",
        "--alloc-latency=/no/file",
        "--frobnicate",
    ],
)
def test_bad_options_are_named(load: Load, option: str) -> None:
    run = load("10 0 0\n", option)
    assert run.status == 2
    assert option.split("=")[0].lstrip("-") in run.error  # musl leaves the dashes out


def test_missing_schedule(load: Load) -> None:
    result = subprocess.run(
        [str(load.program), str(load.directory / "none")], capture_output=True, text=True
    )
    assert result.returncode == 2 and "none" in result.stderr
