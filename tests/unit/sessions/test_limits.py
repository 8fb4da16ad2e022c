"""Limits of a session, from the text of a request."""

from __future__ import annotations

from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.config import SessionDefaults
from agentcgroupd.errors import InvalidField
from agentcgroupd.sessions.limits import as_found, change_limits, parse_limits, tighten

GIB = 1 << 30
DEFAULTS = SessionDefaults()


def test_where_a_request_is_silent_the_defaults_hold() -> None:
    limits = parse_limits(pb.SessionSpec(id="a"), DEFAULTS, None)
    assert (limits.priority, limits.cpu_weight) == (DEFAULTS.priority, 100)
    assert (limits.pids_max, limits.calls_max) == (DEFAULTS.pids_max, DEFAULTS.calls_max)
    sizes = (limits.memory_low_bytes, limits.memory_high_bytes, limits.memory_max_bytes)
    assert sizes == (None, None, None) and limits.cpu_max_millicores is None


def test_a_weight_follows_from_the_priority_unless_it_is_given() -> None:
    assert parse_limits(pb.SessionSpec(priority="important"), DEFAULTS, None).cpu_weight == 400
    spec = pb.SessionSpec(priority="important", cpu_weight="7", pids_max="9", calls_max="3")
    limits = parse_limits(spec, DEFAULTS, None)
    assert (limits.cpu_weight, limits.pids_max, limits.calls_max) == (7, 9, 3)


def test_the_share_of_disks_follows_the_priority_too() -> None:
    important = parse_limits(pb.SessionSpec(priority="important"), DEFAULTS, None)
    assert (important.io_weight, important.io_latency_usec) == (400, None)
    spec = pb.SessionSpec(priority="important", io_weight="7", io_latency="20ms")
    asked = parse_limits(spec, DEFAULTS, None)
    assert (asked.io_weight, asked.cpu_weight, asked.io_latency_usec) == (7, 400, 20_000)
    less = pb.SessionSpec(priority="normal")
    assert change_limits(less, important, None).io_weight == 100
    assert change_limits(less, asked, None).io_weight == 7, "it was named"
    taken = change_limits(pb.SessionSpec(io_latency="none"), asked, None)
    assert taken.io_latency_usec is None and taken.io_weight == 7


def test_nothing_of_an_important_session_is_swapped_out() -> None:
    normal = parse_limits(pb.SessionSpec(), DEFAULTS, None)
    important = parse_limits(pb.SessionSpec(priority="80"), DEFAULTS, None)
    assert (normal.swap_max_bytes, important.swap_max_bytes) == (None, 0)
    changed = change_limits(pb.SessionSpec(priority="normal"), important, None)
    assert changed.swap_max_bytes is None
    assert change_limits(pb.SessionSpec(priority="81"), normal, None).swap_max_bytes == 0
    assert change_limits(pb.SessionSpec(cpu_weight="9"), important, None).swap_max_bytes == 0


def test_a_runtimes_own_limit_of_swap_stays() -> None:
    normal = parse_limits(pb.SessionSpec(), DEFAULTS, None)
    assert tighten(as_found({"memory.swap.max": "4096"}), normal).swap_max_bytes == 4096
    assert tighten(as_found({"memory.swap.max": "max"}), normal).swap_max_bytes is None


def test_a_session_may_have_no_limit_on_processes() -> None:
    defaults = SessionDefaults.model_validate({"pids_max": ""})
    assert parse_limits(pb.SessionSpec(), defaults, None).pids_max is None


@pytest.mark.parametrize(
    ("limits", "field", "why"),
    [
        ({"memory_max": "2G"}, "memory_max", "more than the whole pool"),
        ({"memory_low": "2G"}, "memory_low", "more than the whole pool"),
        ({"memory_low": "64M", "memory_max": "32M"}, "memory_low", "at most memory_max"),
        ({"memory_high": "2G", "memory_max": "512M"}, "memory_high", "at most memory_max"),
        ({"memory_max": "lots"}, "memory_max", "not a number"),
        ({"cpu_weight": "0"}, "cpu_weight", "out of range"),
        ({"io_weight": "10001"}, "io_weight", "out of range"),
        ({"io_latency": "11s"}, "io_latency", "at most 10"),
        ({"io_latency": "soon"}, "io_latency", "not a number"),
        ({"pids_max": "5000000"}, "pids_max", "out of range"),
        ({"calls_max": "100001"}, "calls_max", "out of range"),
    ],
)
def test_limits_that_cannot_be_are_named(limits: dict[str, Any], field: str, why: str) -> None:
    with pytest.raises(InvalidField, match=why) as caught:
        parse_limits(pb.SessionSpec(**limits), DEFAULTS, GIB)
    assert caught.value.field == field


def test_a_slowing_limit_alone_may_be_above_the_pool() -> None:
    limits = parse_limits(pb.SessionSpec(memory_high="2G"), DEFAULTS, GIB)
    assert limits.memory_high_bytes == 2 * GIB
