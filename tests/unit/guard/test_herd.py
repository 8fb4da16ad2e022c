"""Calls that begin to grow at the same moment, under the real guard on a modelled machine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentcgroupd.policy.load import load_policy
from agentcgroupd.policy.schema import Policy
from tests.unit.guard.herd_model import GIB, MIB, Machine
from tests.unit.guard.test_loop import run_in_made_up_time

HOLD_S = 1.5
CLOCKS = ("guard.credit", "guard.sampler", "enforce.pause", "enforce.actions")


@pytest.fixture(autouse=True)
def made_up_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> int:
        return int(asyncio.get_running_loop().time() * 1e6) + 1_000_000

    for module in CLOCKS:
        monkeypatch.setattr(f"agentcgroupd.{module}.boottime_usec", now)


def herd(
    tmp_path: Path,
    count: int,
    each_mib: int,
    pool_gib: int,
    *,
    in_kernel: bool = False,
    stopped_s: float = 0.0,
    policy: Policy | None = None,
    has_credit: bool = True,
) -> tuple[Machine, float]:
    """So many calls that begin to grow after a while, beside an important one; returns the machine
    when all have ended, and the seconds that took."""

    async def run() -> tuple[Machine, float]:
        chosen = policy or load_policy(None, None).policy
        machine = Machine(chosen, pool_gib * GIB, tmp_path, has_credit)
        calls = [
            machine.begin(f"g{i}", each_mib * MIB, HOLD_S, in_kernel=in_kernel)
            for i in range(count)
        ]
        calls.append(machine.begin("vip", 500 * MIB, HOLD_S, priority=80))
        await machine.run(1.5)
        began_s = machine.loop.time()
        for call in calls:
            machine.of(call).began_s = began_s
        if stopped_s:
            machine.stop_daemon()
            await machine.run(began_s + stopped_s)
            machine.continue_daemon()
        await machine.run(began_s + 200)
        machine.guard.stop()
        return machine, machine.loop.time() - began_s

    return run_in_made_up_time(run())


def best_s(count: int, each_mib: int, pool_gib: int) -> float:
    """The time if the pool were always full of calls that are not held up."""
    alone_s = HOLD_S + each_mib / 2048
    return -(-count * each_mib // (pool_gib << 10)) * alone_s


@pytest.mark.parametrize(
    ("count", "each_mib", "pool_gib", "in_kernel", "most"),
    [(100, 200, 8, False, 1.5), (20, 400, 4, True, 1.8)],
)
def test_a_herd_ends_well_in_little_more_than_the_best_time(
    tmp_path: Path, count: int, each_mib: int, pool_gib: int, in_kernel: bool, most: float
) -> None:
    machine, seconds = herd(tmp_path, count, each_mib, pool_gib, in_kernel=in_kernel)
    best = best_s(count, each_mib, pool_gib)
    print(f"{seconds:.2f} s, best {best:.2f}, peak {machine.peak_bytes / GIB:.2f} GiB")
    assert not machine.calls and machine.killed == 0 and machine.limit_hit == 0
    assert seconds <= most * best


def test_a_stopped_daemon_costs_the_pool_nothing(tmp_path: Path) -> None:
    """With credit; without, the same calls take all there is before anybody looks."""
    machine, _ = herd(tmp_path, 50, 400, 8, stopped_s=5.0)
    assert not machine.calls and machine.killed == 0 and machine.limit_hit == 0
    without, _ = herd(tmp_path, 50, 400, 8, stopped_s=5.0, has_credit=False)
    assert without.limit_hit > 0


def test_a_paused_call_that_needs_no_more_runs_to_its_end(tmp_path: Path) -> None:
    """The call ends before the one that goes first, though all that is free is kept for that."""

    async def run() -> tuple[Machine, dict[str, float], bool]:
        machine = Machine(load_policy(None, None).policy, GIB, tmp_path)
        sizes = {"rests": 300 * MIB, "first": 640 * MIB, "done": 40 * MIB}
        for name, size in sizes.items():
            call = machine.begin(name, size, 60.0 if name == "rests" else 1.0)
            machine.of(call).bytes_per_s = 40 * MIB
            machine.of(call).began_s = machine.loop.time()
            await machine.run(machine.loop.time() + (10.0 if name == "rests" else 5.0))
        ended, was_paused = dict[str, float](), False
        while machine.calls and machine.loop.time() < 100:
            before = set(machine.calls)
            done = machine.calls.get("done")
            was_paused |= done is not None and machine.of(done).frozen
            machine.step()
            await asyncio.sleep(0.002)
            ended |= dict.fromkeys(before - set(machine.calls), machine.loop.time())
        machine.guard.stop()
        return machine, ended, was_paused

    machine, ended, was_paused = run_in_made_up_time(run())
    print(ended, was_paused, machine.peak_bytes / MIB)
    assert machine.killed == 0 and machine.limit_hit == 0
    assert was_paused and ended["done"] < ended["first"] < ended["rests"]
