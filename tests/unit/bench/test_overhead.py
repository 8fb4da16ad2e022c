"""bench/overhead: the arithmetic between the clock and the table."""

from __future__ import annotations

import itertools
import random
import statistics
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.overhead import benchmark
from bench.overhead.benchmark import (
    CASES,
    Interval,
    Round,
    legs,
    median_interval,
    summary,
    targets,
    to_round,
    verdict,
)


def test_a_drift_falls_on_both_sides_alike() -> None:
    """100 ns that grow by 1 each leg; the programs add 3 %."""
    for number in range(2):
        attached = legs(number)
        drifting = [100.0 + leg for leg in range(4)]
        assert to_round(attached, drifting).percent == pytest.approx(0)
        slower = [v * 1.03 if a else v for a, v in zip(attached, drifting, strict=True)]
        found = to_round(attached, slower)
        assert found.percent == pytest.approx(3)
        assert found.added_ns == pytest.approx(101.5 * 0.03)


def test_either_side_goes_first_equally_often() -> None:
    for number in range(4):
        assert sum(legs(number)) == 2
    assert legs(0) == tuple(not attached for attached in legs(1))


def test_legs_are_sorted_by_what_was_attached() -> None:
    assert to_round((False, True, True, False), (1, 2, 3, 4)) == Round((1, 4), (2, 3))
    with pytest.raises(ValueError):
        to_round((False, True), (1, 2, 3))


@pytest.mark.parametrize(
    ("n", "rank", "confidence"),
    # Published tables of the sign test's interval: n, 1-based rank from either end, confidence.
    [(6, 1, 0.96875), (10, 2, 0.978516), (15, 4, 0.964844), (20, 6, 0.958611), (25, 8, 0.956715)],
)
def test_ranks_are_those_of_the_tables(n: int, rank: int, confidence: float) -> None:
    values = [float(value) for value in range(1, n + 1)]
    random.Random(n).shuffle(values)
    found = median_interval(values)
    assert (found.low, found.high) == (rank, n + 1 - rank)
    assert found.confidence == pytest.approx(confidence, abs=1e-6)


def test_too_few_values_say_so() -> None:
    found = median_interval([3.0, 1.0, 2.0, 5.0, 4.0])
    assert found == Interval(1.0, 5.0, 0.9375)
    assert verdict(Interval(-9.0, -8.0, 0.9375), 1.0) == "open"


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """Exactly, over all 2^7 ways in which seven values can lie on either side of the median."""
    held = 0
    for signs in itertools.product((-1.0, 1.0), repeat=7):
        found = median_interval([sign * (1 + place) for place, sign in enumerate(signs)], 0.8)
        held += found.low <= 0 <= found.high
    assert held / 2**7 == pytest.approx(found.confidence)
    assert found.confidence == pytest.approx(0.875)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=60))
def test_the_interval_is_around_the_median(values: list[float]) -> None:
    found = median_interval(values)
    assert found.low <= statistics.median(values) <= found.high
    assert found.low in values and found.high in values
    assert found.confidence >= 0.95 or len(values) < 6


def test_a_target_is_met_by_the_whole_interval() -> None:
    assert verdict(Interval(0.2, 1.0, 0.95), 1.0) == "kept"
    assert verdict(Interval(0.2, 1.1, 0.95), 1.0) == "open"
    assert verdict(Interval(1.1, 1.2, 0.95), 1.0) == "broken"


def test_a_summary_is_of_the_rounds() -> None:
    rounds = [Round((100, 100), (100 + added, 100 + added)) for added in (2, 0.5, 3, 9, 2, 2)]
    found = summary(rounds)
    assert found["percent"] == pytest.approx(2)
    assert found["added_ns"] == pytest.approx(2)
    assert found["without_ns"] == 100
    assert found["interval_percent"]["low"] == pytest.approx(0.5)
    assert found["interval_percent"]["high"] == pytest.approx(9)
    assert found["verdict"] == "open"


def test_rows_are_the_cases_with_a_target() -> None:
    results = {case.name: {"percent": 0.5, "verdict": "kept"} for case in CASES}
    results["spawn, unmanaged"] = {"percent": 0.9, "verdict": "open"}
    rows = targets(CASES, results)
    assert {row.name for row in rows} == {
        f"{work}, {where}"
        for work in ("page fault", "spawn")
        for where in ("managed, in a call", "managed, agent leaf", "unmanaged")
    }
    assert [row.name for row in rows if not row.met] == ["spawn, unmanaged"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program."""
    program = tmp_path_factory.mktemp("overhead") / "overhead"
    subprocess.run(["cc", *benchmark.CFLAGS, "-o", program, benchmark.SOURCE], check=True)
    return program


def _work(worker: Path, commands: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([worker], input=commands, capture_output=True, text=True, timeout=60)


def test_every_kind_of_work_is_timed(worker: Path) -> None:
    done = _work(worker, "".join(f"{what} 3 4\n" for what in benchmark.WORK))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [len(line.split()) for line in lines] == [4] * len(benchmark.WORK)
    assert all(float(value) > 0 for line in lines for value in line.split())


@pytest.mark.parametrize("command", ["dance 1 1", "faults 0 1", "faults 1", "spawn 1 -1"])
def test_bad_commands_are_refused(worker: Path, command: str) -> None:
    done = _work(worker, command + "\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("overhead: ")
