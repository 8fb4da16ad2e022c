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
        scenario.task(waiter, cpu=cpus, cpus=1, since_s=1.5)
    expected = {n: 100 * weight / sum(weights) for n, weight in zip(names, weights, strict=True)}
    assert worst(scenario.run(), expected) < POINTS


@dataclass(frozen=True)
class Demand:
    """A cgroup of a flat tree: its weight, the CPUs that its tasks may run on, how many it has."""

    weight: int
    mask: frozenset[int]
    tasks: int


def fair_parts(demands: list[Demand], cpus: int) -> list[float]:
    """The parts of the machine in CPUs, so that none could have more without another having less
    that has no more for its weight: all rise together, and those stop first whose CPUs are full."""
    parts = [0.0] * len(demands)
    rising = set(range(len(demands)))
    sets = [set(s) for n in range(1, cpus + 1) for s in itertools.combinations(range(cpus), n)]
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


def inside(demands: list[Demand], where: set[int]) -> set[int]:
    """Tell which may run nowhere else."""
    return {i for i, demand in enumerate(demands) if demand.mask <= where}


@pytest.mark.parametrize("cpus", [2, 4, 6])
@pytest.mark.parametrize("seed", range(8))
def test_any_affinity_is_shared_by_weight(seed: int, cpus: int) -> None:
    """Cgroups that may run on one CPU or on all of them."""
    dice = random.Random(200 + seed)
    demands = []
    for i in range(dice.randint(3, 8)):
        mask = {dice.randrange(cpus)} if i and dice.random() < 0.6 else set(range(cpus))
        weight = dice.choice([50, 100, 100, 200, 400])
        demands.append(Demand(weight, frozenset(mask), len(mask) + dice.randint(0, 2)))
    check_affinity(demands, cpus)


def check_affinity(demands: list[Demand], cpus: int) -> None:
    """Simulate it and compare with what is fair."""
    scenario = Scenario(cpus)
    names = [scenario.cgroup(weight=demand.weight) for demand in demands]
    for name, demand in zip(names, demands, strict=True):
        for _ in range(demand.tasks):
            scenario.task(name, cpu=min(demand.mask), cpus=len(demand.mask))
    parts = fair_parts(demands, cpus)
    expected = {n: 100 * part / sum(parts) for n, part in zip(names, parts, strict=True)}
    result = scenario.run()
    found = [round(share, 1) for share in result.shares(names)]
    due = [round(share, 1) for share in expected.values()]
    assert worst(result, expected) < POINTS, f"{demands}: {found}, due {due}"


@pytest.mark.parametrize("cpus", [2, 8])
@pytest.mark.parametrize("seed", range(6))
def test_any_tree_on_one_cpu(seed: int, cpus: int) -> None:
    """All tasks are bound to the same CPU: the whole tree shares that one by weight."""
    dice = random.Random(300 + seed)
    scenario = Scenario(cpus)
    leaves, tree = grow(scenario, dice, dice.randint(1, 3), 3)
    for leaf in leaves:
        for _ in range(dice.randint(1, 3)):
            scenario.task(leaf, cpu=1, cpus=1)
    assert worst(scenario.run(), due(tree, set(leaves))) < POINTS


def test_a_dispatch_costs_no_more_for_what_is_bound_elsewhere() -> None:
    """A thousand calls bound to one CPU are nothing to the others."""
    costs = []
    for count in (10, 1000):
        scenario = Scenario(4)
        free = [scenario.cgroup() for _ in range(2)]
        for name in free:
            scenario.hogs(name, 4)
        for _ in range(count):
            scenario.task(scenario.cgroup(), cpu=3, cpus=1)
        costs.append(scenario.run(1))
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
        scenario.task(scenario.cgroup(inner), cpu, 1)
    scenario.task(own)
    free = scenario.cgroup(inner)
    scenario.task(free)
    used = scenario.run().used_ns
    print(used)
    assert min(used[own], used[free]) > 5e9 * cpus / (2 * (cpus + 2))
