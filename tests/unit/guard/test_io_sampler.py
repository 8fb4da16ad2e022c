"""What is read of pressure on disks and of calls that use them, and when nothing is."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

from agentcgroupd.cgroup import knobs
from agentcgroupd.enforce import disks
from agentcgroupd.errors import KnobError
from agentcgroupd.guard.io_sampler import STALLED, IoSampler, bytes_moved
from agentcgroupd.policy.schema import Policy
from agentcgroupd.state.session import LoweredDisks
from tests.unit.policy.test_engine import shipped

SECOND = 1_000_000


class Files:
    """A cgroup with these interface files."""

    def __init__(self, **values: int) -> None:
        self.values = values
        self.written: list[tuple[str, object]] = []
        self.reads = 0

    def read_if(self, knob: Any) -> Any:
        self.reads += 1
        if knob is knobs.IO_STAT:
            return {"8:0": {}, "8:16": {}}
        if knob is knobs.IO_WEIGHT:
            return 10
        if knob is disks.IO_MAX:
            return "8:0 rbps=5 wbps=5 riops=max wiops=max\n"
        return self.values.get("stalled" if knob is STALLED else "moved")

    def write(self, knob: Any, value: object) -> None:
        if knob is knobs.IO_BFQ_WEIGHT:
            raise KnobError(OSError(errno.ENOENT, "no bfq"), "leaf", knob.file)
        self.written.append((knob.file, value))

    def write_text(self, file: str, text: str) -> None:
        self.written.append((file, text))


def a_call(files: Files, **settings: str) -> Any:
    session = SimpleNamespace(id="s", offered=frozenset({"io.weight", "io.max"}))
    grant = SimpleNamespace(io_weight=200, settings=settings)
    return SimpleNamespace(
        id="c",
        name="c",
        session=session,
        priority=50,
        parent=None,
        state=0,
        cgroup=files,
        disks=LoweredDisks(),
        grant=grant,
    )


def test_shares_and_rates_come_of_two_looks() -> None:
    pool, vip, call = Files(stalled=0), Files(stalled=0), a_call(Files(moved=0))
    session: Any = SimpleNamespace(
        id="vip", cgroup=vip, adopted=False, limits=SimpleNamespace(priority=80)
    )
    lowered: dict[str, Any] = {}
    sampler = IoSampler(
        pool,  # type: ignore[arg-type]
        {"c": call},
        lambda: [session],
        lambda: shipped("default"),
        lowered,
    )
    assert not sampler.look(SECOND)
    pool.values["stalled"] = SECOND // 2
    assert not sampler.look(SECOND + 1000), "nothing is due"
    sampler.look(2 * SECOND)
    assert sampler.pool_share == 0.5
    pool.values["stalled"], vip.values["stalled"] = SECOND, SECOND // 4
    call.cgroup.values["moved"] = 3000
    assert sampler.look(3 * SECOND)
    assert sampler.share_of("vip") == 0.25 and sampler.share_of("other") == 0.0
    (view,) = sampler.calls
    assert view.bytes_per_s == 3000 and view.held_usec is None
    call.disks.held_since_usec = 3 * SECOND
    lowered["c"] = call
    assert sampler.look(5 * SECOND), "what is held back is looked at without pressure as well"
    assert sampler.calls[0].held_usec == 2 * SECOND
    call.disks.held_since_usec = None
    sampler.look(6 * SECOND)
    assert not lowered


def test_adopted_sessions_wait_for_disks_although_the_pool_does_not() -> None:
    """Cgroups that lie beside the pool's: its file says nothing of them."""
    files = {"vip": Files(stalled=0), "box": Files(stalled=0), "own": Files(stalled=0)}
    priorities = {"vip": 80, "box": 50, "own": 80}
    sessions: list[Any] = [
        SimpleNamespace(
            id=name,
            cgroup=files[name],
            adopted=name != "own",
            limits=SimpleNamespace(priority=priorities[name]),
        )
        for name in files
    ]
    sampler = IoSampler(Files(stalled=0), {}, lambda: sessions, lambda: shipped("default"), {})  # type: ignore[arg-type]
    sampler.look(SECOND)
    files["vip"].values["stalled"], files["box"].values["stalled"] = SECOND // 4, SECOND // 2
    sampler.look(2 * SECOND)
    assert sampler.share_of("vip") == 0.25
    assert sampler.pool_share == 0.5, "the one that waits most"
    assert files["own"].reads == 0, "nobody in the pool waits"


def test_a_policy_that_does_not_ask_costs_nothing() -> None:
    pool = Files(stalled=0)
    sampler = IoSampler(pool, {}, list, Policy, {})  # type: ignore[arg-type]
    assert not sampler.look(SECOND) and pool.reads == 0


def test_a_kernel_without_pressure_is_told_apart() -> None:
    sampler = IoSampler(Files(), {}, list, lambda: shipped("default"), {})  # type: ignore[arg-type]
    assert not sampler.look(SECOND)
    assert sampler.pool_share is None


def test_all_devices_count() -> None:
    assert bytes_moved("8:0 rbytes=1 wbytes=2 rios=9 wios=9\n8:16 rbytes=4 wbytes=8\n") == 15


def test_what_is_held_stays_within_the_grant_and_is_put_back() -> None:
    call = a_call(Files(), io_write_max="1000")
    assert disks.hold(call, 5000) and call.disks.held_devices == ("8:0", "8:16")
    disks.let_go(call)
    assert [text for _, text in call.cgroup.written] == [
        "8:0 rbps=5000 wbps=1000",
        "8:16 rbps=5000 wbps=1000",
        "8:0 rbps=max wbps=1000",
        "8:16 rbps=max wbps=1000",
    ]
    assert not call.disks.is_lowered


def test_a_lowered_weight_is_put_back() -> None:
    call = a_call(Files())
    assert disks.lower_weight(call, 10) and call.disks.is_lowered
    disks.restore_weight(call)
    assert [value for _, value in call.cgroup.written] == [20, 200]


def test_what_a_killed_daemon_had_lowered_is_as_granted_again() -> None:
    call = a_call(Files())
    disks.take_up(call)
    assert call.cgroup.written == [("io.weight", 200), ("io.max", "8:0 rbps=max wbps=max")]
