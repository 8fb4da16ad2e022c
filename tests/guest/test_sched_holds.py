"""Where a pause of the CPU scheduler stops a task: on its way back to user space, where it holds no
lock of the kernel's."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentcgroupd.bpf import features
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.bpf.sched import Scheduler
from agentcgroupd.config import GuardConfig
from agentcgroupd.units import CgroupId
from tests.guest.cpu_load import SETTINGS, Load, settled, spin
from tests.harness import patient, wait_until

pytestmark = [
    pytest.mark.controllers,
    pytest.mark.programs,
    pytest.mark.usefixtures("needs_sched_ext"),
]

LIMIT = 0.02
"""Part of a CPU that a slow call may have: it is paused for most of the time."""


@pytest.fixture(scope="module")
def loaded() -> Iterator[Scheduler]:
    """Loaded once for the module, because the verifier takes seconds here."""
    bpf, _ = features.load("memory")
    assert bpf is not None
    memory = MemoryPrograms(bpf, GuardConfig())
    scheduler = Scheduler.load(SETTINGS, memory.states_fd)
    scheduler.attach()
    yield scheduler
    assert scheduler.ending() is None, "the kernel has let go of it"
    scheduler.close()
    memory.close()


def in_the_directory(path: Path) -> None:
    """Make and remove a directory, for ever: nearly all of that is in the kernel, and in the lock
    of the directory around it."""
    while True:
        path.mkdir()
        path.rmdir()


@patient
def test_a_paused_call_holds_no_lock(loaded: Scheduler, tmp_path: Path) -> None:
    """A call without a limit uses the same directory, and does not wait for the other's pauses,
    which take most of the time (up to 4 s of the 8 when these were anywhere)."""
    reader, writer = os.pipe()

    def measure() -> None:
        longest, end = 0.0, time.monotonic() + 8
        while time.monotonic() < end:
            began = time.monotonic()
            (tmp_path / "fast").mkdir()
            (tmp_path / "fast").rmdir()
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.003)
        os.write(writer, str(longest).encode())

    with Load() as load:
        load.make("slow", cpu_max=f"{LIMIT * 100_000:.0f} 100000")
        load.make("fast")
        for i in range(4):
            path = tmp_path / f"slow{i}"
            load.start("slow", lambda path=path: in_the_directory(path))  # type: ignore[misc]
        time.sleep(0.5)
        load.wait(load.start("fast", measure))
        numbers = loaded.numbers(CgroupId(load.id("slow")))
    os.close(writer)
    longest_s = float(os.read(reader, 100))
    os.close(reader)
    assert numbers is not None and numbers.stalled_usec > 2_000_000, "it was paused"
    assert longest_s < 0.2
    assert loaded.control.not_asked == 0


@patient
def test_many_that_wait_in_a_limited_call_keep_nobody_from_a_turn(loaded: Scheduler) -> None:
    """More tasks than a CPU moves at a time, some stopped in the kernel and bound to a CPU by that,
    most not: the queue of such a call is not searched in vain while others wait."""
    with Load() as load:
        load.make("limited", cpu_max="20000 100000")
        for i in range(24):
            load.start("limited", read_zeros if i % 4 == 0 else spin)
        load.make("beside")
        for _ in range(3):
            load.start("beside")
        time.sleep(1)
        used = settled(
            load,
            ["beside", "limited"],
            lambda used, took: used["beside"] / took > 1.6e6 and used["limited"] / took < 230_000,
            3.0,
        )
        numbers = loaded.numbers(CgroupId(load.id("beside")))
    assert numbers is not None and numbers.wait_max_usec < 1_000_000, used
    wait_until("nobody is in a lane", lambda: loaded.control.in_lanes == 0)
    wait_until("nobody waits", lambda: loaded.control.waiting == 0)


def turned(pids: list[int], seconds: float) -> None:
    """Change what CPUs processes may run on, again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for cpus in ({0}, {1}, {0, 1}):
            for pid in pids:
                os.sched_setaffinity(pid, cpus)


@patient
def test_a_helper_frees_nobody_from_a_pause(loaded: Scheduler) -> None:
    """A task that is stopped stays so when another process changes its CPUs."""
    with Load() as load:
        load.make("limited", cpu_max="5000 100000")
        pids = [load.start("limited", read_zeros), load.start("limited")]
        time.sleep(1)
        before, began = load.usage_usec("limited"), time.monotonic()
        turned(pids, 6.0)
        used = (load.usage_usec("limited") - before) / (time.monotonic() - began)
    assert used < 80_000, "5 % of a CPU, and some ticks at the begin"


def populate() -> None:
    """Long system calls, one after another."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    while True:
        mmap.mmap(-1, 4 << 20, flags=private).close()


def read_zeros() -> None:
    """Short ones."""
    zero, buffer = os.open("/dev/zero", os.O_RDONLY), bytearray(1 << 20)
    while True:
        os.readv(zero, [buffer])


@pytest.mark.parametrize("work", [populate, read_zeros])
@patient
def test_cpu_max_is_kept_in_the_kernel(loaded: Scheduler, work: Callable[[], None]) -> None:
    """Calls that are hardly ever in user space when the clock ticks."""

    def is_kept(used: dict[str, int], took: float) -> bool:
        return abs(used["a"] / took / 200_000 - 1) < 0.03

    with Load() as load:
        load.make("a", cpu_max="20000 100000")
        load.start("a", work)
        load.start("a", work)
        load.make("beside")
        load.start("beside")
        time.sleep(1)
        began = time.monotonic()
        used = settled(load, ["a"], is_kept, 2.0, 20.0)
        assert is_kept(used, time.monotonic() - began), used
    assert loaded.control.not_asked == 0
