"""The scheduler's order on simulated CPUs: shares by weight whatever the tree and the tasks are,
and what a dispatch costs."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.native.order import Result, Scenario

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
