"""Sessions as the policy sees them: who waits, who stalls, and what looking costs.

The directories stand for cgroups; only files that a kernel with all controllers has are in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.guard.session_sampler import (
    REFAULTS_USEC,
    SAMPLE_USEC,
    SAMPLING_NS_MOST,
    VIEWS_IN_TURN,
    SessionSampler,
)
from agentcgroupd.policy.snapshot import SessionView
from agentcgroupd.state.session import Call, Session, SessionLimits

MIB = 1 << 20


@dataclass
class Fake:
    """A session whose files are written here."""

    session: Session
    path: Path

    @classmethod
    def make(cls, root: Path, name: str) -> Fake:
        path = root / name
        (path / "agent").mkdir(parents=True)
        for directory in (path, path / "agent"):
            (directory / "cgroup.procs").touch()
        limits = SessionLimits(64 * MIB, None, None, 100, None, None, 70, 16)
        own = Cgroup.open(path)
        session = Session(
            id=name,
            cgroup=own,
            agent=own.child("agent"),
            cgroup_path=f"/{name}",
            limits=limits,
            opened_unix_usec=0,
            offered=frozenset({"memory.pressure"}),
        )
        fake = cls(session, path)
        fake.write()
        return fake

    def write(self, memory: int = MIB, cpu: int = 0, refaults: int = 0, stalled: int = 0) -> None:
        """What the kernel would show."""
        (self.path / "memory.current").write_text(f"{memory}\n")
        (self.path / "memory.stat").write_text(
            f"anon 0\nworkingset_refault_anon {refaults}\nworkingset_refault_file 0\npgfault 1\n"
        )
        (self.path / "memory.pressure").write_text(
            f"some avg10=0.00 avg60=0.00 avg300=0.00 total={stalled}\n"
            "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
        )
        (self.path / "agent/memory.current").write_text(f"{memory // 2}\n")
        (self.path / "agent/cpu.stat").write_text(f"usage_usec {cpu}\nuser_usec 0\n")

    def call(self) -> Call:
        """An open call; nothing is looked at in it."""
        call = object.__new__(Call)
        self.session.calls["x"] = call
        return call


@dataclass
class World:
    """Sessions, the time, and what sampling costs."""

    root: Path
    fakes: list[Fake] = field(default_factory=list)
    now_usec: int = 1_000_000
    clock_ns: int = 0
    step_ns: int = 0

    def __post_init__(self) -> None:
        self.sampler = SessionSampler(lambda: [f.session for f in self.fakes], self._tick)

    def _tick(self) -> int:
        self.clock_ns += self.step_ns
        return self.clock_ns

    def add(self, name: str) -> Fake:
        """Add a session."""
        self.fakes.append(Fake.make(self.root, name))
        return self.fakes[-1]

    def look(self, after_usec: int = SAMPLE_USEC) -> dict[str, SessionView]:
        """What is seen after a while."""
        self.now_usec += after_usec
        return {view.id: view for view in self.sampler.views(self.now_usec)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Without sessions."""
    return World(tmp_path)


def test_the_first_look_tells_what_is_held_and_nothing_about_rates(world: World) -> None:
    fake = world.add("a")
    fake.write(memory=100 * MIB, cpu=5_000_000, refaults=1000, stalled=900_000)
    assert world.look()["a"] == SessionView(
        id="a",
        priority=70,
        memory_bytes=100 * MIB,
        agent_bytes=50 * MIB,
        guarantee_bytes=64 * MIB,
        sampled_usec=world.now_usec,
    )


