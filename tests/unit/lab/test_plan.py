"""Plans add up to the recording they were made from, and keep its order and think time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcgroup_lab.replay.driver import Clock
from agentcgroup_lab.trace import plan
from agentcgroup_lab.trace.attribute import attribute
from agentcgroup_lab.trace.format import Trace, TraceCall, TraceSample

MB = 1_000_000
ROUNDING_MB = 0.05  # pages, once for each holder


def make_trace(mem_mb: list[float], calls: list[TraceCall], cpu_pct: float = 10.0) -> Trace:
    samples = tuple(TraceSample(float(i), mb, cpu_pct, cpu_pct) for i, mb in enumerate(mem_mb))
    return Trace("t", "none", 1.0, samples, tuple(sorted(calls, key=lambda c: c.start_s)))


def call(start_s: float, end_s: float, background: bool = False) -> TraceCall:
    return TraceCall(start_s, end_s, "id", "Bash", None, background)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    mem_mb = draw(st.lists(st.integers(0, 2000), min_size=2, max_size=25))
    last_s = len(mem_mb) - 1
    # Times on a grid of 10 ms: samples are seconds, so calls meet them, fall between and overlap.
    times = st.integers(0, last_s * 100)
    pairs = draw(st.lists(st.tuples(times, times, st.booleans()), max_size=8))
    calls = [call(min(a, b) / 100, max(a, b) / 100, background) for a, b, background in pairs]
    return make_trace([float(mb) for mb in mem_mb], calls)


@settings(max_examples=300, deadline=None)
@given(recorded=traces())
def test_the_parts_add_up_to_the_recording(recorded: Trace) -> None:
    # A call of no length holds something for no time; only the plan makes a millisecond of it.
    recorded = replace(recorded, calls=tuple(c for c in recorded.calls if c.end_s > c.start_s))
    agent, calls = attribute(recorded.samples, recorded.calls, cpu_max_pct=100.0)

    def held(at_s: float) -> float:
        total = 0.0
        for pieces in (agent, *calls):
            for piece in pieces:
                if piece.start_s < at_s <= piece.end_s:
                    total += piece.mem_mb
        return total

    for before, now in itertools.pairwise(recorded.samples):
        # At the sample, or (seen late) between it and the one before, the recorded level is held.
        times = {now.t_s, *(t for c in recorded.calls for t in (c.start_s, c.end_s))}
        inside = sorted(t for t in times if before.t_s < t <= now.t_s)
        most = max(held(t) for t in inside)
        assert most >= now.mem_mb - 1e-6
        # Nothing is counted twice: never more than the higher of the two samples.
        assert most <= max(before.mem_mb, now.mem_mb) + 1e-6
        assert held(now.t_s) <= now.mem_mb + 1e-6


@settings(max_examples=150, deadline=None)
@given(recorded=traces(), speed=st.sampled_from([1.0, 3.0, 10.0]))
def test_a_plan_keeps_order_think_time_and_peak(recorded: Trace, speed: float) -> None:
    made = plan.make_plan(recorded, plan.Options(speed=speed))
    assert len(made.calls) == sum(
        c.end_s > 0.0 and c.start_s < recorded.duration_s for c in recorded.calls
    )
    assert all(a.start_s <= b.start_s for a, b in itertools.pairwise(made.calls))
    assert all(one.think_s >= 0.0 for one in made.calls)
    assert made.agent[0].at_s == 0.0
    for one in made.calls:
        duration_s = sum(step.duration_ms for step in one.steps) / 1000
        assert all(step.duration_ms >= 1 for step in one.steps)
        assert duration_s == pytest.approx(one.end_s - one.start_s, abs=1e-9)
    # What the first sample shows is held for no time unless the second shows it, too.
    peak_mb = max(sample.mem_mb for sample in recorded.samples[1:])
    assert made.peak_bytes / MB >= peak_mb - ROUNDING_MB * (len(made.calls) + 1)


def test_memory_scale_and_speed() -> None:
    recorded = make_trace([100, 100, 500, 100, 100], [call(1.2, 2.8)])
    whole = plan.make_plan(recorded)
    small = plan.make_plan(recorded, plan.Options(memory_scale=0.25, speed=4.0))
    assert small.peak_bytes == pytest.approx(whole.peak_bytes / 4, rel=0.001)
    assert small.duration_s == pytest.approx(whole.duration_s / 4)
    assert small.calls[0].start_s == pytest.approx(0.3)
    assert small.calls[0].think_s == pytest.approx(0.3)
    assert whole.calls[0].peak_bytes == pytest.approx(400 * MB, rel=0.001)
    assert whole.agent_peak_bytes == pytest.approx(100 * MB, rel=0.001)


def test_a_rise_that_stays_is_the_agents_after_the_call() -> None:
    made = plan.make_plan(make_trace([100, 100, 300, 180, 180], [call(1.5, 2.5)]))
    assert made.calls[0].peak_bytes == pytest.approx(200 * MB, rel=0.001)
    assert made.agent_bytes_at(2.4) == pytest.approx(100 * MB, rel=0.001)
    assert made.agent_bytes_at(2.6) == pytest.approx(180 * MB, rel=0.001)


def test_a_short_calls_burst_is_seen_late() -> None:
    made = plan.make_plan(make_trace([100, 100, 400, 120, 120], [call(1.3, 1.8)]))
    assert made.calls[0].peak_bytes == pytest.approx(300 * MB, rel=0.001)
    assert made.agent_peak_bytes == pytest.approx(120 * MB, rel=0.001)


def test_of_overlapping_calls_the_youngest_rises_and_the_background_one_last() -> None:
    recorded = make_trace(
        [100, 150, 450, 150, 100], [call(0.5, 3.5, background=True), call(1.5, 2.5)]
    )
    made = plan.make_plan(recorded)
    assert made.calls[0].peak_bytes == pytest.approx(50 * MB, rel=0.001)
    assert made.calls[1].peak_bytes == pytest.approx(300 * MB, rel=0.001)


def test_with_max_calls_the_largest_stay_and_nothing_is_lost() -> None:
    calls = [call(0.1, 0.2), call(1.5, 2.5), call(3.1, 3.2)]
    recorded = make_trace([100, 100, 400, 100, 100], calls)
    made = plan.make_plan(recorded, plan.Options(max_calls=1))
    assert made.calls_left_out == 2
    assert made.calls[0].start_s == pytest.approx(1.5)
    assert made.peak_bytes == pytest.approx(400 * MB, rel=0.001)


def test_a_window_begins_at_zero_and_holds_the_peak() -> None:
    recorded = make_trace([100.0] * 20 + [900.0] + [100.0] * 20, [call(0.0, 19.5), call(19.6, 21)])
    window = plan.busiest_window(recorded, 10)
    assert window == (15.0, 25.0)
    made = plan.make_plan(recorded, plan.Options(window_s=window))
    assert made.duration_s == pytest.approx(10)
    assert made.calls[0].start_s == 0.0
    assert made.peak_bytes == pytest.approx(900 * MB, rel=0.001)
    with pytest.raises(ValueError, match="no sample"):
        plan.make_plan(recorded, plan.Options(window_s=(0.1, 0.2)))


@pytest.mark.parametrize(
    "values",
    [
        {"memory_scale": 0.0},
        {"speed": -1.0},
        {"speed": float("nan")},
        {"max_calls": 0},
        {"window_s": (5.0, 5.0)},
    ],
)
def test_options_are_checked(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        plan.Options(**values)  # type: ignore[arg-type]


def test_sessions_are_shifted_until_their_peaks_meet() -> None:
    early = plan.make_plan(make_trace([100, 900, 900, 100, 100, 100], [call(0.5, 2.5)]))
    late = plan.make_plan(make_trace([100, 100, 100, 100, 900, 100], [call(3.5, 4.5)]))
    offsets = plan.start_offsets_s([early, late])
    assert min(offsets) == 0.0
    demand = plan.Demand([early, late], offsets)
    assert demand.peak_bytes == pytest.approx(1800 * MB, rel=0.001)


def test_a_late_call_delays_what_follows_it() -> None:
    clock = Clock(now=0.0)
    clock.begin(0, end_s=2.0)
    assert clock.advance(5.0) == 2.0  # held up at its planned end
    assert clock.wait_s(3.0) == float("inf")
    clock.end(0, next_start_s=3.0)
    assert clock.advance(5.5) == 2.5
    assert clock.wait_s(3.0) == pytest.approx(0.5)


def test_a_call_that_was_killed_early_brings_forward_what_follows() -> None:
    clock = Clock(now=0.0)
    clock.begin(0, end_s=8.0)
    assert clock.advance(1.0) == 1.0
    clock.end(0, next_start_s=9.0)
    assert clock.at_s == 8.0
    assert clock.wait_s(9.0) == pytest.approx(1.0)


def test_overlapping_calls_are_waited_for_together() -> None:
    clock = Clock(now=0.0)
    clock.begin(0, end_s=5.0)
    clock.begin(1, end_s=3.0)
    assert clock.advance(4.0) == 3.0
    clock.end(0, next_start_s=6.0)
    assert clock.advance(4.5) == 3.0
    clock.end(1, next_start_s=6.0)
    assert clock.at_s == 5.0
