"""Interface files that are held open."""

from __future__ import annotations

import os
from pathlib import Path

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.held import HeldKnob
from agentcgroupd.cgroup.tree import Cgroup


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_held_file_tells_what_it_holds_now(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text("")
    cgroup = Cgroup.open(tmp_path)
    before, held = open_files(), HeldKnob(cgroup, knobs.MEMORY_EVENTS_LOCAL)
    assert held.read_if() is None  # this kernel does not have it
    file = tmp_path / knobs.MEMORY_EVENTS_LOCAL.file
    file.write_text("oom 1\noom_kill 2\n")
    assert held.read_if() == {"oom": 1, "oom_kill": 2}
    first = held.read_if()
    file.write_text("oom 1\noom_kill 3\n")
    assert held.read_if() == {"oom": 1, "oom_kill": 3}
    assert first == {"oom": 1, "oom_kill": 2}
    assert open_files() == before + 1
    held.close()
    assert open_files() == before
    assert held.read_if() == {"oom": 1, "oom_kill": 3}
    del held
    assert open_files() == before
    cgroup.close()


def test_the_totals_of_a_pressure_file() -> None:
    text = (
        "some avg10=0.00 avg60=1.50 avg300=0.00 total=12345\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=678\n"
    )
    assert knobs.parse_stalled(text) == {"some": 12345, "full": 678}
    parsed = knobs.parse_pressure(text)
    assert {kind: value.total_usec for kind, value in parsed.items()} == knobs.parse_stalled(text)
