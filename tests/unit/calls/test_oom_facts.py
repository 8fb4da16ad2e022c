"""OOM kills told apart between two commands of a call, the second begun while kills go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.counters import Counters
from agentcgroupd.calls.evidence import _oom_facts
from agentcgroupd.calls.facts import OomFacts
from agentcgroupd.state.ending import Account, Baseline, Counts

LIMIT_BYTES = 40 << 20
MAIN_PID = 970


def facts(at_start: Counts, at_end: Counts, chose_main: bool) -> OomFacts:
    """What is found of a call whose second command began with `at_start` counted."""
    account = Account(began=Baseline(), baseline=Baseline(at_start, at_start))
    call: Any = SimpleNamespace(
        id="c",
        account=account,
        main=SimpleNamespace(pid=MAIN_PID),
        grant=SimpleNamespace(memory_max_bytes=LIMIT_BYTES),
        inner_oom=None,
        session=SimpleNamespace(offered=frozenset()),
        cgroup=SimpleNamespace(read=lambda knob: {"oom_group_kill": at_end.group_kills}),
    )
    counters = Counters(Baseline(at_end, at_end), [])
    log: Any = SimpleNamespace(chose=lambda pid: chose_main)
    pool: Any = None
    return _oom_facts(call, pool, counters, counters.since(account.began), log)


@pytest.mark.parametrize("killed_before", [0, 1])
def test_a_late_command_killed_with_the_earlier_group_is_told_of_its_limit(
    killed_before: int,
) -> None:
    """The kernel was still killing the group when the second command entered, and took it along."""
    at_start, at_end = Counts(1, killed_before, 1), Counts(1, 3, 1)
    found = facts(at_start, at_end, chose_main=True)
    assert found.kills == 3 - killed_before
    assert [(hit.level, hit.limit) for hit in found.hits] == [(pb.LEVEL_CALL, LIMIT_BYTES)]


@pytest.mark.parametrize("killed_before", [0, 1])
def test_kills_of_the_earlier_group_are_not_counted_for_the_second_command(
    killed_before: int,
) -> None:
    at_start, at_end = Counts(1, killed_before, 1), Counts(1, 3, 1)
    found = facts(at_start, at_end, chose_main=False)
    assert (found.kills, found.kills_before) == (0, 3)
    assert [hit.level for hit in found.hits_before] == [pb.LEVEL_CALL]


def test_a_kill_without_a_limit_is_the_hosts() -> None:
    found = facts(Counts(), Counts(0, 1, 0), chose_main=True)
    assert (found.kills, found.hits) == (1, ())
