"""The benchmark `isolation`: its bound is one, its mixes are what they say, its numbers add up."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcgroup_lab.replay.backends import ReplayError, make_backend
from agentcgroup_lab.replay.result import Latency, SessionResult, StrategyResult, Timeline
from agentcgroup_lab.trace import plan
from bench.isolation.benchmark import Journal, arguments, groups, summarize
from bench.isolation.bound import makespan_bound_s, pieces
from bench.isolation.machine import RECORDINGS, Speed
from bench.isolation.mixes import Settings, draw, folders, headers, make_mix
from bench.isolation.oomd import find_oomd, ruleset
from bench.isolation.plot import draw as draw_picture
from bench.isolation.report import cells, stat, table, targets, totals
from bench.isolation.runs import ALONE, Group, Run, makespan_s, pool_use
from bench.report import BenchReport

OPTIONS = plan.Options()
BENCH = Settings(10.0, Speed(2.3e9, 0.001, 120 * 10**9), cpus=16, emulated=False)
SMALL = Settings(24.0, Speed(150e6, 0.05, 1600 * 10**6), cpus=2, emulated=True, sessions_max=7)

# ---- the bound, against every order of small cases ----------------------------------------------

WAITS = range(5)


def make_plan(agent: list[int], calls: list[tuple[int, list[tuple[int, int, int]]]]) -> plan.Plan:
    """Seconds and bytes as small numbers. A call: think time, and (seconds, bytes, cpu) steps."""
    planned: list[plan.PlannedCall] = []
    at_s = 0
    for index, (think_s, steps) in enumerate(calls):
        start_s = at_s + think_s
        at_s = start_s + sum(length_s for length_s, _, _ in steps)
        made = tuple(plan.Step(length_s * 1000, held, cpu) for length_s, held, cpu in steps)
        planned.append(
            plan.PlannedCall(index, str(index), "t", start_s, at_s, think_s, False, made)
        )
    at_s = max(at_s, len(agent))
    levels = tuple(plan.AgentStep(float(i), held, 0) for i, held in enumerate(agent))
    return plan.Plan("p", float(at_s), levels, tuple(planned), OPTIONS)


class Second:
    """What is held at a second's start and end, and burnt in it."""

    def __init__(self) -> None:
        self.before = self.after = self.cpus = 0.0


def run_call(call: plan.PlannedCall, second: int, seconds: dict[int, Second]) -> None:
    """Growth is even over a step, a fall is at its beginning."""
    before = 0.0
    for step in call.steps:
        length_s = step.duration_ms // 1000
        grown = max(0.0, step.memory_bytes - before)
        first = step.memory_bytes - grown
        for i in range(length_s):
            here = seconds[second]
            here.before += first + grown * i / length_s
            here.after += first + grown * (i + 1) / length_s
            here.cpus += step.cpu_pct / 100
            second += 1
        before = step.memory_bytes


def run_session(
    one: plan.Plan, delay: int, wait: tuple[int, ...], seconds: dict[int, Second]
) -> int:
    """Each call begins so much later than it could. Returns when the session ends."""
    now = 0

    def pass_by(length_s: int, level: int) -> int:
        for second in range(now, now + length_s):
            seconds[second].before += level
            seconds[second].after += level
        return now + length_s

    now = pass_by(delay, one.agent[0].memory_bytes)
    call_at = {round(call.start_s): call for call in one.calls}
    for clock in range(round(one.duration_s)):
        level = one.agent_bytes_at(clock)
        if call := call_at.get(clock):
            # Until it begins, the agent waits at this point of its plan.
            now = pass_by(wait[call.index], level)
            run_call(call, now, seconds)
        now = pass_by(1, level)
    return now


def run_order(
    plans: list[plan.Plan],
    delays: list[int],
    waits: tuple[tuple[int, ...], ...],
    pool: int,
    cpus: int,
) -> int | None:
    """When all ends in this order; None where it needs more than the pool or the CPUs."""
    seconds: dict[int, Second] = defaultdict(Second)
    end = max(
        run_session(one, delay, wait, seconds)
        for one, delay, wait in zip(plans, delays, waits, strict=True)
    )
    fits = all(
        max(second.before, second.after) <= pool and second.cpus <= cpus + 1e-9
        for second in seconds.values()
    )
    return end if fits else None


steps = st.lists(
    st.tuples(st.integers(1, 2), st.integers(0, 6), st.sampled_from([0, 50, 100])),
    min_size=1,
    max_size=2,
)
plans = st.builds(
    make_plan,
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), steps), min_size=0, max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(plans, st.integers(0, 2)), min_size=1, max_size=2),
    st.integers(3, 9),
    st.integers(1, 2),
)
def test_no_order_ends_before_the_bound(
    sessions: list[tuple[plan.Plan, int]], pool: int, cpus: int
) -> None:
    chosen, delays = [one for one, _ in sessions], [delay for _, delay in sessions]
    bound_s = makespan_bound_s(chosen, delays, pool, cpus)
    waits = [itertools.product(WAITS, repeat=len(one.calls)) for one in chosen]
    for order in itertools.product(*waits):
        end = run_order(chosen, delays, order, pool, cpus)
        assert end is None or end >= bound_s - 1e-6, (order, end, bound_s)


