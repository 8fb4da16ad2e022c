"""The scheduler's order on simulated CPUs: shares by weight whatever the tree and the tasks are,
and what a dispatch costs."""

from __future__ import annotations

import itertools
import math
import os
import random
from dataclasses import dataclass

import pytest

from tests.native.order import Result, Scenario, speed

POINTS = 2.0
"""Error of a share that is allowed, in points of percent, over 5 s."""


def grow(
    scenario: Scenario, dice: random.Random, depth: int, most: int
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """A random tree. Returns the leaves, and parent and weight of each cgroup."""
    tree: dict[int, tuple[int, int]] = {}
    level, leaves = [0], []
    for at in range(depth):
        below = []
        for parent in level:
            for _ in range(dice.randint(2 if at == 0 else 0, most)):
                weight = dice.choice([25, 50, 100, 100, 200, 400])
                child = scenario.cgroup(parent, weight)
                tree[child] = parent, weight
                below.append(child)
        level = below
    parents = {parent for parent, _ in tree.values()}
    leaves = [cgroup for cgroup in tree if cgroup not in parents]
    return leaves, tree


def due(tree: dict[int, tuple[int, int]], active: set[int]) -> dict[int, float]:
    """The share of each leaf in percent, while those in `active` always have something to run."""
    there = set(active)
    for leaf in active:
        at = leaf
        while at:
            there.add(at)
            at = tree[at][0]
    found = {}
    for leaf in active:
        share, at = 100.0, leaf
        while at:
            parent, weight = tree[at]
            share *= weight / sum(w for c, (p, w) in tree.items() if p == parent and c in there)
            at = parent
        found[leaf] = share
    return found


def worst(result: Result, expected: dict[int, float]) -> float:
    """The greatest error of a share, in points."""
    leaves = list(expected)
    found = result.shares(leaves)
    return max(abs(f - expected[leaf]) for f, leaf in zip(found, leaves, strict=True))


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("seed", range(8))
def test_any_tree_is_shared_by_weight(seed: int, cpus: int) -> None:
    """Random trees and weights; each leaf has tasks for all CPUs."""
    dice = random.Random(seed)
    scenario = Scenario(cpus)
    leaves, tree = grow(scenario, dice, dice.randint(1, 4), 3)
    for leaf in leaves:
        scenario.hogs(leaf, cpus + dice.randint(0, 3))
    assert worst(scenario.run(), due(tree, set(leaves))) < POINTS


@pytest.mark.parametrize("cpus", [1, 4, 16])
@pytest.mark.parametrize("seed", range(6))
def test_those_that_come_and_go(seed: int, cpus: int) -> None:
    """Each leaf is there for a part of the time: it gets its share of that part."""
    dice = random.Random(100 + seed)
    scenario = Scenario(cpus)
    leaves, tree = grow(scenario, dice, 2, 4)
    spans = {leaf: (dice.uniform(0, 3), dice.uniform(3, 6)) for leaf in leaves[1:]}
    spans[leaves[0]] = 0.0, 10.0
    for leaf, (since, until) in spans.items():
        for _ in range(cpus + 2):
            scenario.task(leaf, since_s=since, until_s=until)
    total = dict.fromkeys(leaves, 0.0)
    edges = sorted({1.0, 6.0} | {t for span in spans.values() for t in span if 1 < t < 6})
    for begin, end in itertools.pairwise(edges):
        active = {leaf for leaf, (a, b) in spans.items() if a <= begin and b >= end}
        for leaf, share in due(tree, active).items():
            total[leaf] += share * (end - begin) / 5
    assert worst(scenario.run(), total) < POINTS


@pytest.mark.parametrize("sleep_usec", [100, 3000])
def test_one_that_sleeps_often_is_not_paid_for_it(sleep_usec: int) -> None:
    """A cgroup that wants less than its share gets no more than that, and the rest is shared."""
    scenario = Scenario(2)
    names = [scenario.cgroup(weight=weight) for weight in (100, 100, 300)]
    scenario.task(names[0], run_usec=1000, sleep_usec=sleep_usec)
    for name in names[1:]:
        scenario.hogs(name, 3)
    shares = scenario.run().shares(names)
    assert shares[0] <= 20 + POINTS
    assert abs(shares[2] / shares[1] - 3) < 0.2


def test_a_dispatch_costs_little_in_a_large_tree() -> None:
    """1,000 sessions of 10 calls, all with something to run."""
    scenario = Scenario(2)
    for _ in range(1000):
        session = scenario.cgroup()
        for _ in range(10):
            scenario.hogs(scenario.cgroup(session), 1)
    result = scenario.run(1)
    assert result.steps / result.dispatches < 200
    assert result.locks / result.dispatches < 24


def test_a_switch_takes_few_locks_in_a_large_tree() -> None:
    """A lock of the session's siblings, two of the call's; and none is waited for in long loops."""
    found = speed(1000, 10, threads=1)
    assert found.locks < 6
    assert found.steps < 250


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_second_cpu_is_a_gain() -> None:
    """Two threads switch more often together than one does alone. With one lock for the whole order
    they do so less often. On a machine with other work to do the best of some attempts counts."""
    gains = (speed(1000, 10, 2).per_second / speed(1000, 10, 1).per_second for _ in range(8))
    assert any(gain > 1 for gain in gains)


# --- Tasks that may not run everywhere ------------------------------------------------------------


@pytest.mark.parametrize("cpus", [4, 16, 64])
@pytest.mark.parametrize("weights", [(100, 300), (100, 100), (25, 100, 400)])
def test_one_that_waits_for_a_cpu_that_serves_none(cpus: int, weights: tuple[int, ...]) -> None:
    """Anyone can have that with `taskset`, where the host keeps a CPU busy: the others share by
    weight all the same."""
    scenario = Scenario(cpus + 1, away=(cpus,))
    names = [scenario.cgroup(weight=weight) for weight in weights]
    for name in names:
        scenario.hogs(name, cpus + 2)
    for _ in range(3):
        waiter = scenario.cgroup(weight=1000)
        scenario.task(waiter, on=[cpus], since_s=1.5)
    expected = {n: 100 * weight / sum(weights) for n, weight in zip(names, weights, strict=True)}
    assert worst(scenario.run(), expected) < POINTS


@dataclass(frozen=True)
class Demand:
    """A cgroup of a flat tree: its weight, the CPUs that its tasks may run on, how many it has."""

    weight: int
    mask: frozenset[int]
    tasks: int


def fair_parts(demands: list[Demand]) -> list[float]:
    """The parts of the machine in CPUs, so that none could have more without another having less
    that has no more for its weight: all rise together, and those stop first whose CPUs are full."""
    parts = [0.0] * len(demands)
    rising = set(range(len(demands)))
    sets = {frozenset[int]()}
    for mask in {demand.mask for demand in demands}:
        sets |= {where | mask for where in sets}
    while rising:
        step = math.inf
        full: set[int] = set()
        bounds = [(inside(demands, where), float(len(where))) for where in sets]
        bounds += [({i}, float(min(d.tasks, len(d.mask)))) for i, d in enumerate(demands)]
        for who, most in bounds:
            if not who & rising:
                continue
            room = most - sum(parts[i] for i in who)
            time = max(0.0, room) / sum(demands[i].weight for i in who & rising)
            if time < step - 1e-9:
                step, full = time, set()
            if time < step + 1e-9:
                full |= who & rising
        for i in rising:
            parts[i] += step * demands[i].weight
        rising -= full
    return parts


def inside(demands: list[Demand], where: frozenset[int]) -> set[int]:
    """Tell which may run nowhere else."""
    return {i for i, demand in enumerate(demands) if demand.mask <= where}


def draw_masks(dice: random.Random, cpus: int, count: int) -> list[frozenset[int]]:
    """Draw CPUs for as many: all, a half, or one of a few sets of any size, which overlap."""
    every = range(cpus)
    sizes = (1, 2, cpus // 2, cpus - 1, dice.randint(1, cpus))
    kinds = [frozenset(every), frozenset(every[: cpus // 2]), frozenset(every[cpus // 2 :])]
    if dice.random() < 0.7:
        kinds = [frozenset(dice.sample(every, max(1, dice.choice(sizes)))) for _ in range(4)]
        kinds.append(frozenset(every))
    return [dice.choice(kinds) for _ in range(count)]


@pytest.mark.parametrize("cpus", [2, 4, 6, 16, 64])
@pytest.mark.parametrize("seed", range(16))
def test_any_affinity_is_shared_by_weight(seed: int, cpus: int) -> None:
    """Cgroups that may run on one CPU, on some of them, or on all."""
    dice = random.Random(200 + seed)
    demands = []
    for mask in draw_masks(dice, cpus, dice.randint(3, 8)):
        weight = dice.choice([50, 100, 100, 200, 400])
        demands.append(Demand(weight, mask, len(mask) + dice.randint(0, 2)))
    scenario = Scenario(cpus)
    names = [scenario.cgroup(weight=demand.weight) for demand in demands]
    for name, demand in zip(names, demands, strict=True):
        for _ in range(demand.tasks):
            scenario.task(name, on=demand.mask)
    parts = fair_parts(demands)
    expected = {n: 100 * part / sum(parts) for n, part in zip(names, parts, strict=True)}
    result = scenario.run()
    found = [round(share, 1) for share in result.shares(names)]
    due = [round(share, 1) for share in expected.values()]
    assert worst(result, expected) < 0.5, f"{demands}: {found}, due {due}"


@dataclass(frozen=True)
class Session:
    """A cgroup with calls below it that all may run on the same CPUs, as with a cpuset."""

    demand: Demand
    calls: dict[int, int]
    """Weights."""
    since_s: float
    until_s: float


@pytest.mark.parametrize("arrive", [False, True])
@pytest.mark.parametrize("cpus", [4, 16, 64])
@pytest.mark.parametrize("seed", range(12))
def test_sessions_that_are_bound(seed: int, cpus: int, arrive: bool) -> None:
    """Each shares what it gets among its calls by their weights; they are all there all the time,
    or come and go."""
    dice = random.Random(400 + seed)
    scenario = Scenario(cpus)
    sessions: list[Session] = []
    for mask in draw_masks(dice, cpus, dice.randint(2, 6)):
        weight = dice.choice([50, 100, 100, 200, 400])
        above = scenario.cgroup(weight=weight)
        weights = [dice.choice([50, 100, 300]) for _ in range(dice.randint(1, 4))]
        calls = {scenario.cgroup(above, w): w for w in weights}
        span = (0.0, 10.0)
        if arrive and sessions:
            span = dice.uniform(0, 3), dice.uniform(3, 6)
        for call in calls:
            for _ in range(len(mask) + dice.randint(0, 2)):
                scenario.task(call, mask, *span)
        sessions.append(Session(Demand(weight, mask, cpus), calls, *span))
    edges = {1.0, 6.0} | {t for s in sessions for t in (s.since_s, s.until_s) if 1 < t < 6}
    total = {call: 0.0 for session in sessions for call in session.calls}
    for begin, end in itertools.pairwise(sorted(edges)):
        there = [s for s in sessions if s.since_s <= begin and s.until_s >= end]
        for part, session in zip(fair_parts([s.demand for s in there]), there, strict=True):
            all_of_it = sum(session.calls.values())
            for call, weight in session.calls.items():
                total[call] += part * weight / all_of_it * (end - begin)
    used = sum(total.values())
    expected = {call: 100 * time / used for call, time in total.items()}
    assert worst(scenario.run(), expected) < (POINTS if arrive else 1)


SETS = 64
"""Lanes for sets of several CPUs; of bpf/sched_lane.h."""


def test_more_sets_of_cpus_than_there_are_lanes() -> None:
    """Tasks of the others wait for one of their CPUs: nobody gets nothing, no CPU is idle for long,
    and those with a lane have their share."""
    cpus, count = 16, 3 * SETS
    dice = random.Random(1)
    masks = {frozenset(dice.sample(range(cpus), 4)) for _ in range(2 * count)}
    scenario = Scenario(cpus)
    names = [scenario.cgroup() for _ in range(count)]
    for name, mask in zip(names, sorted(masks, key=sorted), strict=False):
        scenario.task(name, on=mask)
    used = scenario.run().used_ns
    assert sum(used.values()) > 0.99 * 5e9 * cpus
    mean = 5e9 * cpus / count
    assert min(used[name] for name in names) > mean / 2
    assert max(used[name] for name in names) < mean * 2


def test_a_lane_is_given_to_another_set() -> None:
    """Once its tasks have been away for a second: as many sets come after the first as there are
    lanes, and are shared as exactly."""
    cpus = 16
    dice = random.Random(2)
    masks = sorted({frozenset(dice.sample(range(cpus), 5)) for _ in range(3 * SETS)}, key=sorted)
    scenario = Scenario(cpus)
    for mask in masks[:SETS]:
        scenario.task(scenario.cgroup(), mask, 0, 0.5)
    weights = [100, 300, 100, 300]
    pairs = [mask for mask in masks[SETS:][:2] for _ in range(2)]
    names = [scenario.cgroup(weight=weight) for weight in weights]
    demands = []
    for name, weight, mask in zip(names, weights, pairs, strict=True):
        demands.append(Demand(weight, mask, 6))
        for _ in range(6):
            scenario.task(name, mask, since_s=2)
    parts = fair_parts(demands)
    expected = {n: 100 * part / sum(parts) for n, part in zip(names, parts, strict=True)}
    assert worst(scenario.run(warm_up_s=3), expected) < 0.5


@pytest.mark.parametrize("cpus", [2, 8])
@pytest.mark.parametrize("seed", range(6))
def test_any_tree_on_one_cpu(seed: int, cpus: int) -> None:
    """All tasks are bound to the same CPU: the whole tree shares that one by weight."""
    dice = random.Random(300 + seed)
    scenario = Scenario(cpus)
    leaves, tree = grow(scenario, dice, dice.randint(1, 3), 3)
    for leaf in leaves:
        for _ in range(dice.randint(1, 3)):
            scenario.task(leaf, on=[1])
    assert worst(scenario.run(), due(tree, set(leaves))) < POINTS


@pytest.mark.parametrize("masks", [[[3]], [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1, 2], [1, 2, 3]]])
def test_a_dispatch_costs_no_more_for_what_is_bound(masks: list[list[int]]) -> None:
    """A thousand calls bound to one CPU are nothing to the others; and bound to some, no more to
    those than ten are."""
    costs = []
    for count in (10, 1000):
        scenario = Scenario(4)
        free = [scenario.cgroup() for _ in range(2)]
        for name in free:
            scenario.hogs(name, 4)
        for i in range(count):
            scenario.task(scenario.cgroup(), on=masks[i % len(masks)])
        costs.append(scenario.run(1))
    assert costs[1].time_ns / costs[1].dispatches < 50_000
    few, many = (cost.steps / cost.dispatches for cost in costs)
    assert many < 2 * few and costs[1].steps_most < 2000


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("above", [0, 1])
def test_tasks_above_those_that_are_bound_have_their_turn(cpus: int, above: int) -> None:
    """A cgroup's own task competes with its children, though these wait in lanes alone."""
    scenario = Scenario(cpus)
    inner = scenario.cgroup()
    own = inner if above else 0
    for cpu in range(cpus):
        scenario.task(scenario.cgroup(inner), on=[cpu])
    scenario.task(own)
    free = scenario.cgroup(inner)
    scenario.task(free)
    used = scenario.run().used_ns
    print(used)
    assert min(used[own], used[free]) > 5e9 * cpus / (2 * (cpus + 2))
