"""The simulator keeps its books, follows plans as a replay does, and does what decisions say."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcgroup.errors import AgentcgError
from agentcgroup_lab.simulate import cli, guard
from agentcgroup_lab.simulate.guard import Sampling, SimulatedGuard
from agentcgroup_lab.simulate.plans import Profile, Segment, compile_plan
from agentcgroup_lab.simulate.report import table
from agentcgroup_lab.simulate.run import (
    NORMAL_PRIORITY,
    Setup,
    SimulatedSession,
    reserved,
    simulate,
    simulate_once,
)
from agentcgroup_lab.simulate.types import KernelModel, Lane
from agentcgroup_lab.simulate.world import World
from agentcgroup_lab.trace.plan import AgentStep, Options, Plan, PlannedCall, Step
from agentcgroupd.policy import schedule
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Action, Decision, Outcome, Snapshot, State

MB = 1_000_000
Decider = Callable[[Snapshot], list[Decision]]


def call(
    start_s: float, end_s: float, *levels_mb: float, background: bool = False, index: int = 0
) -> PlannedCall:
    """Steps of equal length at these levels."""
    step_ms = round((end_s - start_s) * 1000 / len(levels_mb))
    steps = tuple(Step(step_ms, round(level * MB), 50) for level in levels_mb)
    return PlannedCall(index, f"c{index}", "Bash", start_s, end_s, 0.0, background, steps)


def plan(*calls: PlannedCall, agent_mb: float = 100, duration_s: float = 10.0) -> Plan:
    """An agent that holds the same all the time."""
    agent = (AgentStep(0.0, round(agent_mb * MB), 0),)
    return Plan("made", duration_s, agent, calls, Options())


def profile(*calls: PlannedCall, agent_mb: float = 100, duration_s: float = 10.0) -> Profile:
    return compile_plan(plan(*calls, agent_mb=agent_mb, duration_s=duration_s))


def world_of(
    limit_mb: float, *profiles: Profile, kernel: KernelModel | None = None, strategy: Any = "none"
) -> World:
    world = World(kernel or KernelModel(), round(limit_mb * MB), strategy, len(profiles))
    world.lanes = [Lane(f"s{i}", NORMAL_PRIORITY, False) for i in range(len(profiles))]
    for lane, one in zip(world.lanes, profiles, strict=True):
        world.open_session(lane, one)
    return world


@pytest.fixture
def decides(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decider], None]:
    """Puts something else in the engine's place."""

    def use(decider: Decider) -> None:
        def decide(policy: Policy, now: Snapshot, signal: object, state: State) -> Outcome:
            del policy, signal
            return Outcome(tuple(decider(now)), state)

        monkeypatch.setattr(guard, "decide", decide)
        monkeypatch.setattr(schedule, "attention_bytes", lambda policy, limit: limit)

    return use


def test_a_plan_becomes_stretches_of_even_growth() -> None:
    profile = compile_plan(plan(call(1, 4, 50, 50, 20))).calls[0]
    assert profile.segments == (
        Segment(1.0, 0.0, 50.0 * MB, 0.5),
        Segment(1.0, 50.0 * MB, 0.0, 0.5),
        Segment(1.0, 20.0 * MB, 0.0, 0.5),
    )
    fast = compile_plan(plan(call(1, 2, 500)), rise_bytes_per_s=1000.0 * MB).calls[0]
    assert [(s.duration_s, s.rate) for s in fast.segments] == [(0.5, 1000.0 * MB), (0.5, 0.0)]
    assert (profile.duration_s, profile.end_s, profile.peak_bytes) == (3.0, 4.0, 50.0 * MB)


