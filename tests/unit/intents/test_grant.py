"""From an intent to a grant."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.grant import (
    CALL_MEMORY_LEAST,
    HINT_LOW_BYTES,
    Ceiling,
    grant_for,
    merge,
    weight_of_priority,
)
from agentcgroupd.intents.parse import Intent, check_name, cut_argv, parse_intent

GIB, MIB = 1 << 30, 1 << 20
ABOVE = Ceiling(
    memory_max_bytes=2 * GIB,
    agent_memory_bytes=200 * MIB,
    files_memory_bytes=0,
    cpu_millicores=4000,
    pids_max=1000,
    priority=50,
    default_pids_max=4096,
    default_timeout_usec=None,
    timeout_max_usec=3_600_000_000,
)


def test_silence_gives_all_but_what_the_agent_holds() -> None:
    grant = grant_for(parse_intent({}), ABOVE)
    assert grant.memory_max_bytes == 2 * GIB - 200 * MIB
    assert (grant.memory_high_bytes, grant.cpu_max_millicores, grant.timeout_usec) == (None,) * 3
    assert (grant.pids_max, grant.cpu_weight, grant.priority) == (1000, 100, 50)
    assert (grant.on_pressure, grant.advice) == ("freeze", ())


def test_what_fits_is_given_as_asked() -> None:
    fields = {
        "memory": "512M",
        "memory_max": "1G",
        "cpu_max": "1.5",
        "cpu_weight": "77",
        "pids_max": "99",
        "timeout": "10m",
        "priority": "20",
        "on_pressure": "kill",
    }
    grant = grant_for(parse_intent(fields), ABOVE)
    assert (grant.memory_expected_bytes, grant.memory_max_bytes) == (512 * MIB, GIB)
    assert (grant.cpu_max_millicores, grant.cpu_weight, grant.pids_max) == (1500, 77, 99)
    assert (grant.timeout_usec, grant.priority, grant.on_pressure) == (600_000_000, 20, "kill")
    assert grant.advice == ()


def test_more_than_there_is_becomes_less_with_a_sentence_each() -> None:
    fields = {
        "memory_max": "64G",
        "cpu_max": "64",
        "pids_max": "5000",
        "timeout": "2h",
        "priority": "99",
    }
    grant = grant_for(parse_intent(fields), ABOVE)
    assert grant.memory_max_bytes == 2 * GIB - 200 * MIB
    assert (grant.cpu_max_millicores, grant.pids_max, grant.priority) == (None, 1000, 50)
    assert grant.timeout_usec == 3_600_000_000
    assert [a.split(":")[0] for a in grant.advice] == list(fields)
    assert "64 GiB" in grant.advice[0] and "2 GiB" in grant.advice[0]


def test_an_expectation_that_can_never_be_met_is_refused() -> None:
    with pytest.raises(InvalidField, match="never fit") as caught:
        grant_for(parse_intent({"memory": "3G"}), ABOVE)
    assert caught.value.field == "memory"


def test_expected_above_max_is_refused() -> None:
    with pytest.raises(InvalidField, match="memory_max") as caught:
        parse_intent({"memory": "2G", "memory_max": "1G"})
    assert (caught.value.field, caught.value.value) == ("memory", "2G")


@pytest.mark.parametrize(
    ("hint", "most"),
    [
        ("memory:low", HINT_LOW_BYTES),
        ("memory:high", 2 * GIB - 200 * MIB),
        ("memory:1g", GIB),
        ("MEMORY:LOW", HINT_LOW_BYTES),
    ],
)
def test_the_older_hint_form(hint: str, most: int) -> None:
    assert grant_for(parse_intent({"hint": hint}), ABOVE).memory_max_bytes == most


@pytest.mark.parametrize("hint", ["memory", "memory:", "cpu:high", "memory:hihg", "memory:-1", ":"])
def test_hints_that_are_refused(hint: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_intent({"hint": hint})
    assert (caught.value.field, caught.value.value) == ("hint", hint)
    assert "memory:2g" in caught.value.sentence


def test_an_explicit_limit_beats_a_hint() -> None:
    grant = grant_for(parse_intent({"hint": "memory:low", "memory_max": "1G"}), ABOVE)
    assert grant.memory_max_bytes == GIB


def test_unknown_fields_are_refused_with_a_suggestion() -> None:
    with pytest.raises(InvalidField, match="did you mean 'memory'"):
        parse_intent({"memroy": "1G"})


def test_a_call_that_would_rather_be_slowed_gets_a_brake_below_its_limit() -> None:
    grant = grant_for(parse_intent({"memory_max": "160M", "on_pressure": "throttle"}), ABOVE)
    assert grant.memory_high_bytes == 150 * MIB


def test_priority_and_weight() -> None:
    assert [weight_of_priority(p) for p in (20, 35, 50, 65, 80)] == [25, 50, 100, 200, 400]
    assert 1 <= weight_of_priority(0) < weight_of_priority(100) <= 10_000


def test_an_update_changes_only_what_it_names() -> None:
    old = grant_for(parse_intent({"memory_max": "1G", "cpu_max": "1", "timeout": "60"}), ABOVE)
    new = merge(old, parse_intent({"cpu_max": "2"}), ABOVE, 100 * MIB)
    assert new == replace(old, cpu_max_millicores=2000)


def test_an_update_that_would_kill_is_refused() -> None:
    old = grant_for(parse_intent({"memory_max": "1G"}), ABOVE)
    with pytest.raises(InvalidField, match="would kill"):
        merge(old, parse_intent({"memory_max": "100M"}), ABOVE, 300 * MIB)


sizes = st.none() | st.integers(MIB, 1 << 45)
intents = st.builds(
    Intent,
    memory=sizes,
    memory_max=sizes,
    pids_max=st.none() | st.integers(1, 4_194_304),
    priority=st.none() | st.integers(0, 100),
    on_pressure=st.sampled_from([None, "freeze", "throttle", "kill"]),
)
ceilings = st.builds(
    lambda roof, agent, pids: replace(
        ABOVE, memory_max_bytes=roof, agent_memory_bytes=agent, pids_max=pids
    ),
    st.none() | st.integers(64 * MIB, 1 << 42),
    st.integers(0, 1 << 35),
    st.none() | st.integers(1, 100_000),
)


@given(intents, ceilings)
def test_a_grant_never_goes_above_what_stands_above_it(intent: Intent, above: Ceiling) -> None:
    memory, memory_max, roof = intent.memory, intent.memory_max, above.memory_max_bytes
    agent, pids_roof = above.agent_memory_bytes, above.pids_max
    try:
        grant = grant_for(intent, above)
    except InvalidField as error:
        assert memory is not None and roof is not None and memory > roof
        assert error.field == "memory"
        return
    if roof is not None:
        assert grant.memory_max_bytes is not None
        assert grant.memory_max_bytes <= max(roof - agent, CALL_MEMORY_LEAST)
    if grant.memory_high_bytes is not None:
        assert grant.memory_max_bytes is not None
        assert grant.memory_high_bytes <= grant.memory_max_bytes
    if pids_roof is not None:
        assert grant.pids_max is not None and grant.pids_max <= pids_roof
    assert grant.priority <= above.priority
    assert (memory_max or 0) <= (grant.memory_max_bytes or 1 << 63) or grant.advice


def test_names() -> None:
    assert check_name("pytest -k 'ä'") == "pytest -k 'ä'"
    for name in ("", "x" * 129, "a\nb", "a\0b", "\x7f"):
        with pytest.raises(InvalidField, match="name"):
            check_name(name)


@given(st.lists(st.text(max_size=3000), max_size=20))
def test_a_cut_command_line_is_a_prefix_of_at_most_4096_bytes(argv: list[str]) -> None:
    kept = cut_argv(argv)
    size = sum(len(a.encode("utf-8", "replace")) for a in kept)
    assert size <= 4096 + len("…".encode())
    assert list(kept[:-1]) == argv[: max(0, len(kept) - 1)]
    if sum(len(a.encode("utf-8", "replace")) + 1 for a in argv) < 4096:
        assert list(kept) == argv
