"""Calls that are paused, go on and are ended while a file system fills up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls import writes
from agentcgroupd.calls.writes import FILLED, WROTE_TOO_MUCH, Written
from agentcgroupd.config import GuardConfig
from agentcgroupd.guard import disks
from agentcgroupd.guard.disks import CALM_S, NEAR_S, DiskGuard, heaviest
from agentcgroupd.host.file_systems import Space
from agentcgroupd.host.proc import parse_written

MIB, GIB = 1 << 20, 1 << 30
SECOND = 1_000_000
GRACE = "3s"


class Actions:
    """Takes down what is done, and does it to the call's fields."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str, str]] = []
        self.now_usec = 0
        low = SimpleNamespace(set=lambda count: setattr(self, "low", count))
        self.notices = SimpleNamespace(metrics=SimpleNamespace(file_systems_low=low))
        self.low = 0

    def disk_hold(self, call: Any, why: str) -> None:
        self.done.append(("hold", call.id, why))
        call.disk_since_usec = self.now_usec

    def disk_unhold(self, call: Any, why: str) -> None:
        self.done.append(("unhold", call.id, why))
        call.disk_since_usec = None

    def kill(self, call: Any, why: str, action: str) -> None:
        assert action == "disk_kill"
        self.done.append(("kill", call.id, why))
        call.state = pb.CALL_STATE_ENDING

    def names(self) -> list[tuple[str, str]]:
        return [(what, id) for what, id, _ in self.done]


def a_call(id: str, priority: int = 50, disk_max: int | None = None) -> Any:
    return SimpleNamespace(
        id=id,
        parent=None,
        priority=priority,
        state=pb.CALL_STATE_RUNNING,
        began_boot_usec=0,
        disk_since_usec=None,
        disk_seen=(0, 0),
        wrote=0,
        grant=SimpleNamespace(disk_max_bytes=disk_max),
    )