def test_undisturbed_sessions_take_as_long_as_recorded() -> None:
    one = profile(call(1, 3, 200), call(5, 6, 50, index=1))
    result = simulate_once(
        Policy(), [SimulatedSession(one), SimulatedSession(one, True, 2.5)], Setup(1 << 30, 2)
    )
    assert result.seconds == pytest.approx(12.5)
    assert (result.important.most, result.everyone.most) == (1.0, 1.0)
    assert (result.calls_finished, result.calls_survived, result.sessions_survived) == (4, 1, 1)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 8),
            st.floats(0.2, 3),
            st.lists(st.integers(0, 400), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=5,
    ),
    st.floats(0.1, 9.9),
)
@settings(max_examples=60, deadline=None)
def test_use_is_the_sum_of_what_the_plan_holds(
    calls: list[tuple[float, float, list[int]]], until_s: float
) -> None:
    """At the ends of steps: between them a call is on its way."""
    planned = [
        call(round(start, 3), round(start + length, 3), *levels, index=i)
        for i, (start, length, levels) in enumerate(sorted(calls))
    ]
    one = compile_plan(plan(*planned, duration_s=20.0))
    world = world_of(100_000, one)
    world.run(until_s, lambda at: None)
    for open_call in world.calls:
        world.sync(open_call)
    held = sum(c.held_bytes for c in world.calls) + sum(x.agent_bytes for x in world.lanes)
    assert world.usage == pytest.approx(held, abs=1.0)
    assert world.slope == pytest.approx(sum(c.segment.rate for c in world.calls), abs=1e-3)
    world.run(1000.0, lambda at: None)
    assert world.usage == pytest.approx(0.0, abs=1.0)
    assert world.counts["finished"] == len(planned)


def test_a_late_call_delays_what_follows_and_a_killed_one_brings_it_forward() -> None:
    one = profile(call(1, 3, 10), call(5, 6, 10, index=1))
    for how, begins_s in (("late", 8.0), ("killed", 4.0)):
        world = world_of(1000, one)
        world.run(2.0, lambda at: None)
        (first,) = world.calls
        if how == "killed":
            world.end_call(first, "killed")
        else:
            first.frozen_at_s = world.now
            world.set_pace(first)
            world.run(5.0, lambda at: None)
            world.go_on(first)
        world.run(begins_s - 0.01, lambda at: None)
        assert not world.calls
        world.run(begins_s + 0.01, lambda at: None)
        assert [c.profile.start_s for c in world.calls] == [5.0]


def test_what_ends_first_is_not_waited_for_in_the_background() -> None:
    one = profile(call(1, 4, 10, background=True), call(2, 3, 10, index=1))
    world = world_of(1000, one)
    world.run(1.5, lambda at: None)
    (background,) = world.calls
    background.frozen_at_s = world.now
    world.set_pace(background)
    world.run(3.5, lambda at: None)
    assert world.counts["finished"] == 1
    world.run(50.0, lambda at: None)
    assert world.counts["sessions_ended"] == 0  # its plan is over, but that call is not
    world.go_on(background)
    world.run(60.0, lambda at: None)
    assert world.counts["sessions_ended"] == 1


def test_at_the_limit_the_kernel_kills_what_holds_most() -> None:
    hog, small = profile(call(1, 2, 500)), profile(call(1, 9, 50), agent_mb=200)
    world = world_of(600, hog, small)
    world.run(5.0, lambda at: None)
    assert (world.counts["oom"], world.counts["sessions_lost"]) == (1, 0)
    assert not world.lanes[0].calls and world.lanes[1].calls
    # Without the daemon's marks the largest is an agent; with them it is a call.
    for strategy, lost in (("none", 1), ("ours", 0)):
        world = world_of(400, profile(agent_mb=250), profile(call(1, 3, 200)), strategy=strategy)
        world.run(5.0, lambda at: None)
        assert (world.counts["sessions_lost"], world.counts["oom"]) == (lost, 1 - lost)


def test_a_static_split_kills_within_the_session() -> None:
    world = world_of(600, profile(call(1, 2, 250)), profile(), strategy="static")
    world.run(5.0, lambda at: None)
    assert world.counts["oom"] == 1 and world.usage < 600 * MB


def test_zram_takes_part_of_what_is_reclaimed_and_gives_it_back() -> None:
    kernel = KernelModel(zram_ratio=2.0, cold_share=0.8)
    world = world_of(1000, profile(call(5, 6, 10)), kernel=kernel)
    lane = world.lanes[0]
    world.run(2.0, lambda at: None)
    assert world.reclaim_agent(lane, 1000.0 * MB) == pytest.approx(95 * MB)
    assert world.usage == pytest.approx((5 + 95 / 2) * MB)
    world.run(5.0, lambda at: None)
    # It wakes up for its call: a fifth is touched, and 15 MB take 30 ms.
    assert lane.agent_resident == pytest.approx(20 * MB)
    world.run(7.0, lambda at: None)
    world.settle()
    assert lane.done_s == pytest.approx(7.0 - 0.03, abs=1e-6)
    world.run(50.0, lambda at: None)
    assert world.usage == pytest.approx(0.0, abs=1.0) == world.swapped


