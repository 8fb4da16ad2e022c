"""Calls that grow slowly, side by side, until the pool could hold none of them to its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentcgroupd.policy.load import load_policy
from tests.unit.guard.herd_model import MIB, Machine
from tests.unit.guard.test_herd import made_up_clock
from tests.unit.guard.test_loop import run_in_made_up_time

__all__ = ["made_up_clock"]
POOL_MIB = 196
EACH_MIB = 115
"""Two of them do not fit. No call is taken to reach more (headroom.leader_most)."""


def side_by_side(
    tmp_path: Path, mib_per_s: tuple[int, ...], priorities: tuple[int, ...], apart_s: float
) -> Machine:
    """So many calls, which begin so long after one another; returns the machine at their end."""

    async def run() -> Machine:
        machine = Machine(load_policy(None, None).policy, POOL_MIB * MIB, tmp_path)
        for number, (rate, priority) in enumerate(zip(mib_per_s, priorities, strict=True)):
            call = machine.begin(f"g{number}", EACH_MIB * MIB, 0.5, priority=priority)
            machine.of(call).bytes_per_s = rate * MIB
            machine.of(call).began_s = machine.loop.time()
            await machine.run(machine.loop.time() + apart_s)
        await machine.run(machine.loop.time() + 100)
        machine.guard.stop()
        return machine

    return run_in_made_up_time(run())


@pytest.mark.parametrize("priorities", [(80, 50), (50, 80), (50, 50)])
@pytest.mark.parametrize("mib_per_s", [(15, 15), (15, 20), (20, 15), (5, 40), (40, 5), (300, 300)])
@pytest.mark.parametrize("apart_s", [0.0, 0.1, 0.5])
def test_all_end_well(
    tmp_path: Path, mib_per_s: tuple[int, int], priorities: tuple[int, int], apart_s: float
) -> None:
    machine = side_by_side(tmp_path, mib_per_s, priorities, apart_s)
    assert not machine.calls and machine.killed == 0 and machine.limit_hit == 0