def test_the_bound_is_met_where_calls_must_take_turns() -> None:
    one = make_plan([1], [(0, [(1, 6, 0), (3, 6, 0)])])
    bound_s = makespan_bound_s([one, one], [0, 0], 10, 2)
    best = min(
        end
        for order in itertools.product([(0,), (1,), (2,), (3,), (4,)], repeat=2)
        if (end := run_order([one, one], [0, 0], order, 10, 2)) is not None
    )
    # It is not a tight bound: of growth only what is above half of the pool takes turns.
    assert 4 < bound_s <= best <= 8
    assert makespan_bound_s([one, one], [0, 0], 100, 2) == 4


def test_pieces_add_up_to_the_plan() -> None:
    one = make_plan([2], [(1, [(2, 4, 50), (1, 1, 100)])])
    found = pieces(one, 3.0, 100)
    assert sum(piece.byte_s for piece in found) == pytest.approx(2 * 3 + 2 * 4 + 2 * 4 / 2 + 1)
    assert sum(piece.cpu_s for piece in found) == pytest.approx(2.0)
    assert all(
        piece.release_s + piece.length_s + piece.tail_s <= 3 + one.duration_s + 1e-9
        for piece in found
    )


# ---- mixes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [BENCH, SMALL])
def test_mixes_are_the_same_each_time_and_reach_twice_their_pool(given: Settings) -> None:
    known = headers([RECORDINGS])
    for number in range(4):
        mix = make_mix(number, known, given)
        again = make_mix(number, known, replace(given, speed=replace(given.speed, spawn_s=0.002)))
        assert mix.names == again.names
        assert mix.feasible(2.0)
        assert mix.pool_bytes(2.0) >= mix.floor_bytes
        assert not mix.feasible(mix.ratio_max + 0.01)
        assert len(mix.plans) <= given.sessions_max
        specs = mix.specs()
        assert [spec.important for spec in specs] == [True] + [False] * (len(specs) - 1)
        assert mix.alone()[0].delay_s == 0.0
        assert mix.bound_s(2.0, 16) >= max(spec.planned_s for spec in specs)
        assert sum(call.steps[0].cpu_pct for one in mix.plans for call in one.calls[:1]) <= 1600


def test_draws_differ_by_number() -> None:
    known = headers([RECORDINGS])
    assert draw(1, known) == draw(1, known)
    assert len({tuple(h.name for h in draw(number, known)) for number in range(8)}) > 4


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    assert folders({"TRACES": str(tmp_path)}) == [tmp_path]
    assert RECORDINGS in folders({})
    with pytest.raises(ReplayError, match="no recordings"):
        headers([tmp_path])


def test_groups_run_the_target_ratio_first_and_leave_out_what_cannot_be() -> None:
    args = arguments(["--ratios", "1.1,2,9", "--repeat", "2", "--mixes", "2"])
    mixes = [make_mix(number, headers([RECORDINGS]), BENCH) for number in range(2)]
    found = list(groups(args, mixes))
    assert [(group.repeat, group.ratio, group.mix) for group in found] == [
        (repeat, ratio, mix) for repeat in (0, 1) for ratio in (2.0, 1.1) for mix in (0, 1)
    ]
    firsts = {group.order[0] for group in found}
    assert len(firsts) > 1
    assert all(sorted(group.order) == sorted((ALONE, *args.strategies)) for group in found)
    with pytest.raises(SystemExit):
        arguments(["--strategies", "magic"])


# ---- numbers ------------------------------------------------------------------------------------


def a_run(strategy: str, seconds: float, mix: int = 0, lost: int = 0, p95: float = 10.0) -> Run:
    return Run(
        mix=mix,
        ratio=2.0,
        repeat=0,
        strategy=strategy,
        pool_bytes=10**9,
        seconds=seconds,
        bound_s=10.0,
        sessions=3,
        sessions_finished=3,
        calls=20,
        calls_finished=20 - lost,
        calls_killed=lost,
        important_finished=True,
        important_s=seconds,
        important_planned_s=9.0,
        important_latency=Latency(9, p95 / 2, p95, p95 * 2, p95 * 3),
        pool_use_mean=0.5,
        pool_use_peak=0.9,
        frozen_s=0.0,
        oom_kills=0,
        leaks=0,
    )


def test_targets_are_judged_by_the_runs_beside_each_other() -> None:
    runs = [a_run(ALONE, 10.0), a_run("ours", 10.4, p95=11.0), a_run("none", 5.0, lost=4)]
    met = {target.name: target for target in targets(runs, emulated=False)}
    assert all(target.met for target in met.values())
    assert met["important session's time over alone at 2x"].value == pytest.approx(1.04)
    assert met["its p95 allocation latency over alone at 2x"].value == pytest.approx(1.1)
    assert len(met) == 8 and len(targets(runs, emulated=True)) == 6
    assert targets(runs[:1], emulated=False) == []
    none = next(row for row in cells(runs) if row["strategy"] == "none")
    assert none["calls_finished"] == 16 and none["makespan"] is None
    assert "16/20" in table(totals(runs))


