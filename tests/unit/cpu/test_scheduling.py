"""The daemon's part of CPU scheduling, with a scheduler that ends when it is told to."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.bpf import abi, features, sched
from agentcgroupd.bpf.sched import Ending, SchedSettings
from agentcgroupd.config import CpuConfig
from agentcgroupd.cpu import scheduling
from agentcgroupd.cpu.scheduling import CpuScheduling, set_policy
from agentcgroupd.errors import BpfError
from agentcgroupd.policy.schema import Policy
from agentcgroupd.telemetry.metrics import Metrics

POOL: Any = SimpleNamespace(controllers=("cpu", "memory"), cgroup=SimpleNamespace(id=1))
STALL = Ending(1026, 0, "runnable task stall", "sh[7] failed to run for 30.1s")


@dataclass
class FakeScheduler:
    """Keeps what it is told."""

    settings: SchedSettings
    attach_errno: int = 0
    ended: Ending | None = None
    is_closed: bool = False
    described: dict[int, tuple[abi.CgroupKind, int, int]] = field(default_factory=dict)
    control: Any = field(default_factory=abi.SchedControl)

    def attach(self) -> None:
        """Fail if that was asked for."""
        if self.attach_errno:
            raise BpfError("attaching", self.attach_errno)

    def ending(self) -> Ending | None:
        """The ending that was asked for."""
        return self.ended

    def close(self) -> None:
        """Noted."""
        self.is_closed = True

    def describe(self, cgroup: int, kind: abi.CgroupKind, cap: int, permille: int) -> bool:
        """Noted."""
        self.described[cgroup] = (kind, cap, permille)
        return True

    def numbers(self, cgroup: int) -> None:
        """Know no cgroup."""


@dataclass
class Kernel:
    """Loads them; `next_errno`: what becomes of the loads to come."""

    loaded: list[FakeScheduler] = field(default_factory=list)
    next_errno: int = 0
    attach_errno: int = 0
    loads: list[float] = field(default_factory=list)

    def load(self, settings: SchedSettings, *_: Any) -> FakeScheduler:
        """Stand in for Scheduler.load."""
        self.loads.append(time.monotonic())
        if self.next_errno:
            raise BpfError("loading sched", self.next_errno)
        self.loaded.append(FakeScheduler(settings, self.attach_errno))
        return self.loaded[-1]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel that has what the scheduler needs."""
    made = Kernel()
    (definition,) = features.definitions_of(sched.OBJECT)
    works = replace(features.missing(definition, ""), works=True)
    monkeypatch.setattr(sched, "gate", lambda: works)
    monkeypatch.setattr(sched, "running", lambda: "agentcg")
    monkeypatch.setattr(sched.Scheduler, "load", made.load)
    return made


def make(pool: Any = POOL, *sessions: Any, **config: Any) -> CpuScheduling:
    """Make one that is not opened yet."""
    return CpuScheduling(
        CpuConfig(**config), None, Metrics(), lambda: Policy().cpu, pool, lambda: sessions
    )


def opened(kernel: Kernel, **config: Any) -> tuple[CpuScheduling, FakeScheduler]:
    """Attached."""
    scheduling = make(**config)
    assert scheduling.open(5, True).works
    return scheduling, kernel.loaded[-1]


def test_the_settings_are_the_configuration(kernel: Kernel) -> None:
    scheduling, fake = opened(kernel, slice="2ms", wait_max="1s", penalty_most=3, exec_hold="30ms")
    assert fake.settings.exec_hold_usec == 30_000
    assert (fake.settings.slice_usec, fake.settings.wait_max_usec) == (2000, 1_000_000)
    assert fake.settings.penalty_most == 3 and scheduling.penalizes
    scheduling.close()
    assert fake.is_closed and not scheduling.penalizes


@pytest.mark.parametrize(
    ("config", "pool", "enabled", "reason"),
    [
        ({"scheduler": "off"}, POOL, True, "cpu.scheduler"),
        ({}, POOL, False, "bpf.enabled"),
        ({}, SimpleNamespace(controllers=("memory",)), True, "no cpu controller"),
    ],
)
def test_without_it_the_reason_is_said(
    kernel: Kernel, config: dict[str, Any], pool: Any, enabled: bool, reason: str
) -> None:
    scheduling = make(pool, **config)
    state = scheduling.open(None, enabled)
    assert not state.works and reason in state.reason and not kernel.loads
    assert scheduling.numbers(POOL.cgroup.id) is None and not scheduling.penalizes
    scheduling.check()


def test_without_memory_programs_nobody_is_penalized(kernel: Kernel) -> None:
    scheduling = make()
    assert scheduling.open(None, True).works and not scheduling.penalizes
    scheduling, _ = opened(kernel, penalty_most=1)
    assert not scheduling.penalizes


