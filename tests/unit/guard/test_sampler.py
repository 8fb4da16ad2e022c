"""The sampler among many calls: who is judged anew, and what is said of the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.errors import CgroupGone
from agentcgroupd.guard import look, sampler
from agentcgroupd.guard.adopted_caches import FRESH_USEC, AdoptedCaches
from agentcgroupd.guard.look import COLD_SLICE_NS, SLICE_NS, FileLook, Seen
from agentcgroupd.guard.sampler import IN_TURN, STEADY_USEC, Sampler
from agentcgroupd.intents.grant import Grant
from agentcgroupd.policy.snapshot import CallView, Host, Snapshot
from agentcgroupd.state.session import Call

MIB, GIB = 1 << 20, 1 << 30
GRANT = Grant(
    memory_expected_bytes=0,
    memory_high_bytes=None,
    memory_max_bytes=None,
    cpu_weight=100,
    cpu_max_millicores=None,
    pids_max=None,
    timeout_usec=None,
    priority=50,
    on_pressure="freeze",
)


@dataclass(eq=False)
class FakeCgroup:
    """A cgroup whose files can be read, and are counted."""

    path: Path = Path("/x")
    id: int = 0
    used: int = 20 * MIB
    cold: int = 0
    gone: bool = False
    reads: dict[str, int] = field(default_factory=dict)

    def read(self, knob: Knob[Any]) -> Any:
        self.reads[knob.file] = self.reads.get(knob.file, 0) + 1
        if self.gone:
            raise CgroupGone(OSError(19, "gone"), str(self.path), knob.file, None)
        values: dict[str, Any] = {
            knobs.MEMORY_CURRENT.file: self.used,
            knobs.MEMORY_STAT.file: {"inactive_file": self.cold},
            knobs.CPU_STAT.file: {"usage_usec": 7},
        }
        return values[knob.file]

    def read_if(self, knob: Knob[Any]) -> None:
        """Have no such file."""


class FakeHost:
    """A host without anything."""

    zram_bytes = 0

    def __call__(self, now_usec: int) -> Host:
        return Host()


class KernelModel:
    """Looks at all calls at once, as the program does."""

    def __init__(self) -> None:
        self.all: list[Seen] = []
        self.told: dict[str, int] = {}
        self.before_usec: int | None = None

    def opened(self, seen: Seen) -> None:
        self.all.append(seen)
        self.told[seen.call.id] = 0

    def closed(self, seen: Seen) -> None:
        self.all.remove(seen)

    def look(self, now_usec: int, wanted: Iterable[Seen]) -> Iterable[Seen]:
        before, self.before_usec = self.before_usec or now_usec, now_usec
        moved = []
        for seen in self.all:
            cgroup: Any = seen.call.cgroup
            seen.before_usec, seen.before_bytes = before, seen.memory_bytes
            seen.at_usec, seen.memory_bytes = now_usec, cgroup.used
            if abs(cgroup.used - self.told[seen.call.id]) >= MIB:
                self.told[seen.call.id] = cgroup.used
                moved.append(seen)
        return moved


@dataclass
class World:
    """A pool with calls, on a made-up clock."""

    look: KernelModel | FileLook
    now_usec: int = 100_000_000
    opened: dict[str, Call] = field(default_factory=dict)
    pool: FakeCgroup = field(default_factory=lambda: FakeCgroup(used=GIB))

    def __post_init__(self) -> None:
        of_pool: Any = SimpleNamespace(cgroup=self.pool, memory_max_bytes=64 * GIB)
        known: Any = SimpleNamespace(open=self.opened)
        self.sampler = Sampler(of_pool, known, lambda now: (), FakeHost(), tuple, tuple, self.look)
        self.sampler.cpu_below_bytes = lambda: GIB

    def begin(self, name: str, priority: int = 50) -> FakeCgroup:
        """Open a call that began long ago."""
        files = FakeCgroup(Path(name))
        cgroup: Any = files
        session: Any = SimpleNamespace(id="s")
        grant: Any = SimpleNamespace(**{f: getattr(GRANT, f) for f in GRANT.__slots__})
        grant.priority = priority
        call = Call(
            id=name,
            session=session,
            name=name,
            argv=(),
            grant=grant,
            cgroup=cgroup,
            began_unix_usec=0,
            began_boot_usec=len(self.opened),
            held=False,
            entered=True,
            state=pb.CALL_STATE_RUNNING,
        )
        self.opened[name] = call
        self.sampler.call_opened(call)
        return files

    def end(self, name: str) -> None:
        """Close a call."""
        self.sampler.call_closed(self.opened.pop(name))

    def sample(self, after_usec: int = 10_000) -> Snapshot:
        """Sample after a while."""
        self.now_usec += after_usec
        return self.sampler.sample(self.pool.used)


@pytest.fixture(params=["kernel", "files"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world for each way to look; reading costs nothing."""
    way = KernelModel() if request.param == "kernel" else FileLook(lambda: 0)
    made = World(way)
    monkeypatch.setattr(sampler, "boottime_usec", lambda: made.now_usec)
    return made


