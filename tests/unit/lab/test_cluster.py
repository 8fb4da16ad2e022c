"""Many nodes on paper: what a second of a cluster does, with agents that are easy to follow."""

from __future__ import annotations

import numpy as np
import pytest

from agentcgroup_lab.cluster.placing import ByHeadroom, make
from agentcgroup_lab.cluster.run import Cluster, Outcome, simulate
from agentcgroup_lab.cluster.workload import Kinds, kinds_of
from agentcgroup_lab.simulate.plans import CallProfile, Profile, Segment
from agentcgroup_lab.trace.plan import AgentStep

MB = 1_000_000


def profile(idle: int, call: int, seconds: float = 20.0) -> Profile:
    """An agent that holds `idle`, and in its middle calls what takes `call` for 4 s."""
    start = seconds / 2
    segments = (Segment(1.0, 0.0, float(call), 1.0), Segment(3.0, float(call), 0.0, 1.0))
    one = CallProfile("tool", start, start + 4, 4.0, False, float(call), segments)
    return Profile("x", seconds, (AgentStep(0.0, idle, 1),), (one,), idle + call, float(idle))


KINDS = kinds_of([profile(100 * MB, 1000 * MB)])


def run(placing: str, daemon: bool, **changes: float) -> Outcome:
    values = {"nodes": 2, "node_bytes": 2300.0 * MB, "sessions": 40, "arrive_s": 30, **changes}
    return simulate(KINDS, Cluster(**values), placing, daemon)  # type: ignore[arg-type]


def test_a_recording_becomes_what_it_holds_in_each_second() -> None:
    assert KINDS.lengths.tolist() == [20]
    held = (KINDS.held[0] / MB).tolist()
    assert held == [100.0] * 10 + [1100.0] * 4 + [100.0] * 6
    assert KINDS.begins[0].tolist() == [-1] * 10 + [10] * 4 + [-1] * 6


def test_requested_peaks_kill_nobody_and_leave_nodes_empty() -> None:
    outcome = run("requests", False)
    assert outcome.calls_killed == 0 and outcome.slower == 1.0
    assert outcome.agents_on_node_most == 2  # of 2,300 MB, 1,100 each
    assert outcome.waited_mean_s > 0 and outcome.makespan_s > outcome.ideal_s


def test_packing_by_means_kills_calls_where_nobody_waits() -> None:
    without, with_daemon = run("packing", False), run("packing", True)
    assert without.calls_killed > 0 and with_daemon.calls_killed == 0
    assert with_daemon.slower > 1.0
    assert with_daemon.makespan_s < run("requests", False).makespan_s


def test_headroom_places_more_than_peaks_and_kills_nobody() -> None:
    requests, headroom = run("requests", False), run("headroom", True)
    assert headroom.calls_killed == 0
    assert headroom.agents_on_node_most > requests.agents_on_node_most
    assert headroom.makespan_s < requests.makespan_s


def test_a_call_that_can_never_fit_is_ended_once_nobody_else_could_go_on() -> None:
    kinds = kinds_of([profile(500 * MB, 1000 * MB)])
    cluster = Cluster(nodes=1, node_bytes=2600.0 * MB, sessions=3, arrive_s=1)
    outcome = simulate(kinds, cluster, "packing", True)
    assert outcome.makespan_s < 200


def test_the_same_seed_gives_the_same_outcome() -> None:
    assert run("headroom", True, seed=7) == run("headroom", True, seed=7)
    assert run("headroom", True, seed=7) != run("headroom", True, seed=8)


def test_a_scheduler_learns_the_peaks_of_calls() -> None:
    placing = make("headroom", KINDS, 1, 6_000.0 * MB)
    assert isinstance(placing, ByHeadroom)
    used, sessions = np.array([1000.0 * MB]), np.array([30])
    before = int(placing.room(0, used, sessions)[0])
    for _ in range(100):
        placing.ended(0, 3000.0 * MB)
    after = int(placing.room(5, used, sessions)[0])
    # The bucket of 4 GiB, instead of the 1 GiB that is taken without knowing.
    assert before - after in (23, 24)