def test_another_scheduler_that_came_first_is_named(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sched, "running", lambda: "rusty")
    kernel.attach_errno = errno.EBUSY
    state = make().open(None, True)
    assert not state.works and "another sched_ext scheduler runs here: rusty" in state.reason
    assert kernel.loaded[0].is_closed


def test_it_is_tried_again_ever_later_and_then_no_more(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        scheduling, first = opened(kernel, retries=3, retry_after="20ms")
        scheduling.check()
        assert scheduling.failures == 0
        first.ended = STALL
        scheduling.check()
        assert first.is_closed and not scheduling.state.works
        assert STALL.sentence in scheduling.state.reason
        kernel.next_errno = errno.EPERM
        await asyncio.sleep(0.4)
        scheduling.check()
        assert scheduling.failures == 4 and len(kernel.loads) == 4
        scheduling.close()

    asyncio.run(run())
    waits = [b - a for a, b in zip(kernel.loads[1:], kernel.loads[2:], strict=False)]
    assert 0.04 <= waits[0] < 0.08 <= waits[1] < 0.2
    assert "not tried again: it failed 4 times" in caplog.text


def test_failures_of_long_ago_are_forgotten(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        scheduling, first = opened(kernel, retries=1, retry_after="10ms")
        first.ended = STALL
        scheduling.check()
        assert scheduling.failures == 1
        await asyncio.sleep(0.2)
        second = kernel.loaded[-1]
        assert second is not first
        monkeypatch.setattr("agentcgroupd.cpu.scheduling.GOOD_S", 0.0)
        second.ended = STALL
        scheduling.check()
        assert scheduling.failures == 1
        scheduling.close()

    asyncio.run(run())


def empty_call(priority: int) -> Any:
    """A call that no process has entered, in cgroup 12."""
    grant = SimpleNamespace(priority=priority)
    return SimpleNamespace(cgroup=SimpleNamespace(id=12), grant=grant, entered=False)


def test_when_it_is_back_it_is_told_of_what_is_there(kernel: Kernel) -> None:
    leaf = SimpleNamespace(id=11, procs=lambda: [], children=lambda: [])
    session: Any = SimpleNamespace(
        cgroup=SimpleNamespace(id=10),
        agent=leaf,
        calls={"c": empty_call(priority=50)},
        limits=SimpleNamespace(priority=90),
    )

    async def run() -> None:
        scheduling = make(POOL, session, retry_after="1ms")
        scheduling.open(5, True)
        kernel.loaded[0].ended = STALL
        scheduling.check()
        await asyncio.sleep(0.2)
        assert scheduling.state.works and len(kernel.loaded) == 2
        scheduling.close()

    asyncio.run(run())
    boost, refill = CpuConfig().boost, CpuConfig().boost_refill_percent * 10
    for fake in kernel.loaded:
        assert fake.described == {
            10: (abi.CgroupKind.SESSION, 8 * boost, min(1000, 8 * refill)),
            11: (abi.CgroupKind.AGENT, 2 * boost, 2 * refill),
            12: (abi.CgroupKind.CALL, boost, refill),
        }


def test_a_batch_call_has_no_budget(kernel: Kernel) -> None:
    scheduling, fake = opened(kernel)
    scheduling.call_opened(empty_call(priority=20))
    assert fake.described == {12: (abi.CgroupKind.CALL, 0, 0)}


def test_the_policy_of_every_thread_is_set_and_others_are_kept() -> None:
    """The process is this very one: SCHED_BATCH is for anyone."""
    started, done = threading.Barrier(3), threading.Event()
    found: list[int] = []

    def work(idle: bool) -> None:
        if idle:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        started.wait()
        done.wait()
        found.append(os.sched_getscheduler(0))

    threads = [threading.Thread(target=work, args=(idle,)) for idle in (False, True)]
    for thread in threads:
        thread.start()
    started.wait()
    others = len(os.listdir("/proc/self/task")) - 3
    try:
        assert set_policy(os.getpid(), os.SCHED_BATCH, scheduling.OURS) == 2 + others
        assert set_policy(os.getpid(), os.SCHED_BATCH, scheduling.OURS) == 0
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    finally:
        done.set()
        set_policy(os.getpid(), os.SCHED_OTHER, (os.SCHED_BATCH,))
        for thread in threads:
            thread.join()
    assert sorted(found) in ([os.SCHED_BATCH, os.SCHED_IDLE], [os.SCHED_OTHER, os.SCHED_IDLE])
    assert set_policy(2**22 - 1, os.SCHED_BATCH) == 0, "no such process"