def of(now: Snapshot, name: str) -> CallView:
    """The view of a call."""
    (found,) = (view for view in now.calls if view.id == name)
    return found


def settle(world: World) -> Snapshot:
    """Sample until nothing that happened so far counts any more."""
    world.sample()
    world.sample(STEADY_USEC)
    return world.sample()


def test_calls_that_do_nothing_cost_nothing(world: World) -> None:
    for number in range(3 * IN_TURN):
        world.begin(str(number))
    before = settle(world)
    assert len(before.calls) == 3 * IN_TURN and before.active == ()
    after = world.sample()
    old = {view.id: view for view in before.calls}
    anew = [view for view in after.calls if view is not old[view.id]]
    assert len(anew) == IN_TURN, "those whose turn it is"


def test_a_burst_after_a_long_rest_is_seen_at_its_full_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(KernelModel())
    monkeypatch.setattr(sampler, "boottime_usec", lambda: world.now_usec)
    for number in range(3 * IN_TURN):
        world.begin(str(number))
    grower: Any = world.opened["7"].cgroup
    settle(world)
    world.sample(1_000_000)
    grower.used += 20 * MIB
    now = world.sample(10_000)
    assert of(now, "7").growth_bytes_per_s == pytest.approx(20 * MIB / 0.01)
    assert now.active == (of(now, "7"),)
    for _ in range(30):
        last = world.sample(STEADY_USEC // 10)
    assert last.active == ()


def test_what_was_done_to_a_call_shows_at_once(world: World) -> None:
    for number in range(3 * IN_TURN):
        world.begin(str(number))
    settle(world)
    call = world.opened["7"]
    call.frozen_since_usec = world.now_usec
    world.sampler.touch(call)
    now = world.sample()
    assert of(now, "7").frozen_for_usec == 10_000
    assert now.active == (of(now, "7"),)
    assert world.sampler.active() == [call]
    call.frozen_since_usec = None
    world.sampler.touch(call)
    assert world.sample().active == ()


def test_a_call_that_ends_is_not_shown(world: World) -> None:
    for number in range(3 * IN_TURN):
        world.begin(str(number))
    settle(world)
    world.opened["7"].state = pb.CALL_STATE_ENDING
    world.sampler.touch(world.opened["7"])
    world.end("8")
    shown = {view.id for view in world.sample().calls}
    assert shown == set(world.opened) - {"7"}


def test_the_most_important_call_is_kept_track_of(world: World) -> None:
    for number in range(3 * IN_TURN):
        world.begin(str(number))
    first = settle(world).first
    assert first is not None and first.id == "0"
    world.end("0")
    first = world.sample().first
    assert first is not None and first.id == "1"
    world.begin("late", priority=80)
    first = world.sample().first
    assert first is not None and first.id == "late"
    late: Any = world.opened["late"].grant
    late.priority = 10
    world.sampler.touch(world.opened["late"])
    first = world.sample().first
    assert first is not None and first.id == "1"


def test_reading_files_is_no_growth(world: World) -> None:
    world.pool.used = 60 * GIB
    reader = world.begin("reader")
    grower = world.begin("grower")
    settle(world)
    for _ in range(3):
        reader.used += 20 * MIB
        reader.cold += 20 * MIB
        grower.used += 20 * MIB
        now = world.sample()
    assert of(now, "grower").growth_bytes_per_s > GIB
    assert of(now, "reader").growth_bytes_per_s < 4 * MIB


def test_cpu_time_is_read_only_where_a_call_may_have_to_be_ended(world: World) -> None:
    cgroup = world.begin("a")
    assert of(world.sample(), "a").cpu_usec is None
    assert knobs.CPU_STAT.file not in cgroup.reads
    world.pool.used = 64 * GIB - MIB
    assert of(world.sample(), "a").cpu_usec == 7
    world.pool.used = GIB
    assert of(world.sampler.snapshot(), "a").cpu_usec == 7, "who asks is told"


def test_files_are_read_for_a_slice_of_time_the_longest_unread_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0]

    def tick() -> int:
        clock[0] += SLICE_NS // 10
        return clock[0]

    world = World(FileLook(tick))
    monkeypatch.setattr(sampler, "boottime_usec", lambda: world.now_usec)
    cgroups = [world.begin(str(number)) for number in range(30)]
    shown = [len(world.sample().calls) for _ in range(4)]
    assert shown == [10, 20, 30, 30]
    world.sample()
    reads = [cgroup.reads[knobs.MEMORY_CURRENT.file] for cgroup in cgroups]
    assert max(reads) - min(reads) <= 1


