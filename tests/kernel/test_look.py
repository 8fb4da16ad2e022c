"""The look at all calls, on any kernel that takes the program: who is seen, and what it costs."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator

import pytest

from agentcgroupd.bpf import abi, look
from agentcgroupd.bpf.look import LookProgram
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may load programs"),
]
MANY = 2_000


@pytest.fixture
def program() -> Iterator[LookProgram]:
    """The loaded program."""
    loaded, (state,) = look.load()
    if loaded is None:
        pytest.skip(state.reason)
    yield loaded
    loaded.close()


@pytest.fixture
def scratch() -> Iterator[Cgroup]:
    """A cgroup to make others in."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    try:
        yield made
    finally:
        made.kill_and_remove(20)
        root.close()


def test_each_cgroup_below_the_root_is_seen_once(program: LookProgram, scratch: Cgroup) -> None:
    slots = []
    for number in range(MANY):
        slot = program.add(scratch.make_child(str(number)).id)
        assert slot is not None
        slots.append(slot)
    assert len(set(slots)) == MANY
    program.look(scratch.id)
    assert {program.seen_in(slot) for slot in slots} == {1}
    program.look(scratch.child("7").id)
    assert sorted(program.seen_in(slot) for slot in slots) == [1] * (MANY - 1) + [2]


@pytest.mark.full_speed
def test_a_look_is_much_cheaper_than_reading_files(program: LookProgram, scratch: Cgroup) -> None:
    for number in range(MANY):
        program.add(scratch.make_child(str(number)).id)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        program.look(scratch.id)
        took.append(time.perf_counter() - began)
    assert min(took) / MANY < 2e-6, "reading one file takes ten times that"


def test_slots_run_out(program: LookProgram) -> None:
    for number in range(abi.ABI_LOOK_CALLS):
        assert program.add(CgroupId(1 << 40 | number)) is not None
    assert program.add(CgroupId(1)) is None
    program.remove(CgroupId(1 << 40), abi.ABI_LOOK_CALLS - 1)
    assert program.add(CgroupId(1)) is not None


def test_without_a_root_there_is_no_look(program: LookProgram) -> None:
    with pytest.raises(BpfError, match="no cgroup 1099511627776"):
        program.look(CgroupId(1 << 40))