@pytest.mark.parametrize("ratio", [None, 2.0])
def test_a_throttled_call_is_slow_without_swap_only(ratio: float | None) -> None:
    kernel = KernelModel(zram_ratio=ratio)
    world = world_of(1000, profile(call(0, 2, 200)), kernel=kernel)
    world.run(1.0, lambda at: None)
    (grower,) = world.calls
    grower.throttled_bytes = 100.0 * MB
    world.set_pace(grower)
    world.run(2.0, lambda at: None)
    if ratio is None:
        assert world.usage == pytest.approx((200 + 1.1) * MB)
    else:
        assert world.usage == pytest.approx((200 + 95 / 2) * MB)


def test_the_guard_freezes_thaws_and_kills(decides: Callable[[Decider], None]) -> None:
    seen: list[Snapshot] = []

    def decide(now: Snapshot) -> list[Decision]:
        if not now.calls:
            return []
        seen.append(now)
        at_s, view = now.now_usec / 1e6, now.calls[0]
        if view.frozen_for_usec is None and 2.0 <= at_s < 4.0:
            return [Decision(Action.FREEZE, view.id, "")]
        if view.frozen_for_usec is not None and at_s >= 5.0:
            return [Decision(Action.THAW, view.id, "")]
        return [Decision(Action.KILL, view.id, "")] if at_s >= 7.0 else []

    decides(decide)
    setup = Setup(1 << 30, 1, sampling=Sampling(signals=False))
    result = simulate_once(Policy(), [SimulatedSession(profile(call(1, 9, 800)))], setup)
    assert (result.calls_killed, result.sessions_hit, result.calls_survived) == (1, 1, 0.0)
    assert result.actions == {"freeze": 1, "thaw": 1, "kill": 1}
    frozen = [s for s in seen if s.calls[0].frozen_for_usec is not None]
    assert {s.calls[0].memory_bytes for s in frozen} == {frozen[0].calls[0].memory_bytes}
    assert result.paused_share > 0.2
    grows = [s.calls[0].growth_bytes_per_s for s in seen if 1.3e6 < s.now_usec < 1.9e6]
    assert grows and all(g == pytest.approx(100 * MB, rel=0.01) for g in grows)


def test_the_guard_remembers_peaks_as_the_daemon_does(
    decides: Callable[[Decider], None],
) -> None:
    """Peaks of killed calls count, too, and none of calls that stayed small."""
    seen: list[tuple[int, ...]] = []

    def decide(now: Snapshot) -> list[Decision]:
        seen.append(now.peaks_bytes)
        return [Decision(Action.KILL, c.id, "") for c in now.calls if now.now_usec >= 7_000_000]

    decides(decide)
    small, large, killed = call(1, 2, 5), call(3, 4, 300, index=1), call(5, 9, 400, index=2)
    simulate_once(Policy(), [SimulatedSession(profile(small, large, killed))], Setup(1 << 30, 1))
    before, then, last = dict.fromkeys(seen)
    assert before == () and then == (300 * MB,)
    assert last[0] == pytest.approx(200 * MB, rel=0.1) and last[1:] == (300 * MB,)


def test_denied_growth_fails_the_call_and_not_the_session(
    decides: Callable[[Decider], None],
) -> None:
    decides(lambda now: [Decision(Action.DENY, c.id, "") for c in now.calls])
    result = simulate_once(
        Policy(), [SimulatedSession(profile(call(1, 9, 800)))], Setup(1 << 30, 1)
    )
    assert (result.calls_denied, result.calls_killed, result.calls_survived) == (1, 0, 1.0)
    assert result.sessions_survived == 1.0 and result.seconds < 10.0


def test_the_guard_looks_more_often_near_the_mark(decides: Callable[[Decider], None]) -> None:
    times: list[float] = []

    def decide(now: Snapshot) -> list[Decision]:
        times.append(now.now_usec / 1e6)
        return []

    decides(decide)
    policy = Policy.model_validate({**FREEZES, "headroom": {"prior": "64M"}})
    world = world_of(1000, profile(call(1, 9, 700), duration_s=20.0), strategy="ours")
    SimulatedGuard(world, policy, Sampling(signals=False), False)
    world.run(9.0, lambda at: None)
    far = [b - a for a, b in itertools.pairwise(times) if a < 2]
    near = [b - a for a, b in itertools.pairwise(times) if a > 8.5]
    assert min(far) > 0.1 and max(near) < 0.06