def test_an_agent_that_uses_no_cpu_waits_from_when_it_began_to(world: World) -> None:
    fake = world.add("a")
    waits = []
    for number in range(4):
        # 1 % of a core.
        fake.write(cpu=number * SAMPLE_USEC // 100)
        waits.append(world.look()["a"].waiting_usec)
    assert waits == [0, SAMPLE_USEC, 2 * SAMPLE_USEC, 3 * SAMPLE_USEC]
    fake.write(cpu=3 * SAMPLE_USEC // 100 + SAMPLE_USEC // 20)
    assert world.look()["a"].waiting_usec == 0


def test_between_samples_waiting_goes_on(world: World) -> None:
    world.add("a")
    world.look()
    world.look()
    assert world.look(SAMPLE_USEC // 10)["a"].waiting_usec == SAMPLE_USEC + SAMPLE_USEC // 10


def test_a_call_ends_waiting_at_once(world: World) -> None:
    fake = world.add("a")
    world.look()
    assert world.look()["a"].waiting_usec > 0
    fake.call()
    assert world.look(1)["a"].waiting_usec == 0
    assert world.look()["a"].waiting_usec == 0
    # It ends: from the next sample on there may be quiet again, but not before.
    fake.session.calls.clear()
    fake.session.calls_ended += 1
    assert world.look()["a"].waiting_usec == 0
    assert world.look()["a"].waiting_usec == SAMPLE_USEC


def test_a_call_between_two_samples_is_noticed(world: World) -> None:
    fake = world.add("a")
    world.look()
    assert world.look()["a"].waiting_usec > 0
    fake.session.calls_ended += 1
    assert world.look(1)["a"].waiting_usec == 0


def test_stalls_are_a_share_of_the_time(world: World) -> None:
    fake = world.add("a")
    world.look()
    fake.write(stalled=SAMPLE_USEC // 4)
    assert world.look()["a"].stalled_share == 0.25
    fake.write(stalled=100 * SAMPLE_USEC)
    assert world.look()["a"].stalled_share == 1.0
    assert world.look()["a"].stalled_share == 0.0


def test_refaults_are_asked_for_once_a_second(world: World) -> None:
    fake = world.add("a")
    world.look()
    fake.write(refaults=500)
    assert world.look()["a"].refaults_per_s == 0
    view = world.look(REFAULTS_USEC - SAMPLE_USEC)["a"]
    assert view.refaults_per_s == 500
    (fake.path / "memory.stat").unlink()
    assert world.look()["a"].refaults_per_s == 500


def test_what_was_done_to_a_session_shows_at_once(world: World) -> None:
    fake = world.add("a")
    world.look()
    fake.session.slowed = True
    fake.session.reclaimed_at_usec = world.now_usec
    view = world.look(7)["a"]
    assert view.slowed and view.reclaimed_usec == 7


def test_a_session_that_goes_or_is_being_closed_is_left_out(world: World) -> None:
    a, b, c = world.add("a"), world.add("b"), world.add("c")
    assert world.look().keys() == {"a", "b", "c"}
    a.session.closing = True
    world.fakes.remove(b)
    (c.path / "memory.current").unlink()
    assert world.look() == {}


def test_each_has_its_turn_however_dear_a_sample_is(world: World) -> None:
    for name in "abc":
        world.add(name)
    world.step_ns = SAMPLING_NS_MOST * 10
    seen = [world.look().keys() for _ in range(3)]
    assert [len(keys) for keys in seen] == [1, 2, 3]
    for fake in world.fakes:
        fake.write(memory=5 * MIB)
    known = [{v.id for v in world.look().values() if v.memory_bytes == 5 * MIB} for _ in range(3)]
    assert [len(ids) for ids in known] == [1, 2, 3]


def test_a_look_samples_only_what_fits_into_its_time(world: World) -> None:
    for number in range(10):
        world.add(f"s{number}")
    # Four clock readings fit into the most that a look may take.
    world.step_ns = SAMPLING_NS_MOST // 4
    assert len(world.look(1_000_000)) == 4
    # Soon after, a share of the time that has passed: less than one.
    assert len(world.look(1000)) == 5


def test_of_many_sessions_a_part_is_shown_anew_and_whatever_was_done_to_at_once(
    world: World,
) -> None:
    for number in range(VIEWS_IN_TURN * 2):
        world.add(str(number))
    for _ in range(2):
        world.look()
    before = world.look()
    world.fakes[0].session.slowed = True
    world.fakes[-1].session.reclaimed_at_usec = world.now_usec
    after = world.look(1)
    assert after["0"].slowed and after[str(VIEWS_IN_TURN * 2 - 1)].reclaimed_usec == 1
    kept = [id for id in before if after[id] is before[id]]
    assert VIEWS_IN_TURN - 2 <= len(kept) <= VIEWS_IN_TURN
    again = world.look(1)
    assert not any(again[id] is before[id] for id in kept)
