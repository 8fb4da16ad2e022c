"""Text of interface files: line ends are the kernel's, and a wrong line is an error."""

from __future__ import annotations

import pytest

from agentcgroupd.cgroup import knobs


def test_flat_and_nested_keys() -> None:
    assert knobs.parse_flat_keyed("low 1\nhigh 20\n") == {"low": 1, "high": 20}
    assert knobs.parse_flat_keyed("") == {}
    text = "8:16 rbytes=1 wbytes=2\n253:0 rbytes=3 wbytes=4\n"
    assert knobs.parse_nested_keyed(text) == {
        "8:16": {"rbytes": 1, "wbytes": 2},
        "253:0": {"rbytes": 3, "wbytes": 4},
    }


def test_pressure_has_its_kinds_and_units() -> None:
    text = "some avg10=1.50 avg60=0.25 avg300=0.10 total=123456\n"
    assert knobs.parse_pressure(text) == {"some": knobs.Pressure(1.5, 0.25, 0.1, 123456)}


@pytest.mark.parametrize("end", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_only_a_line_feed_ends_a_line(end: str) -> None:
    with pytest.raises(ValueError):
        knobs.parse_flat_keyed(f"low 1{end}high 2\n")