def test_the_mark_is_told_at_once(decides: Callable[[Decider], None]) -> None:
    marks: list[Snapshot] = []

    def decide(now: Snapshot) -> list[Decision]:
        if now.usage_bytes >= 0.8 * now.limit_bytes and not marks:
            marks.append(now)
        return []

    decides(decide)
    policy = Policy.model_validate(FREEZES)
    simulate_once(policy, [SimulatedSession(profile(call(1, 3, 850)))], Setup(1000 * MB, 1))
    assert marks[0].usage_bytes == pytest.approx(800 * MB, abs=10)


FREEZES = {
    "rulesets": [
        {
            "name": "freeze",
            "when": [{"detector": "pool_free", "below": "20%", "until": "25%"}],
            "do": {"action": "freeze"},
        }
    ]
}


def busy(peak_mb: float) -> Profile:
    return profile(
        *(call(t, t + 4, 20, peak_mb, 30, index=i) for i, t in enumerate((2.0, 9.0, 17.0))),
        duration_s=25.0,
    )


def test_a_simulation_is_repeatable_and_keeps_its_number_of_sessions() -> None:
    profiles = [busy(300), busy(150), busy(80)]
    setup = Setup(2000 * MB, 12, seed=3, duration_s=100.0, ramp_s=5.0)
    policy = Policy.model_validate(FREEZES)
    first, again = (simulate(policy, profiles, setup) for _ in range(2))
    assert replace(first, took_s=0.0) == replace(again, took_s=0.0)
    assert replace(simulate(policy, profiles, replace(setup, seed=4)), took_s=0.0) != again
    assert first.sessions_begun > 30 and first.calls_finished > 60
    assert 0.6 < first.use_mean < 1.0
    assert first.important.sessions == 1 and first.everyone.sessions == 12


def test_reserving_peaks_runs_as_many_as_fit_and_kills_nobody() -> None:
    profiles = [busy(300)]
    assert reserved(2000 * MB, profiles) == 5
    setup = Setup(2000 * MB, 12, strategy="reserve", duration_s=100.0, ramp_s=0.0)
    result = simulate(Policy(), profiles, setup)
    assert result.calls_killed == result.calls_oom == 0
    assert result.use_mean < 0.5
    assert "reserve" in table([result], profiles)


def write_recording(path: Path) -> None:
    samples = [
        {
            "t": float(t),
            "mem_mb": 100.0 + (80 if t in (4, 5) else 0),
            "cpu_pct": 10.0,
            "cpu_cum_pct": 10.0,
        }
        for t in range(12)
    ]
    header = {
        "schema": "agent-os-trace/1",
        "task": "made",
        "model": "m",
        "duration_s": 11.0,
        "n_samples": 12,
        "n_tool_calls": 1,
        "peak_mb": 180.0,
        "mean_mb": 113.0,
        "sample_period_s": 1.0,
        "units": {},
    }
    one = {"tool_start": 3.2, "tool_end": 5.8, "id": "1", "tool": "Bash", "command": None}
    with gzip.open(path, "wt") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in (header, *samples, one)))


def run_cli(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_simulate_arguments(parser)
    return cli.run_simulate(parser.parse_args(arguments))


def test_the_command_prints_a_table_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recording(tmp_path / "made.jsonl.gz")
    picture = tmp_path / "sweep.png"
    options = ["--trace", str(tmp_path), "--pool", "1G", "--sessions", "6", "--duration", "30s"]
    assert run_cli(*options, "--strategy", "ours,none", "--sweep", "--out", str(picture)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("none") for line in lines) == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run_cli(*options, "--json", "--zram", "2", "--rise", "1G") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["sessions"], result["calls_survived"]) == (6, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--pool", "no"],
        ["--sessions", "0"],
        ["--strategy", "mine"],
        ["--zram", "0.5"],
        ["--cold", "2"],
    ],
)
def test_wrong_arguments_are_refused(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        run_cli("--trace", str(tmp_path), "--pool", "1G", "--sessions", "6", *wrong)
    assert refused.value.code == 2


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AgentcgError, match="no recordings"):
        run_cli("--trace", str(tmp_path), "--pool", "1G", "--sessions", "6")
