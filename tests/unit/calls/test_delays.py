"""What is said of the time that a call waited."""

from __future__ import annotations

from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.delays import delays_of, told
from agentcgroupd.cgroup import knobs

S = 1_000_000


class FakeCgroup:
    """Tells the pressures that it is given, by file."""

    def __init__(self, **totals: int) -> None:
        self._totals = totals

    def read_if(self, knob: Any) -> Any:
        name = knob.file.partition(".")[0]
        if name not in self._totals:
            return None
        text = "avg10=0.00 avg60=0.00 avg300=0.00"
        some = self._totals[name]
        return knob.parse(f"some {text} total={some}\nfull {text} total={some // 2}\n")


def read(**totals: int) -> pb.Delays | None:
    cgroup: Any = FakeCgroup(**totals)
    return delays_of(cgroup.read_if, cgroup.read_if(knobs.MEMORY_STALLED))


def test_totals_are_read_and_absent_where_the_kernel_tells_none() -> None:
    assert read() is None
    found = read(cpu=5 * S, io=8 * S, memory=2 * S)
    assert found == pb.Delays(
        cpu_usec=5 * S, io_usec=8 * S, memory_usec=2 * S, io_full_usec=4 * S, memory_full_usec=S
    )
    assert read(cpu=S) == pb.Delays(cpu_usec=S)


@pytest.mark.parametrize(
    ("delays", "wall_s", "sentence"),
    [
        (pb.Delays(io_usec=41 * S), 60, " Of its 1 min it waited 41 s for disks."),
        (
            pb.Delays(io_usec=30 * S, cpu_usec=20 * S),
            60,
            " Of its 1 min it waited 30 s for disks and 20 s for a CPU.",
        ),
        (pb.Delays(io_usec=14 * S, cpu_usec=14 * S), 60, ""),
        (pb.Delays(io_usec=900_000), 1, ""),
        (pb.Delays(memory_usec=50 * S), 60, ""),
        (None, 60, ""),
    ],
)
def test_a_sentence_says_what_took_much_of_the_time(
    delays: pb.Delays | None, wall_s: int, sentence: str
) -> None:
    assert told(delays, wall_s * S) == sentence
