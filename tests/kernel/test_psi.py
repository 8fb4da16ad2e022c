"""PSI triggers on this kernel, for CPU pressure: two processes more than CPUs make it."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from agentcgroupd.cgroup.knobs import Knob, parse_pressure
from agentcgroupd.cgroup.psi import PressureTrigger
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.errors import CgroupGone, KnobError
from tests.harness import SLOW

pytestmark = pytest.mark.psi

CPU_PRESSURE = Knob("cpu.pressure", parse_pressure)
WINDOW_USEC = 2_000_000
"""The kernel takes only multiples of this without CAP_SYS_RESOURCE."""


@pytest.fixture
def leaf() -> Iterator[Cgroup]:
    """A cgroup of our own."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    if not made.has(CPU_PRESSURE):
        made.remove()
        pytest.skip("this kernel has no PSI")
    yield made
    made.kill_and_remove()
    root.close()


@pytest.fixture
def busy(leaf: Cgroup) -> Iterator[None]:
    """More busy processes than CPUs in the cgroup."""
    count = len(os.sched_getaffinity(0)) + 2
    started = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        for process in started:
            leaf.attach(process.pid)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Let the loop run until `condition` holds."""
    deadline = time.monotonic() + timeout_s * SLOW
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.01)


def test_it_fires_once_a_window_while_tasks_stall(leaf: Cgroup, busy: None) -> None:
    async def run() -> None:
        fired: list[float] = []

        def on_fire() -> None:
            fired.append(time.monotonic())

        trigger = PressureTrigger(leaf, "some", 50_000, WINDOW_USEC, on_fire, CPU_PRESSURE)
        trigger.start()
        await until(lambda: len(fired) >= 3, 20)
        trigger.stop()
        gaps = [b - a for a, b in itertools.pairwise(fired)]
        assert min(gaps) > WINDOW_USEC / 1e6 * 0.5, gaps
        assert trigger.fired == len(fired)
        count = len(fired)
        await asyncio.sleep(WINDOW_USEC / 1e6 * 1.2)
        assert len(fired) == count, "it fired after stop"
        trigger.stop()

    asyncio.run(run())


def test_it_is_silent_while_nobody_stalls(leaf: Cgroup) -> None:
    async def run() -> None:
        fired: list[None] = []
        calls = 0

        def on_fire() -> None:
            fired.append(None)

        trigger = PressureTrigger(leaf, "some", 50_000, WINDOW_USEC, on_fire, CPU_PRESSURE)
        original = trigger._ready

        def ready() -> None:
            nonlocal calls
            calls += 1
            original()

        trigger._ready = ready  # type: ignore[method-assign]
        trigger.start()
        await asyncio.sleep(WINDOW_USEC / 1e6 * 1.2)
        trigger.stop()
        assert not fired and calls == 0

    asyncio.run(run())


def test_two_triggers_on_one_file_do_not_disturb_each_other(leaf: Cgroup, busy: None) -> None:
    async def run() -> None:
        triggers = [
            PressureTrigger(leaf, "some", stall, WINDOW_USEC, lambda: None, CPU_PRESSURE)
            for stall in (20_000, 100_000)
        ]
        for trigger in triggers:
            trigger.start()
        await until(lambda: all(t.fired >= 2 for t in triggers), 20)
        for trigger in triggers:
            trigger.stop()

    asyncio.run(run())


def test_a_cgroup_that_goes_away_ends_its_trigger(leaf: Cgroup) -> None:
    async def run() -> None:
        child = leaf.make_child("x")
        cpu, nothing = CPU_PRESSURE, lambda: None
        trigger = PressureTrigger(child, "some", 50_000, WINDOW_USEC, nothing, cpu)
        before = len(os.listdir("/proc/self/fd"))
        trigger.start()
        child.remove()
        await until(lambda: len(os.listdir("/proc/self/fd")) == before)
        assert trigger.fired == 0
        with pytest.raises(CgroupGone):
            trigger.start()

    asyncio.run(run())


@pytest.mark.parametrize("window_usec", [0, 10_000_001])
def test_a_window_that_the_kernel_does_not_take_is_an_error(leaf: Cgroup, window_usec: int) -> None:
    async def run() -> None:
        before = len(os.listdir("/proc/self/fd"))
        trigger = PressureTrigger(leaf, "full", 1000, window_usec, lambda: None)
        with pytest.raises(KnobError) as caught:
            trigger.start()
        assert caught.value.errno == errno.EINVAL
        assert f"full 1000 {window_usec}" in str(caught.value)
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(run())