class World:
    """A file system of 100 GiB, and calls that write to it until they are paused or ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *calls: Any, **config: Any) -> None:
        def look(call: Any, swapped_to: object = ()) -> Written:
            return Written({"8:0": call.wrote})

        monkeypatch.setattr(disks, "written", look)
        self.calls = {call.id: call for call in calls}
        self.actions = Actions()
        given = {"disk_free": "1%", "disk_grace": GRACE, **config}
        settings = GuardConfig.model_validate(given)
        limited = {i: c for i, c in self.calls.items() if c.grant.disk_max_bytes is not None}
        self.guard = DiskGuard(settings, self.calls, limited, self.actions)  # type: ignore[arg-type]
        self.free = 2 * GIB
        self.now_usec = 10 * SECOND

    def step(self, **rates: int) -> float:
        """Let a quarter of a second pass, in which calls write so many bytes."""
        for id, count in rates.items():
            call = self.calls[id]
            if call.disk_since_usec is None and call.state != pb.CALL_STATE_ENDING:
                call.wrote += count
                self.free -= count
        self.now_usec += SECOND // 4
        self.actions.now_usec = self.now_usec
        space = Space("/data", "8:0", 100 * GIB, self.free)
        return self.guard.judge(self.now_usec, [space])

    def steps(self, count: int, **rates: int) -> None:
        for _ in range(count):
            self.step(**rates)


def test_the_one_that_writes_most_is_paused_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a_call("much"), a_call("little"), a_call("none"))
    world.steps(12, much=100 * MIB, little=1000)
    assert world.actions.names() == [("hold", "much")]
    why = world.actions.done[0][2]
    assert "iB of 100 GiB are left of the file system at /data" in why and "in the last" in why
    assert world.actions.low == 1


def test_an_important_call_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a_call("important", priority=80), a_call("batch", priority=20))
    world.steps(20, important=90 * MIB, batch=20 * MIB)
    assert world.actions.names()[:2] == [("hold", "batch"), ("hold", "important")]


def test_a_full_disk_that_loses_nothing_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a_call("reads"))
    world.free = 100 * MIB
    world.steps(40, reads=0)
    # Somebody outside of all calls fills it: no call has a part in that.
    for _ in range(10):
        world.free -= MIB
        world.step(reads=0)
    assert world.actions.done == []


def test_it_goes_on_when_there_is_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a_call("much"))
    world.steps(12, much=100 * MIB)
    world.free = int(1.4 * GIB)
    world.step()
    assert world.actions.names() == [("hold", "much")]
    world.free = int(1.6 * GIB)
    world.step()
    assert world.actions.names()[-1] == ("unhold", "much")


def test_it_is_ended_when_there_is_none_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a_call("much"))
    world.steps(12, much=100 * MIB)
    world.steps(13)
    assert world.actions.names() == [("hold", "much"), ("kill", "much")]
    assert world.actions.done[-1][2].startswith(FILLED)
    world.steps(13)
    assert len(world.actions.done) == 2


def test_one_whose_file_system_is_gone_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a_call("much"))
    world.steps(12, much=100 * MIB)
    world.guard.judge(world.now_usec, [])
    assert world.actions.names()[-1] == ("unhold", "much")


def test_a_call_that_has_just_begun_counts_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, a_call("old"))
    world.free = GIB // 2
    world.steps(4, old=0)
    new = a_call("new")
    new.began_boot_usec = world.now_usec + 1
    world.calls["new"] = new
    world.step(new=100 * MIB)
    assert world.actions.names() == [("hold", "new")]


def test_far_from_the_mark_it_is_looked_seldom_and_no_call_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, a_call("much"))
    world.free = 50 * GIB
    assert world.step(much=0) == CALM_S

    def never(*_: object) -> Written:
        raise AssertionError

    monkeypatch.setattr(disks, "written", never)
    assert world.step(much=MIB) == CALM_S
    for _ in range(4):
        soon = world.step(much=6 * GIB)
    assert NEAR_S <= soon < CALM_S


def test_who_wrote_most_is_who_wrote_most() -> None:
    calls = [a_call("a"), a_call("b"), a_call("c", priority=80)]
    assert heaviest({"a": 1, "b": 2, "c": 3}, calls).id == "b"  # type: ignore[union-attr]
    assert heaviest({"c": 3}, calls).id == "c"  # type: ignore[union-attr]
    assert heaviest({}, calls) is None


def test_a_call_is_ended_at_its_own_limit_and_looked_at_sooner_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call, free = a_call("limited", disk_max=100 * MIB), a_call("free")
    world = World(monkeypatch, call, free)
    clock = iter(range(SECOND, 100 * SECOND, SECOND))
    monkeypatch.setattr(disks, "boottime_usec", lambda: next(clock))
    call.wrote, free.wrote = 10 * MIB, 900 * MIB
    assert asyncio.run(world.guard.hold_limits()) == disks.LIMITS_EVERY_S
    call.wrote = 95 * MIB
    soon = asyncio.run(world.guard.hold_limits())
    assert soon < disks.LIMITS_EVERY_S / 2
    call.wrote = 101 * MIB
    asyncio.run(world.guard.hold_limits())
    assert world.actions.names() == [("kill", "limited")]
    why = world.actions.done[0][2]
    assert why.startswith(WROTE_TOO_MUCH) and "101 MiB" in why and "100 MiB" in why
    asyncio.run(world.guard.hold_limits())
    assert len(world.actions.done) == 1


def test_a_device_that_lies_on_others_is_not_counted_twice() -> None:
    assert Written({"254:0": 10, "8:0": 10}, 5, 3).total == 15
    assert Written({}, 5, 3).total == 3
    assert Written({"8:0": 10}, 0, 30).total == 30


def test_what_came_to_a_disk() -> None:
    before, now = Written({"8:0": 10}, 4, 3), Written({"8:0": 30, "8:16": 50}, 1, 90)
    assert now.since(before, "8:0") == 17
    assert now.since(before, "8:16") == 47
    assert now.since(before, "") == 87
    assert before.since(now, "8:0") == 0


def test_files_of_the_kernel() -> None:
    assert writes.parse_unwritten("anon 1\nfile_dirty 20\nfile_writeback 3\nfile_dirtyx 9\n") == 23
    data = b"rchar: 1\nwchar: 2\nread_bytes: 3\nwrite_bytes: 4\ncancelled_write_bytes: 5\n"
    assert parse_written(data) == 4
    with pytest.raises(ValueError, match="write_bytes"):
        parse_written(b"")
