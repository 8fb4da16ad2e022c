"""What the default policy leaves an important call of a disk beside ten that write without end, on
a model of a disk on which requests wait in the order in which they came."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentcgroupd.guard.io_sampler import EVERY_USEC
from agentcgroupd.policy.engine import decide
from agentcgroupd.policy.snapshot import TICK, Action, CallIo, Host, State
from tests.unit.policy.test_engine import call, session, shipped, snapshot

MIB = 1 << 20
MOST = 1.1
HOGS, WORK_S = 10, 30.0
OUTSTANDING = {"vip": MIB // 8, **{f"hog{n}": MIB for n in range(HOGS)}}
"""Bytes that each has asked for at a time."""
POLICY = shipped("default")


def shares(disk: float, held: dict[str, float]) -> dict[str, float]:
    """Bytes a second that each has: in proportion to what it has asked for, and no more than it is
    held to."""
    found: dict[str, float] = {}
    while True:
        free = disk - sum(found.values())
        asks = {name: size for name, size in OUTSTANDING.items() if name not in found}
        fair = {name: free * size / sum(asks.values()) for name, size in asks.items()}
        over = {name: held[name] for name in asks if held.get(name, disk) < fair[name]}
        if not over:
            return {**found, **fair}
        found |= over


def seconds_beside_hogs(disk: float, host: Host) -> float:
    """Let the policy decide as often as disks are looked at. Weights, where there are any, change
    nothing. Returns how long the important call takes for what it does in WORK_S alone."""
    weights: dict[str, int] = {}
    held: dict[str, float] = {}
    since: dict[str, int] = {}
    state, now_usec, done = State(), 0, 0.0
    while done < WORK_S * disk:
        rates = shares(disk, held)
        left_s = (WORK_S * disk - done) / rates["vip"]
        if left_s * 1e6 <= EVERY_USEC:
            return now_usec / 1e6 + left_s
        now_usec += EVERY_USEC
        done += rates["vip"] * EVERY_USEC / 1e6
        hogs = (name for name in rates if name != "vip")
        base = snapshot(call("any"), free=900, now_usec=now_usec)
        now = replace(
            base,
            sessions=(session("vip", priority=80, io_stalled_share=0.9),),
            io_stalled_share=0.95,
            io_calls=tuple(
                CallIo(
                    id=name,
                    name=name,
                    session_id=name,
                    priority=20,
                    bytes_per_s=rates[name],
                    weight_lowered_usec=_age(weights.get(name), now_usec),
                    held_usec=_age(since.get(name), now_usec),
                )
                for name in hogs
            ),
            host=host,
        )
        decided = decide(POLICY, now, TICK, state)
        state = decided.state
        for each in decided.decisions:
            if each.action is Action.IO_MAX:
                held[each.subject], since[each.subject] = float(each.amount), now_usec
            elif each.action is Action.IO_UNMAX:
                del held[each.subject], since[each.subject]
            elif each.action is Action.IO_WEIGHT:
                weights[each.subject] = now_usec
        assert now_usec < 1e6 * 20 * WORK_S, "it does not come to an end"
    raise AssertionError("unreachable")


def _age(since_usec: int | None, now_usec: int) -> int | None:
    return None if since_usec is None else now_usec - since_usec


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("disk_mib", [50, 100, 1000])
def test_it_takes_little_longer_than_alone(disk_mib: int, has_weights: bool) -> None:
    host = Host(has_io_max=True, has_io_weight=has_weights)
    took = seconds_beside_hogs(disk_mib * MIB, host) / WORK_S
    print(f"{disk_mib} MiB/s: {took:.3f} of alone")
    assert took <= MOST


def test_without_the_policy_it_would_take_many_times_as_long() -> None:
    assert shares(100 * MIB, {})["vip"] < 0.02 * 100 * MIB
