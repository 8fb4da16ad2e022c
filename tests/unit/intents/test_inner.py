"""What a call inside another one is granted: never more than is left of that, whatever it asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.errors import InvalidField, PermissionDenied
from agentcgroupd.intents.grant import Ceiling, Grant, grant_for, merge
from agentcgroupd.intents.inner import Room, inner_grant
from agentcgroupd.intents.lowering import lowered, refuse_raise
from agentcgroupd.intents.parse import CpuList, Intent

MIB = 1 << 20
SESSION = Ceiling(
    memory_max_bytes=4096 * MIB,
    agent_memory_bytes=100 * MIB,
    files_memory_bytes=0,
    cpu_millicores=8000,
    pids_max=16_384,
    priority=80,
    default_pids_max=4096,
    default_timeout_usec=None,
    timeout_max_usec=86_400_000_000,
)

intents = st.builds(
    Intent,
    memory=st.none() | st.integers(MIB, 2000 * MIB),
    memory_max=st.none() | st.integers(2000 * MIB, 9000 * MIB),
    cpu_weight=st.none() | st.integers(1, 10_000),
    cpu_max=st.none() | st.integers(1, 16_000),
    pids_max=st.none() | st.integers(1, 100_000),
    timeout=st.none() | st.integers(1, 90_000_000_000),
    priority=st.none() | st.integers(0, 100),
    on_pressure=st.none() | st.sampled_from(("freeze", "deny", "throttle", "kill")),
    hint=st.none() | st.sampled_from(("high", "low")) | st.integers(MIB, 9000 * MIB),
)


def at_most(value: int | None, most: int | None) -> bool:
    """Whether a limit is no higher than another; None: there is none."""
    return most is None or (value is not None and value <= most)


@given(intents, intents, st.integers(0, 5000), st.integers(1, 20_000), st.integers(1, 10**11))
def test_a_grant_inside_is_never_more_than_what_is_left(
    outer_asks: Intent, asks: Intent, used_mib: int, pids: int, left_usec: int
) -> None:
    outer = grant_for(outer_asks, SESSION)
    memory = None if outer.memory_max_bytes is None else outer.memory_max_bytes - used_mib * MIB
    time_left = None if outer.timeout_usec is None else min(outer.timeout_usec, left_usec)
    room = Room("x", outer, memory, min(pids, outer.pids_max or pids), time_left)
    grant, cut = inner_grant(asks, SESSION, room)
    least = 4 * MIB
    assert at_most(grant.memory_max_bytes, None if memory is None else max(memory, least))
    assert at_most(grant.memory_expected_bytes, grant.memory_max_bytes)
    assert at_most(grant.cpu_max_millicores, outer.cpu_max_millicores)
    assert at_most(grant.pids_max, room.pids) and at_most(grant.timeout_usec, time_left)
    assert grant.priority <= outer.priority and grant.on_pressure == outer.on_pressure
    assert set(cut) <= set(grant.advice)
    said = {sentence.partition(":")[0] for sentence in cut}
    beside = grant_for(asks, SESSION)
    for field, name in (("pids_max",) * 2, ("timeout", "timeout_usec"), ("priority",) * 2):
        if getattr(asks, field) is not None and field not in said:
            assert getattr(grant, name) == getattr(beside, name)


def test_a_part_of_a_gpu_is_shared_or_refused() -> None:
    none = grant_for(Intent(), SESSION)
    with pytest.raises(InvalidField, match="has no part of a GPU"):
        inner_grant(Intent(gpu=1), SESSION, Room("x", none, None, None, None))
    part = replace(
        none, gpu_percent=10, gpu_memory_bytes=1 << 30, gpu_priority=50, gpu_devices=("u",)
    )
    room = Room("x", replace(part, environment=("A=b",)), None, None, None)
    for asks in (Intent(), Intent(gpu=5), Intent(gpu_memory=1 << 29)):
        grant, _ = inner_grant(asks, SESSION, room)
        assert (grant.gpu_percent, grant.gpu_devices, grant.environment) == (10, ("u",), ("A=b",))
    for more in (Intent(gpu=11), Intent(gpu_memory=1 << 31), Intent(gpu=5, gpu_priority=51)):
        with pytest.raises(InvalidField, match="at most"):
            inner_grant(more, SESSION, room)


LIMITS = ("memory_max_bytes", "memory_high_bytes", "cpu_max_millicores", "pids_max", "timeout_usec")


@given(intents, intents)
def test_an_update_from_inside_is_refused_or_raises_nothing(has: Intent, asks: Intent) -> None:
    before = grant_for(has, SESSION)
    try:
        refuse_raise("x", before, asks)
    except PermissionDenied as error:
        assert error.field and error.value and error.allowed
        return
    after: Grant = lowered(before, merge(before, asks, SESSION, None))
    for name in LIMITS:
        assert at_most(getattr(after, name), getattr(before, name)), name
    assert after.cpu_weight <= before.cpu_weight and after.priority <= before.priority
    assert after.memory_expected_bytes <= before.memory_expected_bytes
    assert after.on_pressure in (before.on_pressure, "kill")


@pytest.mark.parametrize(
    "field, value",
    [
        ("hint", "high"),
        ("hint", "low"),
        ("hint", 129 * MIB),
        ("on_pressure", "deny"),
        ("cpuset", CpuList.parse("0-2")),
        ("gpu", 1),
        ("gpu_memory", 1),
        ("gpu_priority", 1),
    ],
)
def test_what_is_said_otherwise_is_no_way_round(field: str, value: Any) -> None:
    before = replace(grant_for(Intent(memory_max=128 * MIB), SESSION), settings={"cpuset": "0-1"})
    with pytest.raises(PermissionDenied) as caught:
        refuse_raise("x", before, replace(Intent(), **{field: value}))
    assert caught.value.field == field
