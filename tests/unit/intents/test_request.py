"""One table reads an intent, whichever encoding it came in."""

from __future__ import annotations

from dataclasses import fields

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.gpu import DeviceSelection
from agentcgroupd.intents.parse import PARSERS, Intent, parse_intent
from agentcgroupd.intents.request import (
    WORDS,
    intent_of_proto,
    observed_request,
    request_of_proto,
    request_of_words,
)

EXAMPLES: dict[str, tuple[str, object]] = {
    "memory": ("512M", 512 << 20),
    "memory_max": ("1G", 1 << 30),
    "cpu_weight": ("77", 77),
    "cpu_max": ("1.5", 1500),
    "pids_max": ("99", 99),
    "timeout": ("10m", 600_000_000),
    "priority": ("batch", 20),
    "on_pressure": ("kill", "kill"),
    "hint": ("memory:2g", 2 << 30),
    "wait": ("0", 0),
    "gpu": ("10%", 10),
    "gpu_memory": ("4G", 4 << 30),
    "gpu_priority": ("important", 80),
    "gpu_device": ("any:2", DeviceSelection(2)),
}
"""Of each field a text, and what it is read as."""
TEXTS = {name: text for name, (text, _) in EXAMPLES.items()}


def test_each_field_of_the_message_has_a_parser_and_each_parser_a_field() -> None:
    declared = {field.name for field in pb.Intent.DESCRIPTOR.fields}
    assert set(PARSERS) == declared == {field.name for field in fields(Intent)} == set(EXAMPLES)
    assert all(field.type == field.TYPE_STRING for field in pb.Intent.DESCRIPTOR.fields)
    assert set(WORDS) == {"name", "argc", "arg"} | declared


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_field_is_read_by_its_own_parser(name: str) -> None:
    text, value = EXAMPLES[name]
    assert parse_intent({name: text}) == Intent(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidField) as refused:
        parse_intent({name: "\N{SNOWMAN}"})
    assert (refused.value.field, refused.value.value) == (name, "\N{SNOWMAN}")


def test_both_encodings_give_the_same_request() -> None:
    message = pb.BeginCallRequest(name="make", argv=["make", "-j2"], intent=pb.Intent(**TEXTS))
    words = {"name": "make", "argc": "2", **TEXTS}
    request = request_of_words(words, ["make", "-j2"])
    assert request == request_of_proto(message)
    assert (request.name, request.argv, request.observed) == ("make", ("make", "-j2"), False)
    assert request.intent == Intent(**{name: value for name, (_, value) in EXAMPLES.items()})  # type: ignore[arg-type]


def test_silence_says_nothing() -> None:
    assert intent_of_proto(pb.Intent()) == parse_intent({"memory": "", "gpu": ""}) == Intent()
    assert observed_request("sh", ["sh"]).intent == Intent()


def test_a_request_keeps_no_more_of_a_command_line_than_its_report_shows() -> None:
    request = request_of_words({"name": "x"}, ["x" * 5000, "y"])
    assert request.argv == ("x" * 4096 + "…",)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb"])
def test_a_name_that_cannot_be_used_is_refused_in_both(name: str) -> None:
    with pytest.raises(InvalidField, match="name"):
        request_of_words({"name": name}, [])
    with pytest.raises(InvalidField, match="name"):
        request_of_proto(pb.BeginCallRequest(name=name))
