"""look.bpf.c on a real kernel with a memory controller: what it shows is what the files say."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from agentcgroupd.bpf import look
from agentcgroupd.bpf.look import STEP_BYTES, LookProgram
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.guest.test_memory_programs import MIB, Child
from tests.harness import wait_until

pytestmark = [pytest.mark.controllers, pytest.mark.programs]


@dataclass
class Place:
    """A pool with a session, and the program that looks below it."""

    pool: Cgroup
    session: Cgroup
    program: LookProgram
    children: list[Child] = field(default_factory=list)

    def call(self, name: str) -> tuple[Cgroup, int]:
        """Make a cgroup that is looked at; returns it and its slot."""
        cgroup = self.session.make_child(name)
        slot = self.program.add(cgroup.id)
        assert slot is not None
        return cgroup, slot

    def child(self, cgroup: Cgroup) -> Child:
        """Start a process there."""
        self.children.append(Child(cgroup))
        return self.children[-1]

    def look(self) -> list[int]:
        """Look at all."""
        return self.program.look(self.pool.id)


@pytest.fixture
def place() -> Iterator[Place]:
    """Everything removed and unloaded after each test."""
    program, (state,) = look.load()
    assert program is not None, state.reason
    root = Cgroup.open(cgroup2_mount())
    root.enable(("memory",))
    pool = root.make_child(f"agentcg-look-{secrets.token_hex(4)}")
    pool.enable(("memory",))
    session = pool.make_child("session")
    session.enable(("memory",))
    made = Place(pool, session, program)
    try:
        yield made
    finally:
        pool.kill_and_remove(20)
        for child in made.children:
            child.process.wait()
            with contextlib.suppress(BrokenPipeError):
                child.process.__exit__(None, None, None)
        program.close()
        root.close()


def test_it_shows_what_memory_current_says_and_lists_who_has_moved(place: Place) -> None:
    (grower, first), (idle, second) = place.call("a"), place.call("b")
    child = place.child(grower)
    assert place.look() == [first]
    program, held = place.program, place.program.usage_bytes(first)
    assert abs(held - grower.read(knobs.MEMORY_CURRENT)) <= MIB
    assert child.run(f"alloc({20 * MIB})") == "ok"
    assert place.look() == [first], "an idle one is not listed"
    assert program.before_bytes(first) == held
    assert 20 * MIB <= program.usage_bytes(first) - held <= 23 * MIB
    assert program.usage_bytes(second) == idle.read(knobs.MEMORY_CURRENT)
    assert place.look() == [], "told once"


def test_small_steps_add_up(place: Place) -> None:
    grower, slot = place.call("a")
    child = place.child(grower)
    place.look()
    listed = 0
    for _ in range(12):
        assert child.run(f"alloc({STEP_BYTES // 4})") == "ok"
        found = place.look()
        assert found in ([], [slot])
        listed += len(found)
    assert 1 <= listed <= 6


def test_a_cgroup_that_is_gone_or_lies_elsewhere_is_not_seen(place: Place) -> None:
    program = place.program
    inside, slot = place.call("a")
    outside = place.pool.make_child("beside")
    other = program.add(outside.id)
    assert other is not None
    program.look(place.session.id)
    assert (program.rounds, program.seen_in(slot), program.seen_in(other)) == (1, 1, 0)
    program.remove(outside.id, other)
    place.look()
    assert (program.rounds, program.seen_in(slot), program.seen_in(other)) == (2, 2, 0)
    inside.remove()

    def is_forgotten() -> bool:
        # The kernel walks over what is removed until nobody refers to it any more.
        place.look()
        return program.seen_in(slot) < program.rounds

    wait_until("the removed cgroup is forgotten", is_forgotten)
    assert program.add(outside.id) == other, "a slot is used again"
