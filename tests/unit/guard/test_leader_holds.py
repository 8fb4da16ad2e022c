"""An important call that holds its peak, and others that would fill the rest of the pool beside it,
under the real guard on a modelled machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentcgroupd.policy.engine import hold_free_bytes
from agentcgroupd.policy.load import load_policy
from tests.unit.guard.herd_model import MIB, Machine
from tests.unit.guard.test_herd import made_up_clock  # noqa: F401
from tests.unit.guard.test_loop import run_in_made_up_time

LEADER_MIB, OTHERS_MIB, POOL_MIB = 1230, (1010, 790, 610), 2000
POLICY = load_policy(None, None).policy
HELD_S = 5.0


@pytest.mark.parametrize("mib_per_s", [500, 2000])
def test_nobody_is_ended_while_the_leader_holds_its_peak_and_it_keeps_its_room(
    tmp_path: Path, mib_per_s: int
) -> None:
    """Two of the calls never fit into the pool together. The leader rests when the others begin."""
    highest = 0.0

    async def run() -> Machine:
        nonlocal highest
        machine = Machine(POLICY, POOL_MIB * MIB, tmp_path)
        vip = machine.begin("vip", LEADER_MIB * MIB, 2 * HELD_S, priority=80)
        others = [machine.begin(f"c{mib}", mib * MIB, 0.5) for mib in OTHERS_MIB]
        for call in (vip, *others):
            machine.of(call).bytes_per_s = mib_per_s * MIB
        machine.of(vip).began_s = machine.loop.time()
        await machine.run(machine.loop.time() + LEADER_MIB / mib_per_s + HELD_S)
        for call in others:
            machine.of(call).began_s = machine.loop.time()
        ends_s = machine.loop.time() + HELD_S - 1
        while machine.loop.time() < ends_s:
            await machine.run(machine.loop.time() + 0.01)
            highest = max(highest, machine.used())
        assert machine.of(vip).full_s is not None and not machine.ended
        await machine.run(machine.loop.time() + 60)
        machine.guard.stop()
        return machine

    machine = run_in_made_up_time(run())
    assert not machine.calls and machine.killed == 0 and machine.limit_hit == 0
    limit = POOL_MIB * MIB
    assert highest <= limit - 0.75 * hold_free_bytes(POLICY, limit)


@pytest.mark.parametrize(("priority", "most"), [(80, 2), (50, 100)])
def test_an_important_call_asks_once_however_it_grows(
    tmp_path: Path, priority: int, most: int
) -> None:
    """Calls grow in bursts of 100 MiB, half a second apart; others have to ask for each."""
    asked = 0

    async def run() -> None:
        nonlocal asked
        machine = Machine(POLICY, 2 * POOL_MIB * MIB, tmp_path)
        call = machine.begin("call", 900 * MIB, 1.0, priority=priority)
        grows = machine.of(call)
        grows.bytes_per_s = 1000 * MIB
        bounds = {grows.high}
        for _ in range(8):
            grows.began_s = machine.loop.time()
            await machine.run(machine.loop.time() + 0.1)
            grows.began_s = None
            bounds.add(grows.high)
            await machine.run(machine.loop.time() + 0.5)
            bounds.add(grows.high)
        asked = len(bounds) - 1
        machine.guard.stop()

    run_in_made_up_time(run())
    assert asked <= most
    assert priority == 80 or asked > 8
