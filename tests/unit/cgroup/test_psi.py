"""Text of the interface files for memory that is to leave: PSI, memory.reclaim, io.weight."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.cgroup import knobs
from agentcgroupd.guard import session_sampler

PRESSURE = (
    "some avg10=1.50 avg60=0.25 avg300=0.00 total=123456\n"
    "full avg10=0.00 avg60=0.00 avg300=0.00 total=789\n"
)


def test_what_the_policy_needs_of_a_file_is_what_the_whole_of_it_says() -> None:
    assert (
        session_sampler.parse_stalled(PRESSURE) == knobs.parse_pressure(PRESSURE)["some"].total_usec
    )
    stat = "anon 4096\nworkingset_refault_anon 7\nworkingset_refault_file 35\npgfault 9\n"
    assert session_sampler.parse_refaults(stat) == 42
    assert session_sampler.parse_usage("usage_usec 51\nuser_usec 50\nsystem_usec 1\n") == 51


@pytest.mark.parametrize("parse", [session_sampler.parse_refaults, session_sampler.parse_stalled])
def test_a_file_without_the_line_is_an_error_not_zero(parse: object) -> None:
    assert callable(parse)
    with pytest.raises(ValueError):
        parse("anon 4096\n")


@given(st.integers(1, 1 << 50), st.none() | st.integers(0, 200))
def test_reclaim_is_written_as_the_kernel_reads_it(size: int, swappiness: int | None) -> None:
    first, *rest = knobs.format_reclaim(knobs.Reclaim(size, swappiness)).split()
    assert int(first) == size
    assert rest == ([] if swappiness is None else [f"swappiness={swappiness}"])


def test_reclaim_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        knobs.MEMORY_RECLAIM.parse("1")


@given(st.integers(1, 10_000))
def test_the_default_weight_comes_back(weight: int) -> None:
    text = knobs.format_default_weight(weight)
    assert knobs.parse_default_weight(f"{text}\n8:16 200\n") == weight
