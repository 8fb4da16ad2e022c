"""What a tool may change of its own call: nothing that gives it more."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from agentcgroupd.errors import PermissionDenied
from agentcgroupd.intents.grant import Grant
from agentcgroupd.intents.lowering import refuse_raise
from agentcgroupd.intents.parse import Intent, parse_intent

HAS = Grant(
    memory_expected_bytes=64 << 20,
    memory_high_bytes=None,
    memory_max_bytes=128 << 20,
    cpu_weight=100,
    cpu_max_millicores=500,
    pids_max=50,
    timeout_usec=60_000_000,
    priority=50,
    on_pressure="freeze",
    disk_max_bytes=1 << 30,
    net_send_bytes_per_s=1 << 20,
    settings={"cpuset": "0-1", "io_read_max": str(1 << 20), "io_write_max": str(1 << 20)},
    leftovers="end",
    gpu_percent=50,
    gpu_memory_bytes=1 << 30,
    gpu_priority=50,
)
MORE = {
    "memory": "65M",
    "memory_max": "129M",
    "cpu_weight": "101",
    "cpu_max": "0.6",
    "pids_max": "51",
    "timeout": "61s",
    "priority": "51",
    "on_pressure": "throttle",
    "hint": "memory:129M",
    "cpuset": "0-2",
    "leftovers": "keep",
    "gpu": "51%",
    "gpu_memory": "2G",
    "gpu_priority": "51",
    "gpu_device": "1",
    "io_read_max": "2M",
    "io_write_max": "2M",
    "io_weight": "101",
    "disk_max": "2G",
    "net_send_max": "2M",
}
AS_MUCH = {**MORE, "memory": "64M", "memory_max": "128M", "cpu_weight": "100", "cpu_max": "0.5"} | {
    "pids_max": "50",
    "timeout": "60s",
    "priority": "50",
    "on_pressure": "freeze",
    "hint": "memory:128M",
    "cpuset": "1",
    "leftovers": "end",
    "gpu": "50%",
    "gpu_memory": "1G",
    "gpu_priority": "50",
    "io_read_max": "1M",
    "io_write_max": "1M",
    "io_weight": "100",
    "disk_max": "1G",
    "net_send_max": "1M",
}
WAITS = {"wait"}
"""Of no use to a call that has begun."""


def test_each_field_has_a_case() -> None:
    assert {field.name for field in fields(Intent)} - WAITS == set(MORE)


@pytest.mark.parametrize("field", MORE)
def test_more_is_refused_by_name(field: str) -> None:
    with pytest.raises(PermissionDenied, match=f"^{field}: ") as caught:
        refuse_raise("c1", HAS, parse_intent({field: MORE[field]}))
    assert caught.value.field == field and caught.value.allowed


@pytest.mark.parametrize("field", sorted(set(AS_MUCH) - {"gpu_device"}))
def test_what_it_has_may_be_asked_for(field: str) -> None:
    refuse_raise("c1", HAS, parse_intent({field: AS_MUCH[field]}))


def test_who_keeps_what_is_left_may_go_on_doing_so() -> None:
    refuse_raise("c1", replace(HAS, leftovers="keep"), parse_intent({"leftovers": "keep"}))