def test_a_lost_call_misses_survival_and_makespan() -> None:
    runs = [a_run(ALONE, 10.0), a_run("ours", 10.0, lost=1)]
    runs += [a_run(ALONE, 10.0, mix=1), a_run("ours", 10.0, mix=1)]
    missed = [target.name for target in targets(runs, emulated=True) if not target.met]
    assert [name.split(" at ")[0] for name in missed] == [
        "calls that survive",
        *["makespan over the best order's bound"] * 2,
    ]
    assert "1 of 2 mixes" in missed[1]


def test_pool_use_is_weighted_by_time() -> None:
    timeline = Timeline((0.0, 1.0, 4.0), (100, 0, 50), {})
    result = StrategyResult("none", 100, 4.0, (), timeline, ())
    assert pool_use(result) == (0.25, 1.0)
    assert stat([3.0, 1.0, 2.0]) == {"n": 3, "median": 2.0, "min": 1.0, "max": 3.0}
    assert stat([]) is None


def test_what_no_strategy_could_do_is_named() -> None:
    mixes = [make_mix(0, headers([RECORDINGS]), BENCH)]
    report = summarize([a_run(ALONE, 1.0), a_run("ours", 1.0)], mixes, BENCH, (2.0, 9.0))
    assert [(one["mix"], one["ratio"]) for one in report.details["infeasible"]] == [(0, 9.0)]
    assert report.n == 1


def test_makespan_is_from_the_first_ready_agent_to_the_last_end() -> None:
    def session(name: str, began_s: float, ended_s: float) -> SessionResult:
        return SessionResult(name, "r", False, "finished", began_s, ended_s, 5.0, 1, 1, 0, ())

    timeline = Timeline((), (), {})
    both = (session("a", 4.0, 9.0), session("b", 2.5, 11.0))
    result = StrategyResult("none", 100, 11.0, both, timeline, ())
    assert makespan_s(result, {"a": 3.0, "b": 0.0}) == 10.0


def test_the_journal_gives_back_what_was_run(tmp_path: Path) -> None:
    path = tmp_path / "isolation/runs.jsonl"
    journal = Journal(path)
    journal.begin(BENCH)
    journal.add([a_run(ALONE, 10.0), a_run("none", 9.0)])
    again = Journal(path)
    again.read()
    assert (again.settings, again.runs) == (BENCH, journal.runs)
    assert again.has(Group(0, 0, 2.0, 0, ("none",)))
    assert not again.has(Group(0, 0, 2.0, 0, ("none", "ours")))
    more = [a_run(ALONE, 11.0), a_run("none", 12.0), a_run("ours", 12.0)]
    again.add(more)
    assert again.runs == more


def test_a_picture_is_drawn_from_what_is_written() -> None:
    pytest.importorskip("matplotlib")
    runs = [a_run(ALONE, 10.0), a_run("ours", 10.4), a_run("none", 5.0, lost=4)]
    details = {"mixes": [{}], "totals": totals(runs), "kernel": "7.0"}
    report = BenchReport("isolation", "host", 1, targets(runs, emulated=False), details)
    document = json.loads(json.dumps({"where": report.where, **report.details}))
    axes = draw_picture(document).axes
    assert len(axes) == 6
    assert [text.get_text() for text in draw_picture(document).legends[0].get_texts()] == [
        "no control",
        "agentcgroup",
    ]


# ---- oomd ---------------------------------------------------------------------------------------


def test_oomd_is_told_bytes_of_the_pool_and_kills_sessions_only() -> None:
    told = ruleset("a/pool", 1 << 30)["rulesets"]
    assert [action["args"]["cgroup"] for rule in told for action in rule["actions"]] == [
        "a/pool/*",
        "a/pool/*",
    ]
    threshold = told[0]["detectors"][0][1]["args"]["threshold"]
    assert threshold.endswith("K") and int(threshold[:-1]) == int(0.9 * (1 << 20))
    # oomd takes no numbers.
    assert "args" in json.dumps(told) and not any(
        isinstance(value, int)
        for rule in told
        for action in rule["actions"]
        for value in action["args"].values()
    )


def test_an_oomd_that_is_nowhere_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "oomd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("AGENTCG_OOMD", str(program))
    assert find_oomd() == str(program)
    monkeypatch.delenv("AGENTCG_OOMD")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setattr("bench.isolation.oomd.INTO", tmp_path / "none")
    with pytest.raises(ReplayError, match="oomd is not here"):
        find_oomd()
    with pytest.raises(ValueError, match="none, static, high, ours, oomd"):
        make_backend("magic", 1, 1, tmp_path)
