"""The table that reads an intent, whichever encoding it came in, and cpuset as its newest field."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.enforce.limits import SETTINGS, settle, write_grant
from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.gpu import DeviceSelection
from agentcgroupd.intents.grant import Ceiling, grant_for, merge
from agentcgroupd.intents.parse import PARSERS, CpuList, Intent, parse_intent, settings_of
from agentcgroupd.intents.request import (
    WORDS,
    intent_of_proto,
    observed_request,
    request_of_proto,
    request_of_words,
)
from agentcgroupd.state.records import plain
from agentcgroupd.state.session import Call

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
    "cpuset": ("8, 0-2,1-3", CpuList(frozenset({0, 1, 2, 3, 8}))),
    "leftovers": ("keep", "keep"),
    "gpu": ("10%", 10),
    "gpu_memory": ("4G", 4 << 30),
    "gpu_priority": ("important", 80),
    "gpu_device": ("any:2", DeviceSelection(2)),
    "io_read_max": ("10M/s", 10 << 20),
    "io_write_max": ("1.5M", 3 << 19),
    "io_weight": ("200", 200),
    "disk_max": ("10G", 10 << 30),
    "net_send_max": ("10M/s", 10 << 20),
}
"""For each field a text, and what that is read as."""
TEXTS = {name: text for name, (text, _) in EXAMPLES.items()}


def test_each_field_of_the_message_has_a_parser_and_each_parser_a_field() -> None:
    declared = {field.name for field in pb.Intent.DESCRIPTOR.fields}
    assert set(PARSERS) == declared == {field.name for field in fields(Intent)} == set(EXAMPLES)
    assert all(field.type == field.TYPE_STRING for field in pb.Intent.DESCRIPTOR.fields)
    assert set(WORDS) == {"name", "by_script", "argc", "arg"} | declared


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


@pytest.mark.parametrize(
    "name",
    ["", "a\nb", "a\x9b31m", "a\u202eb", "a\u2066b", "a\u200bb", "\u2028", "x" * 129, "\ud800"],
)
def test_a_name_that_was_given_is_refused_if_it_cannot_be_shown(name: str) -> None:
    with pytest.raises(InvalidField) as refused:
        request_of_words({"name": name}, ["true"])
    assert refused.value.field == "name"
    assert refused.value.sentence.isprintable()


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/usr/bin/make", "all"], "make"),
        (["/tmp/we\nird\ttool"], "we?ird?tool"),
        (["a\x9b31m\u202e"], "a?31m?"),
        (["x" * 200], "x" * 128),
        (["/"], "/"),
        ([], "tool"),
    ],
)
def test_a_call_without_a_name_is_named_by_its_program(argv: list[str], name: str) -> None:
    assert request_of_words({}, argv).name == name


def test_silence_says_nothing() -> None:
    assert intent_of_proto(pb.Intent()) == parse_intent({"memory": "", "gpu": ""}) == Intent()
    assert observed_request("sh", ["sh"]).intent == Intent(leftovers="keep")


def test_a_request_keeps_no_more_of_a_command_line_than_its_report_shows() -> None:
    request = request_of_words({"name": "x"}, ["x" * 5000, "y"])
    assert request.argv == ("x" * 4096 + "…",)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb"])
def test_a_name_that_cannot_be_used_is_refused_in_both(name: str) -> None:
    with pytest.raises(InvalidField, match="name"):
        request_of_words({"name": name}, [])
    with pytest.raises(InvalidField, match="name"):
        request_of_proto(pb.BeginCallRequest(name=name))


# Fields that an interface file takes as they are

ABOVE = Ceiling(
    memory_max_bytes=None,
    agent_memory_bytes=0,
    files_memory_bytes=0,
    cpu_millicores=4000,
    pids_max=None,
    priority=50,
    default_pids_max=None,
    default_timeout_usec=None,
    timeout_max_usec=3_600_000_000,
)


class FakeCgroup:
    """The cgroup of a session that may use CPUs 0 to 3, with these controllers for its calls."""

    def __init__(self, controllers: tuple[str, ...]) -> None:
        self._files = {"cpuset.cpus.effective": "0-3", "cgroup.controllers": controllers}
        self.enabled: set[str] = set()

    def read(self, knob: Any) -> Any:
        return self._files[knob.file]

    def enable(self, controllers: tuple[str, ...]) -> tuple[str, ...]:
        self.enabled |= set(controllers)
        return ()


def write(controllers: tuple[str, ...], cpus: str) -> tuple[Any, dict[str, str]]:
    """The grant for a cpuset, and what was written."""
    cgroup = FakeCgroup(controllers)
    agent = SimpleNamespace(files=lambda: frozenset(f"{name}.cpus" for name in cgroup.enabled))
    session: Any = SimpleNamespace(cgroup=cgroup, agent=agent, offered=frozenset())
    written: dict[str, str] = {}
    leaf: Any = SimpleNamespace(write_text=written.__setitem__)
    return write_grant(session, leaf, grant_for(parse_intent({"cpuset": cpus}), ABOVE)), written


def test_every_setting_has_its_file() -> None:
    intent = Intent(**{name: value for name, (_, value) in EXAMPLES.items()})  # type: ignore[arg-type]
    assert settings_of(intent).keys() == SETTINGS.keys()
    assert settings_of(intent).keys() == {"cpuset", "io_read_max", "io_write_max"}


@given(st.frozensets(st.integers(0, 300), min_size=1))
def test_a_list_of_cpus_is_read_as_it_is_written(cpus: frozenset[int]) -> None:
    assert CpuList.parse(str(CpuList(cpus))).cpus == cpus


BAD_LISTS = ["", ",", "0-", "-1", "3-1", "0,,1", "all", "0-3:2/4", "8192", "0-8192"]


@pytest.mark.parametrize("text", BAD_LISTS)
def test_lists_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        CpuList.parse(text)


def test_a_long_list_of_cpus_is_refused_before_it_is_read() -> None:
    """An agent cannot keep the daemon busy with it."""
    with pytest.raises(InvalidField, match="at most 1024 characters"):
        parse_intent({"cpuset": "0-8191," * 1000 + "0"})
    began = time.process_time()
    assert len(CpuList.parse(",".join(["0-8191"] * 146)).cpus) == 8192
    assert time.process_time() - began < 0.5


def test_a_refused_change_of_cpus_writes_nothing() -> None:
    """The settings are settled before the first interface file is written."""
    cgroup = FakeCgroup(("cpuset",))
    agent = SimpleNamespace(files=lambda: frozenset({"cpuset.cpus"}))
    session: Any = SimpleNamespace(cgroup=cgroup, agent=agent, offered=frozenset({"cpuset.cpus"}))
    grant = grant_for(parse_intent({"cpuset": "77"}), ABOVE)
    with pytest.raises(InvalidField, match="CPUs of this session"):
        settle(session, grant, {"cpuset": "0"})
    assert settle(session, grant, {"cpuset": "77"}) == grant, "what is in force is not asked again"


def test_cpus_of_the_session_are_set_on_the_call() -> None:
    grant, written = write(("cpuset",), "0,1,2")
    assert written == {"cpuset.cpus": "0-2"} and grant.settings == {"cpuset": "0-2"}
    assert (grant.advice, grant.not_enforced) == ((), ())


def test_cpus_beyond_the_session_are_left_out_with_a_sentence() -> None:
    grant, written = write(("cpuset",), "2-9")
    assert written == {"cpuset.cpus": "2-3"} and grant.settings == {"cpuset": "2-3"}
    assert "asked for 2-9" in grant.advice[0] and "0-3" in grant.advice[0]
    with pytest.raises(InvalidField, match="some of the CPUs of this session: 0-3") as refused:
        write(("cpuset",), "8")
    assert (refused.value.field, refused.value.value) == ("cpuset", "8")


def test_without_the_controller_it_is_said_so() -> None:
    grant, written = write(("memory",), "0-1")
    assert (written, grant.not_enforced) == ({}, ("cpuset.cpus",))


def test_a_record_keeps_it_and_one_without_it_is_read() -> None:
    grant = grant_for(parse_intent({"cpuset": "0-1", "cpu_max": "1"}), ABOVE)
    data = {
        "id": "c",
        "name": "n",
        "argv": [],
        "grant": {**plain(grant), "gpu_wanted": ""},
        "began_unix_usec": 1,
        "began_boot_usec": 1,
        "held": False,
        "entered": True,
        "frozen_usec": 0,
        "session_ooms_before": 0,
        "pool_ooms_before": 0,
        "owner": None,
        "main": None,
    }
    nothing: Any = None
    read = Call.from_record(nothing, nothing, json.loads(json.dumps(data)))
    assert read.grant == grant
    del data["grant"]["settings"]  # type: ignore[attr-defined]
    read = Call.from_record(nothing, nothing, json.loads(json.dumps(data)))
    assert read.grant == replace(grant, settings={})
    assert merge(read.grant, parse_intent({"cpuset": "1"}), ABOVE, None).settings == {"cpuset": "1"}


@pytest.mark.parametrize(
    "count", ["nan", "-1", "", "1e3", "1.0", "\u0661", "2147483648", "9" * 4000]
)
def test_a_number_of_arguments_is_one(count: str) -> None:
    with pytest.raises(InvalidField) as caught:
        request_of_words({"name": "x", "argc": count}, ["true"])
    assert caught.value.field == "argc"
    assert caught.value.allowed == "a whole number from 0 to 2147483647"
    assert request_of_words({"name": "x", "argc": "2"}, ["true"]).name == "x"


@pytest.mark.parametrize("field", PARSERS)
@pytest.mark.parametrize("sign", ["\u2028", "\u00a0", "\x85", "\u3000"])
def test_blanks_are_those_of_ascii(field: str, sign: str) -> None:
    text = EXAMPLES[field][0]
    for changed in (text + sign, sign + text):
        with pytest.raises(InvalidField) as caught:
            parse_intent({field: changed})
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("on_pressure", "\u212aill"),
        ("leftovers", "\u212aeep"),
        ("memory", "512\u2028M"),
        ("cpuset", "0-1,\u20032"),
        ("memory", "1\u212a"),
    ],
)
def test_signs_that_look_like_letters_are_none(field: str, text: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_intent({field: text})
    assert caught.value.field == field
