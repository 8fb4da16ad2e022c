"""How often the guard samples the pool, on a running loop with made-up readings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

from agentcgroupd.config import GuardConfig
from agentcgroupd.guard.loop import GuardLoop
from agentcgroupd.policy.schedule import CALM_INTERVAL_S
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Snapshot

T = TypeVar("T")
GIB = 1 << 30
LIMIT = 8 * GIB


class MadeUpTime(asyncio.SelectorEventLoop):
    """A loop whose clock goes on by exactly what is waited for: a busy machine changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        ready = selector.select

        def select(timeout: float | None) -> Any:
            found = ready(0)
            if not found and timeout:
                self._now_s += timeout
            return found

        selector.select = select

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now_s


def run_in_made_up_time(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end without waiting for anything."""
    with asyncio.Runner(loop_factory=MadeUpTime) as runner:
        return runner.run(work)


def freezing_below(free: str, until: str) -> Policy:
    """A policy that freezes calls when less than `free` is free, until that much is."""
    when = {"detector": "pool_free", "below": free, "until": until, "keep_room": True}
    ruleset = {"name": "freeze", "when": [when], "do": {"action": "freeze"}}
    return Policy.model_validate({"headroom": {"prior": "2G"}, "rulesets": [ruleset]})


POLICY = freezing_below("5%", "10%")


class Readings:
    """Stands for the pool: what it uses, and how often that was read."""

    limit_bytes = LIMIT

    def __init__(self, used: int) -> None:
        self.used = used
        self.samples = 0

    def usage(self) -> int:
        self.samples += 1
        return self.used

    def active(self) -> list[Any]:
        return []

    def sample(self, usage: int) -> Snapshot:
        return Snapshot(
            now_usec=1, limit_bytes=LIMIT, usage_bytes=usage, growth_bytes_per_s=0.0, calls=()
        )


def no_call_waits() -> bool:
    return False


def forget(now: Snapshot) -> None:
    """Do nothing with a snapshot."""


class Mark:
    """Keeps what the loop says of its mark."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int, int] | tuple[str]] = []
        self.usages: list[int] = []
        self.on_passed: Callable[[], None] | None = None

    def start(self, mark_bytes: int, low_bytes: int, on_passed: Callable[[], None]) -> None:
        self.said.append(("start", mark_bytes, low_bytes))
        self.on_passed = on_passed

    def move(self, mark_bytes: int, low_bytes: int) -> None:
        self.said.append(("move", mark_bytes, low_bytes))

    def sampled(self, usage_bytes: int) -> None:
        self.usages.append(usage_bytes)

    def stop(self) -> None:
        self.said.append(("stop",))


def samples(free: int, calls: int, *, begin: int = 0, run_s: float = 0.2) -> int:
    """How often it samples within this time, with so many calls open, or beginning after the first
    sample."""

    async def run() -> int:
        readings = Readings(LIMIT - free)
        running = SimpleNamespace(frozen_since_usec=None)
        opened: dict[str, Any] = {str(i): running for i in range(calls)}
        known: Any = SimpleNamespace(open=opened, actions=None)
        sampler: Any = readings
        guard = GuardLoop(GuardConfig(), POLICY, sampler, known, {}, no_call_waits, forget, ())
        guard.start()
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        for i in range(begin):
            opened[str(i)] = running
            guard.call_began()
        await asyncio.sleep(run_s)
        guard.stop()
        return readings.samples

    assert run_s < CALM_INTERVAL_S
    return run_in_made_up_time(run())


def test_with_no_call_open_it_samples_seldom() -> None:
    assert samples(3 * GIB, 0) == 1


def test_with_little_beside_what_a_call_may_take_it_samples_at_every_tick() -> None:
    assert samples(int(2.6 * GIB), 1) >= 4


def test_with_much_free_it_does_not() -> None:
    assert samples(LIMIT, 1) == 1


def test_many_may_grow_at_once() -> None:
    assert samples(4 * GIB, 1) == 1
    assert samples(4 * GIB, 500) >= 2


def test_a_call_that_begins_brings_the_next_sample_forward() -> None:
    assert samples(int(2.6 * GIB), 0, begin=1) >= 4
    assert samples(LIMIT, 0, begin=50) == 1


def test_every_mark_follows_the_policy_and_is_taken_away() -> None:
    async def run() -> None:
        readings, marks = Readings(LIMIT // 2), (Mark(), Mark())
        sampler: Any = readings
        known: Any = SimpleNamespace(open={}, actions=None)
        taken: list[Snapshot] = []
        guard = GuardLoop(
            GuardConfig(), POLICY, sampler, known, {}, no_call_waits, taken.append, marks
        )
        guard.start()
        await asyncio.sleep(0.01)
        first = guard.mark_bytes
        before = readings.samples
        for mark in marks:
            assert mark.on_passed is not None
            mark.on_passed()
        assert readings.samples == before + 2, "whoever passes the mark is seen at once"
        guard.change_policy(freezing_below("20%", "30%"))
        second = guard.mark_bytes
        guard.stop()
        assert first != second
        assert len(taken) >= 3 and {snapshot.usage_bytes for snapshot in taken} == {LIMIT // 2}
        for mark in marks:
            assert mark.said == [("start", *first), ("move", *second), ("stop",)]
            assert set(mark.usages) == {LIMIT // 2}

    run_in_made_up_time(run())
