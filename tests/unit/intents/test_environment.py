"""An intent in the environment of a program."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.errors import AgentcgroupdError, InvalidField
from agentcgroupd.intents.environment import FIELDS, declared_in, texts_in


def test_fields_are_read_by_their_name_in_capitals() -> None:
    environment = b"PATH=/bin\0AGENTCG_CALL_MEMORY_MAX=2G\0AGENTCG_CALL_NAME=a b\0HOME=/\0"
    name, intent = declared_in(environment)
    assert (name, intent.memory_max, intent.leftovers) == ("a b", 2 << 30, "keep")


def test_without_any_it_is_as_if_nobody_had_asked() -> None:
    name, intent = declared_in(b"AGENTCG_RUN_DIR=/run/x\0AGENTCG_EXEC=/bin/x\0")
    assert (name, intent.memory, intent.leftovers) == ("", None, "keep")


def test_the_hint_and_what_is_to_become_of_leftovers() -> None:
    environment = b"AGENT_RESOURCE_HINT=memory:2g\0AGENTCG_CALL_LEFTOVERS=end\0"
    _, intent = declared_in(environment)
    assert (intent.hint, intent.leftovers) == (2 << 30, "end")


def test_the_first_of_two_counts_and_empty_says_nothing() -> None:
    assert texts_in(b"AGENTCG_CALL_MEMORY=1G\0AGENTCG_CALL_MEMORY=2G\0") == {"memory": "1G"}
    assert texts_in(b"AGENTCG_CALL_MEMORY=\0AGENTCG_CALL_MEMORY") == {}


@pytest.mark.parametrize("entry", ["AGENTCG_CALL_MEMORY=x", "AGENTCG_CALL_SPEED=3"])
def test_what_makes_no_sense_is_an_error(entry: str) -> None:
    with pytest.raises(InvalidField):
        declared_in(entry.encode())


@given(st.binary(max_size=300), st.sampled_from(FIELDS))
def test_no_environment_is_a_fault(data: bytes, field: str) -> None:
    try:
        declared_in(b"AGENTCG_CALL_" + field.upper().encode() + b"=" + data)
    except AgentcgroupdError:
        return


def test_names_that_an_agent_makes_up_cannot_pass_for_lines() -> None:
    with pytest.raises(InvalidField) as caught:
        declared_in(b"AGENTCG_CALL_A\n<0>forged\x1b[31m" + b"a" * 60_000 + b"=1\0")
    assert "\n" not in caught.value.sentence
    assert len(caught.value.sentence) < 4096


def test_an_environment_of_empty_entries_takes_no_time() -> None:
    began_s = time.thread_time()
    assert texts_in(b"\0" * 65_500 + b"AGENTCG_CALL_MEMORY=1G\0") == {"memory": "1G"}
    assert time.thread_time() - began_s < 0.02


def test_only_whole_names_count() -> None:
    assert texts_in(b"X=AGENTCG_CALL_CPU=1\0XAGENTCG_CALL_CPU=1\0AGENT_RESOURCE_HINTS=1\0") == {}
