"""A session's share of disks in its interface files, and those put back as they were found."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import disk_share
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.config import SessionDefaults
from agentcgroupd.errors import KnobError
from agentcgroupd.sessions.limits import (
    drop_latency,
    lacking_files,
    parse_limits,
    write_found,
    write_limits,
)
from agentcgroupd.state.session import SessionLimits

ASKED = pb.SessionSpec(io_weight="2500", io_latency="20ms")


class Directory:
    """Interface files in memory. A device 9:9 was removed. What is written to io.latency changes
    one device's line, as the kernel does; what is written elsewhere stands there afterwards."""

    def __init__(self, **texts: str) -> None:
        self.texts = {name.replace("_", "."): text for name, text in texts.items()}
        self.lines: list[tuple[str, str]] = []

    def files(self) -> frozenset[str]:
        return frozenset(self.texts)

    def has(self, knob: Knob[Any]) -> bool:
        return knob.file in self.texts

    def read(self, knob: Knob[Any]) -> Any:
        return knob.parse(self.texts[knob.file])

    def write(self, knob: Knob[Any], value: Any) -> None:
        self.write_text(knob.file, knob.format(value))

    def write_text(self, file: str, text: str) -> None:
        if file not in self.texts:
            raise KnobError(OSError(errno.ENOENT, "no such file"), "leaf", file, text)
        if text.startswith("9:9"):
            raise KnobError(OSError(errno.ENODEV, "gone"), "leaf", file, text)
        self.lines.append((file, text))
        if file != "io.latency":
            self.texts[file] = text
            return
        device = text.split()[0]
        kept = [line for line in self.texts[file].split("\n") if line.split(" ")[0] != device]
        kept += [] if text.endswith("=max") else [text]
        self.texts[file] = "\n".join(filter(None, kept))


@pytest.fixture(autouse=True)
def _three_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_share, "whole_devices", lambda: ["8:0", "9:9", "259:1"])


def limits(spec: pb.SessionSpec) -> SessionLimits:
    return parse_limits(spec, SessionDefaults(), None)


def test_each_file_that_is_there_is_set() -> None:
    cgroup: Any = Directory(io_weight="default 100", io_bfq_weight="default 100", io_latency="")
    write_limits(cgroup, limits(ASKED))
    assert cgroup.texts == {
        "io.weight": "default 2500",
        "io.bfq.weight": "default 1000",
        "io.latency": "8:0 target=20000\n259:1 target=20000",
    }
    assert lacking_files(cgroup, limits(ASKED)) == []
    drop_latency(cgroup, {"io.latency": "8:0 target=7"})
    assert cgroup.texts["io.latency"] == "8:0 target=7"
    write_limits(cgroup, limits(pb.SessionSpec()))
    assert cgroup.texts["io.latency"] == "8:0 target=7", "a runtime's own stays"


def test_weights_of_a_runtime_are_written_as_they_were_found() -> None:
    cgroup: Any = Directory(io_weight="default 100", pids_max="max")
    theirs = {"io.weight": "default 50\n8:0 70", "io.bfq.weight": "default 9"}
    write_limits(cgroup, limits(pb.SessionSpec()), theirs)
    weights = [text for file, text in cgroup.lines if file == "io.weight"]
    assert weights == ["default 50", "8:0 70"]
    assert "io.bfq.weight" not in cgroup.texts, "it went with its module"


def test_what_nothing_keeps_is_named() -> None:
    nowhere: Any = Directory()
    write_limits(nowhere, limits(ASKED))
    assert lacking_files(nowhere, limits(ASKED)) == ["io.latency", "io.weight"]
    assert lacking_files(nowhere, limits(pb.SessionSpec())) == []
    bfq: Any = Directory(io_bfq_weight="default 100")
    assert lacking_files(bfq, limits(ASKED)) == ["io.latency"]


def test_they_are_put_back_as_they_were_found() -> None:
    found = {"io.weight": "default 50\n9:9 60\n8:0 70", "io.bfq.weight": "default 9"}
    cgroup: Any = Directory(pids_max="3", io_weight="", io_latency="8:0 target=1\n9:9 target=1")
    # bfq's file went with its module, and nothing was said of latencies by whoever was there first.
    write_found(cgroup, {**found, "pids.max": "7", "io.latency": ""})
    assert ("pids.max", "7") in cgroup.lines
    weights = [text for file, text in cgroup.lines if file == "io.weight"]
    assert weights == ["default 100", "default 50", "8:0 70"]
    assert cgroup.texts["io.latency"] == "9:9 target=1", "a device that has gone keeps nothing"
    del cgroup.texts["pids.max"]
    with pytest.raises(KnobError):
        write_found(cgroup, {"pids.max": "7"})


def test_a_weight_that_was_not_there_when_it_was_found_is_the_usual_one() -> None:
    cgroup: Any = Directory(io_bfq_weight="default 400")
    write_found(cgroup, {})
    assert cgroup.texts["io.bfq.weight"] == "default 100"
