"""How often the guard looks, on a running loop with made-up readings."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from agentcgroupd.config import GuardConfig
from agentcgroupd.guard.loop import CALM_INTERVAL_S, Guard
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Snapshot

GIB = 1 << 30
LIMIT = 8 * GIB
POLICY = Policy.model_validate(
    {
        "headroom": {"prior": "2G"},
        "rulesets": [
            {
                "name": "freeze",
                "when": [
                    {"detector": "pool_free", "below": "5%", "until": "10%", "keep_room": True}
                ],
                "do": {"action": "freeze"},
            }
        ],
    }
)


class Readings:
    """Stands for the pool: what it uses, and how often it was looked at."""

    limit_bytes = LIMIT

    def __init__(self, used: int) -> None:
        self.used = used
        self.looks = 0

    def usage(self) -> int:
        self.looks += 1
        return self.used

    def look(self, usage: int) -> Snapshot:
        return Snapshot(now_usec=1, limit_bytes=LIMIT, usage_bytes=usage, growth_bytes_per_s=0.0,
                        calls=())  # fmt: skip


def looks(free: int, calls: int, *, begin: int = 0, run_s: float = 0.2) -> int:
    """How often it looks within this time, with so many calls open, or beginning after the first
    look."""

    async def run() -> int:
        readings = Readings(LIMIT - free)
        opened: dict[str, Any] = {str(i): None for i in range(calls)}
        known: Any = SimpleNamespace(open=opened, actions=None)
        looker: Any = readings
        guard = Guard(GuardConfig(), POLICY, looker, known, {})
        guard.start(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        for i in range(begin):
            opened[str(i)] = None
            guard.call_began()
        await asyncio.sleep(run_s)
        guard.stop()
        return readings.looks

    assert run_s < CALM_INTERVAL_S
    return asyncio.run(run())


def test_nobody_to_look_at() -> None:
    assert looks(3 * GIB, 0) == 1


def test_with_little_beside_what_a_call_may_take_it_looks_at_every_tick() -> None:
    assert looks(int(2.6 * GIB), 1) >= 4


def test_with_much_free_it_does_not() -> None:
    assert looks(LIMIT, 1) == 1


def test_many_may_grow_at_once() -> None:
    assert looks(4 * GIB, 1) == 1
    assert looks(4 * GIB, 500) >= 2


def test_a_call_that_begins_brings_the_next_look_forward() -> None:
    assert looks(int(2.6 * GIB), 0, begin=1) >= 4
    assert looks(LIMIT, 0, begin=50) == 1