def test_a_cgroup_that_has_gone_is_not_shown(world: World) -> None:
    cgroup = world.begin("a")
    world.sample()
    cgroup.gone = True
    if isinstance(world.look, FileLook):
        assert world.sample().calls == ()


def test_the_file_cache_of_many_is_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]

    def tick() -> int:
        clock[0] += look.COLD_SLICE_NS // 4
        return clock[0]

    monkeypatch.setattr("agentcgroupd.guard.look.time.perf_counter_ns", tick)
    calls: Any = [SimpleNamespace(id=str(n), cgroup=FakeCgroup(cold=n)) for n in range(10)]
    seen = [Seen(call) for call in calls]
    look.read_cold(seen, 1)
    assert [s.cold_usec for s in seen] == [1] * 4 + [None] * 6
    look.read_cold(seen, 2)
    assert [s.cold_usec for s in seen] == [1] * 4 + [2] * 4 + [None] * 2


def beside(
    boxes: list[Any], views: tuple[Any, ...] = (), most: int = 1000
) -> tuple[Sampler, FakeCgroup]:
    """A sampler of a pool of 1 GiB that is empty, with adopted sessions beside it, of which it can
    ask so many in its slice of time."""
    pool, known = FakeCgroup(used=0), SimpleNamespace(open={})
    of_pool = SimpleNamespace(cgroup=pool, memory_max_bytes=GIB)
    made: Any = Sampler(
        of_pool,  # type: ignore[arg-type]
        known,  # type: ignore[arg-type]
        lambda now: views,
        FakeHost(),
        tuple,
        lambda: boxes,
    )
    ticks = itertools.count(step=COLD_SLICE_NS // most)
    made._caches = AdoptedCaches(lambda: boxes, lambda: next(ticks))
    return made, pool


def box(number: int, cold: int = 0) -> Any:
    """An adopted session with file cache."""
    cgroup = FakeCgroup(Path(str(number)), id=number, cold=cold)
    return SimpleNamespace(id=str(number), cgroup=cgroup, closing=False)


def test_file_cache_of_adopted_sessions_is_free_and_can_be_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_usec = 1_000_000
    monkeypatch.setattr(sampler, "boottime_usec", lambda: at_usec)
    boxes = [box(number, number * MIB) for number in range(1, 31)]
    of_all = sum(each.cgroup.cold for each in boxes)
    sampled, _ = beside(boxes, most=20)
    now = sampled.sample(GIB)
    assert 0 < now.cache_bytes < of_all
    at_usec += 10_000
    now = sampled.sample(GIB)
    assert now.cache_bytes == of_all and now.usage_bytes <= GIB - of_all
    assert now.growth_bytes_per_s == 0, "nothing grew: more became known"
    held = [holder.cold_bytes // MIB for holder in sampled.cache_holders()]
    assert held == [*range(30, 0, -1), 0], "the pool itself has none"
    boxes[0].closing = boxes[1].cgroup.gone = True
    at_usec += 10_000
    for _ in range(2):
        now = sampled.sample(GIB)
    assert now.cache_bytes == of_all - 3 * MIB
    at_usec += 10 * FRESH_USEC
    assert sampled.sample(GIB).cache_bytes < of_all - 100 * MIB, "only what is known now counts"


def test_the_adopted_session_that_stalls_most_counts_as_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler, "boottime_usec", lambda: 10_000_000)
    views = tuple(
        SimpleNamespace(id=name, stalled_share=share, sampled_usec=at)
        for name, share, at in (
            ("1", 0.2, 9_900_000),
            ("2", 0.6, 9_900_000),
            ("3", 0.9, 1_000_000),
            ("own", 1.0, 9_900_000),
        )
    )
    sampled, pool = beside([box(1), box(2), box(3)], views)
    stalled: Any = {"some": SimpleNamespace(total_usec=0)}
    pool.read_if = lambda knob: stalled  # type: ignore[method-assign]
    assert sampled.sample(0).stalled_share == 0.6, "of 3 nothing is known of now"
    pool.read_if = lambda knob: None  # type: ignore[method-assign]
    assert sampled.sample(0).stalled_share is None, "this kernel does not measure it"
