"""Limits and weights of block devices in intents, and what is written for them."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.cgroup import knobs
from agentcgroupd.enforce import limits
from agentcgroupd.enforce.limits import rewrite_grant, write_grant
from agentcgroupd.errors import InvalidField, KnobError, PermissionDenied
from agentcgroupd.host.block_devices import device_name, whole_devices
from agentcgroupd.intents.grant import grant_for, merge
from agentcgroupd.intents.lowering import lowered, refuse_raise
from agentcgroupd.intents.parse import Intent, parse_intent, said_in
from tests.unit.intents.test_request import ABOVE


def granted(**texts: str) -> Any:
    return grant_for(parse_intent(texts), ABOVE)


@pytest.mark.parametrize("text", ["1K", "0", "fast", "-1M", "63K"])
def test_a_rate_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="io_write_max"):
        parse_intent({"io_write_max": text})


def test_a_rate_is_shown_as_one() -> None:
    assert said_in(parse_intent({"io_read_max": "1M"})) == {"io_read_max": "1 MiB/s"}


def test_a_weight_that_is_said_stays_when_the_priority_changes() -> None:
    has = granted(io_weight="300")
    assert (has.io_weight, has.io_weight_asked) == (300, True)
    assert merge(has, Intent(priority=20), ABOVE, None).io_weight == 300
    assert merge(has, Intent(io_weight=50), ABOVE, None).io_weight == 50
    silent = granted()
    changed = merge(silent, Intent(priority=20), ABOVE, None)
    assert changed.io_weight == changed.cpu_weight < silent.io_weight


def test_a_tool_may_lower_its_rate_and_not_raise_it() -> None:
    has = granted(io_read_max="2M", io_weight="100")
    refuse_raise("c1", has, parse_intent({"io_read_max": "1M", "io_weight": "10"}))
    refuse_raise("c1", has, parse_intent({"io_write_max": "1M"}))
    for texts in ({"io_read_max": "3M"}, {"io_weight": "200"}):
        with pytest.raises(PermissionDenied, match="may only lower"):
            refuse_raise("c1", has, parse_intent(texts))
    new = merge(has, parse_intent({"io_read_max": "1M"}), ABOVE, None)
    assert lowered(has, new).settings["io_read_max"] == str(1 << 20)


class Leaf:
    """A call's cgroup that takes down what is written; device 9:9 has gone. `files`: what it keeps
    of disks' shares."""

    def __init__(self, *files: str) -> None:
        self.files = files
        self.written: list[tuple[str, object]] = []

    def write_text(self, file: str, text: str) -> None:
        if text.startswith("9:9"):
            raise KnobError(OSError(errno.ENODEV, "gone"), "leaf", file, text)
        self.written.append((file, text))

    def write(self, knob: Any, value: object) -> None:
        if knob.file.endswith("weight") and knob.file not in (*self.files, "cpu.weight"):
            raise KnobError(OSError(errno.ENOENT, "no such file"), "leaf", knob.file)
        self.written.append((knob.file, value))


def written(offered: set[str], devices: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The grant as in force, and what was written for it."""
    monkeypatch.setattr(limits, "whole_devices", lambda: devices)
    cgroup = SimpleNamespace(read=lambda knob: (), enable=lambda controllers: controllers)
    session: Any = SimpleNamespace(cgroup=cgroup, offered=frozenset(offered))
    leaf: Any = Leaf(*offered)
    asked = granted(io_read_max="1M", io_write_max="2M", io_weight="300")
    return write_grant(session, leaf, asked), leaf.written


def test_each_device_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = {"io.max", knobs.IO_WEIGHT.file}
    grant, found = written(offered, ["8:0", "9:9", "259:1"], monkeypatch)
    assert [text for file, text in found if file == "io.max"] == [
        "8:0 rbps=1048576",
        "259:1 rbps=1048576",
        "8:0 wbps=2097152",
        "259:1 wbps=2097152",
    ]
    assert ("io.weight", 300) in found
    assert not {"io.max", "io.weight"} & set(grant.not_enforced)


def test_a_weight_of_bfq_is_a_thousand_at_most_and_goes_back_to_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, found = written({"io.bfq.weight"}, [], monkeypatch)
    assert found == [("io.bfq.weight", 300)]
    session: Any = SimpleNamespace(offered=frozenset())
    large, usual = granted(io_weight="5000"), granted(io_weight="100")
    leaf = Leaf("io.weight", "io.bfq.weight")
    kept: Any = leaf
    rewrite_grant(session, kept, usual, large)
    rewrite_grant(session, kept, large, usual)
    weights = [each for each in leaf.written if each[0] != "cpu.weight"]
    assert weights[:2] == [("io.weight", 5000), ("io.bfq.weight", 1000)]
    assert weights[-2:] == [("io.weight", 100), ("io.bfq.weight", 100)]


@pytest.mark.parametrize(("offered", "devices"), [(set(), ["8:0"]), ({"io.max"}, [])])
def test_what_nothing_holds_is_named(
    offered: set[str], devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grant, found = written(offered, devices, monkeypatch)
    assert {"io.max", "io.weight"} <= set(grant.not_enforced)
    assert not [text for file, text in found if file == "io.max"]


def test_devices_are_listed_and_named(tmp_path: Path) -> None:
    for name, number, size in (("loop0", "7:0", 0), ("sda", "8:0", 9), ("zram0", "252:0", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev").write_text(f"{number}\n")
        (tmp_path / name / "size").write_text(f"{size}\n")
    (tmp_path / "going").mkdir()
    assert whole_devices(tmp_path) == ["8:0", "252:0"]
    assert whole_devices(tmp_path / "none") == []
    (tmp_path / "8:0").symlink_to("../../devices/sda")
    assert (device_name("8:0", tmp_path), device_name("7:0", tmp_path)) == ("sda", "7:0")
