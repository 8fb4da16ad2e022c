"""The benchmark `learning`: no predictor sees what has not ended; scores are what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentcgroup_lab.trace.format import Trace, TraceCall, TraceSample
from agentcgroup_lab.trace.plan import Step
from agentcgroupd.policy.learning import Peaks
from agentcgroupd.policy.schema import Learning
from bench.learning import benchmark, predictors
from bench.learning.predictors import MB, Row
from bench.run import ANYWHERE, names


def row(shape: str, began_s: float, ended_s: float, mb: int, session: int = 0) -> Row:
    """A call that held its peak from its middle on."""
    middle = (began_s + ended_s) / 2
    return Row(session, shape, began_s, ended_s, mb * MB, True, ((middle, mb * MB),))


def test_it_is_a_benchmark_that_runs_anywhere() -> None:
    assert "learning" in names() and "learning" in ANYWHERE
    assert "predictors" not in names()


def test_what_a_call_held_and_for_how_long() -> None:
    steps = [Step(1000, 0, 0), Step(500, 10 * MB, 0), Step(500, 4 * MB, 0), Step(700, 20 * MB, 0)]
    assert predictors.rises_of(5.0, steps) == ((5.0 + 1.0, 10 * MB), (5.0 + 2.0, 20 * MB))
    assert predictors.held_s(steps) == pytest.approx(1.2)
    assert predictors.held_s([Step(1000, 0, 0)]) == 0


def test_only_calls_with_a_command_count() -> None:
    samples = tuple(TraceSample(float(t), 100.0 + 50.0 * (3 <= t <= 6), 0, 0) for t in range(10))
    calls = (
        TraceCall(0.5, 1.5, "a", "Read", None),
        TraceCall(2.0, 6.5, "b", "Bash", "cd x && pytest tests/ | tail"),
    )
    (found,) = predictors.rows_of(Trace("t", "m", 1.0, samples, calls), 7)
    assert (found.session, found.shape, found.seen) == (7, "pytest tests/", True)
    assert found.peak_bytes == pytest.approx(50 * MB, rel=0.01)


def test_a_predictor_knows_only_what_has_ended() -> None:
    rows = [row("a", 0, 2, 10), row("a", 1, 3, 20), row("a", 2, 4, 30), row("a", 5, 6, 40)]
    made = predictors.predictors()
    told = [n for _, n in predictors.predict(rows, made["same shape, last"])]
    assert told == [None, None, 10 * MB, 30 * MB]
    told = [n for _, n in predictors.predict(rows, made["same shape, 2 runs at least"])]
    assert told == [None, None, None, 30 * MB]


def test_other_sessions_are_others() -> None:
    rows = [row("a", 0, 1, 10), row("a", 2, 3, 20), row("a", 4, 5, 30, session=1)]
    told = predictors.predict(rows, predictors.OtherSessions())
    assert [n for _, n in told] == [None, None, 20 * MB]


def test_a_call_without_length_begins_before_it_ends() -> None:
    (first, second) = predictors.in_order([row("a", 1, 1, 10)])
    assert (first[1], second[1]) == (False, True)


def test_concordance_counts_pairs_of_different_sessions_that_differ() -> None:
    big, small, near = row("a", 0, 1, 100), row("b", 0, 1, 10, 1), row("c", 0, 1, 90, 2)
    told = [(big, 5), (small, 3), (near, 3)]
    assert predictors.concordance(told, 64 * MB) == (0.75, 2)
    assert predictors.concordance([(big, 1), (replace(small, session=0), 2)], 64 * MB) == (0.0, 0)


def test_a_score_counts_what_was_known_and_how_far_off() -> None:
    rows = [row("a", 0, 1, 100), row("b", 2, 3, 200), row("c", 4, 5, 1, 1)]
    told = [(rows[0], 50 * MB), (rows[1], None), (rows[2], 0)]
    found = predictors.score(told, [(r, 0) for r in rows])
    assert (found.known, found.known_large) == (2 / 3, 0.5)
    assert (found.errors, found.error_p50, found.exceeded) == (1, 2.0, 1.0)
    assert (found.ordered, found.pairs, found.ordered_common) == (1.0, 1, 0.75)


def test_room_is_asked_for_where_a_call_passes_the_level() -> None:
    rows = [row("a", 0, 1, mb) for mb in range(20, 60)] + [row("a", 2, 4, 55), row("b", 2, 4, 10)]
    room = benchmark.Room(Peaks(least_bytes=0))
    late = [c for c in benchmark.crossings(rows, room, room.likely(0.5), 16 * MB) if c.kept_bytes]
    assert [(c.peak_bytes, c.kept_bytes) for c in late] == [(55 * MB, 40 * MB)]
    summed = benchmark.coverage("x", late)
    assert summed is not None and (summed.suffices, summed.calls, summed.unsaid) == (0, 1, 0)
    assert summed.room_mean_bytes == 24 * MB and summed.needed_mean_bytes == 39 * MB


def test_room_by_shape_ends_where_the_call_holds_more() -> None:
    room = benchmark.Room()
    for mb in range(30):
        room.ended(row("a", 0, 1, 40 if mb < 2 else 100 + mb))
    room.shapes = predictors.InSession(Learning(runs_kept=2))
    for _ in range(2):
        room.shapes.ended(row("a", 0, 1, 40))
    ask = row("a", 5, 6, 90)
    assert room.by_shape(0.9, False)(ask, 16 * MB) == 40 * MB
    assert (room.by_shape(0.9, True)(ask, 16 * MB) or 0) > 100 * MB
    assert (room.by_shape(0.9, False)(ask, 64 * MB) or 0) > 100 * MB
    assert benchmark.times(2.0)(ask, 16 * MB) == 32 * MB


def test_another_order_moves_whole_sessions() -> None:
    moved = benchmark.shifted([row("a", 0, 2, 9), row("a", 1, 3, 9, 1)], [10.0, 0.5])
    assert [(r.began_s, r.ended_s, r.rises[0][0]) for r in moved] == [(10, 12, 11), (1.5, 3.5, 2.5)]
    rows = [row("a", n, n + 0.5, 20 + n, n % 7) for n in range(60)]
    (first, *_) = found = benchmark.orders(rows, 0.9)
    assert found == benchmark.orders(rows, 0.9)
    assert first.low <= first.p50 <= first.high <= 1 and 0 < first.calls <= 60


def test_nothing_said_is_no_coverage() -> None:
    assert benchmark.coverage("x", [benchmark.Crossing(0, 1, 2, None)]) is None


def test_coverage_is_the_same_every_time() -> None:
    found = [benchmark.Crossing(n % 5, 1, n, 20) for n in range(40)]
    one = benchmark.coverage("x", found)
    assert one == benchmark.coverage("x", found)
    assert one is not None and one.low <= one.suffices <= one.high