def test_an_unknown_way_of_placing_is_named() -> None:
    with pytest.raises(ValueError, match="'luck'"):
        make("luck", KINDS, 1, 1.0)


def test_rows_of_different_lengths_stand_side_by_side() -> None:
    kinds: Kinds = kinds_of([profile(1, 2), profile(1, 2, 30.0)])
    assert kinds.held.shape == (2, 30) and kinds.held[0, 20:].sum() == 0


def test_an_agent_that_ends_with_a_call_that_never_fits_ends_without_it() -> None:
    last = CallProfile("t", 18.0, 20.0, 2.0, False, 9e9, (Segment(2.0, 9e9, 0.0, 1.0),))
    one = Profile("x", 20.0, (AgentStep(0.0, MB, 1),), (last,), int(9e9), float(MB))
    for daemon in (True, False):
        cluster = Cluster(nodes=1, node_bytes=1000.0 * MB, sessions=2, arrive_s=1)
        outcome = simulate(kinds_of([one]), cluster, "packing", daemon)
        assert outcome.calls_killed == 6 and outcome.calls_given_up == 2


def test_calls_that_overlap_are_given_up_one_after_the_other() -> None:
    """A long call that goes on below a larger one is not begun again from before that."""
    long = CallProfile("long", 2.0, 18.0, 16.0, True, 3e9, (Segment(16.0, 3e9, 0.0, 1.0),))
    short = CallProfile("short", 6.0, 9.0, 3.0, False, 9e9, (Segment(3.0, 9e9, 0.0, 1.0),))
    agent = (AgentStep(0.0, MB, 1), AgentStep(12.0, 2 * MB, 1))
    one = Profile("x", 400.0, agent, (long, short), int(12e9), float(MB))
    for daemon in (True, False):
        cluster = Cluster(nodes=1, node_bytes=1000.0 * MB, sessions=5, arrive_s=1)
        outcome = simulate(kinds_of([one]), cluster, "packing", daemon)
        # Before the larger one, that one, and after it.
        assert (outcome.calls_given_up, outcome.agents_lost) == (15, 0)
        assert outcome.makespan_s < 2000


@pytest.mark.parametrize("placing", ["requests", "packing", "headroom"])
def test_an_agent_that_no_node_has_room_for_is_an_error(placing: str) -> None:
    kinds = kinds_of([profile(500 * MB, 1000 * MB)])
    cluster = Cluster(nodes=2, node_bytes=200.0 * MB, sessions=3, arrive_s=1)
    with pytest.raises(RuntimeError, match="no node has room"):
        simulate(kinds, cluster, placing, True)


def test_memory_that_agents_hold_while_they_wait_may_fill_a_node() -> None:
    """Agents that no call can be taken from are ended, the youngest first, until the rest fits."""
    steps = (AgentStep(0.0, 10 * MB, 1), AgentStep(10.0, 400 * MB, 1))
    idle = Profile("x", 20.0, steps, (), 400 * MB, 10.0 * MB)
    cluster = Cluster(nodes=1, node_bytes=1000.0 * MB, sessions=8, arrive_s=1)
    outcome = simulate(kinds_of([idle]), cluster, "packing", True)
    assert outcome.calls_killed == 0 and outcome.makespan_s < 100
    assert outcome.agents_lost + 2 <= 8


def test_agents_that_come_all_at_once_are_not_placed_by_a_guess() -> None:
    """A node that has none knows nothing of them: it would take as many as hold the least, and be
    full of what they hold while they wait."""
    kinds = kinds_of([profile(400 * MB, 1000 * MB, 400.0)])
    cluster = Cluster(nodes=2, node_bytes=16_000.0 * MB, sessions=300, arrive_s=1)
    outcome = simulate(kinds, cluster, "headroom", True)
    assert (outcome.calls_killed, outcome.agents_lost) == (0, 0)
    assert outcome.slower < 1.1
