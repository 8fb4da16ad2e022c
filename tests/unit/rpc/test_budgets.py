"""What all users outside of sessions may have together, whatever number of user ids they have."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agentcgroupd.config import LimitsConfig
from agentcgroupd.errors import ResourceExhausted
from agentcgroupd.rpc.budgets import ALL_FACTOR, STRANGERS, STRANGERS_PART, Budgets
from agentcgroupd.telemetry.metrics import Metrics

LIMITS = LimitsConfig(connections_all=80, attaching=16, streams=8, watchers=2)
USERS = 300


def budgets() -> Budgets:
    return Budgets(LIMITS, 40, Metrics())


def loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Decorate a test that needs an event loop."""

    def run() -> None:
        async def main() -> None:
            await test()

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


class Opened:
    """Connections as a server has them: closing one tells the budgets."""

    def __init__(self, of: Budgets) -> None:
        self.budgets = of
        self.open: dict[int, str] = {}

    def connect(self, key: str) -> None:
        crowd = self.budgets.crowd(key)
        numbers: list[int] = []

        def close() -> None:
            self.open.pop(numbers[0])
            self.budgets.disconnected(crowd, numbers[0])

        numbers.append(self.budgets.connected(crowd, close))
        self.open[numbers[0]] = key

    def of(self, beginning: str) -> int:
        return sum(key.startswith(beginning) for key in self.open.values())


@loop
async def test_users_take_no_connection_from_a_session() -> None:
    opened = Opened(budgets())
    for key in ["session a"] * 30 + ["user 0"] * 20:
        opened.connect(key)
    for uid in range(USERS):
        opened.connect(f"user {100_000 + uid}")
    assert opened.of("session a") == 30 and opened.of("user 0") == 20
    assert opened.of("user 1") == LIMITS.connections_all // STRANGERS_PART
    assert opened.budgets.connections == len(opened.open)


@loop
async def test_where_there_are_too_many_users_go_first() -> None:
    opened = Opened(budgets())
    for uid in range(10):
        opened.connect(f"user {100_000 + uid}")
    for number in range(LIMITS.connections_all):
        opened.connect(f"session {number % 4}")
    assert opened.of("user") == 0 and opened.of("session") == LIMITS.connections_all
    opened.connect("session new")
    assert opened.of("session new") == 1 and opened.budgets.connections == LIMITS.connections_all


@loop
async def test_users_leave_requests_to_sessions() -> None:
    limits = budgets()
    asked = 0
    for uid in range(USERS):
        crowd = limits.crowd(f"user {100_000 + uid}")
        while limits.may_ask(crowd):
            limits.asked(crowd)
            asked += 1
    most = LIMITS.requests_burst * ALL_FACTOR / STRANGERS_PART
    assert most <= asked <= 1.5 * most + 50
    session = limits.crowd("session a")
    for _ in range(LIMITS.requests_burst):
        assert limits.may_ask(session) and limits.may_send(session)
        limits.asked(session)


@loop
async def test_users_share_streams_answers_and_packets() -> None:
    limits = budgets()
    crowds = [limits.crowd(f"user {100_000 + uid}") for uid in range(USERS)]
    opened = 0
    for crowd in crowds:
        try:
            limits.open_stream(crowd, watches=True)
            opened += 1
        except ResourceExhausted as error:
            assert error.sentence.startswith(crowd.key)
    assert opened == LIMITS.watchers * ALL_FACTOR // STRANGERS_PART
    for crowd in crowds:
        if not limits.may_attach(crowd):
            limits.attached(crowd, 1)
    attaching = sum(crowd.attaching for crowd in crowds)
    assert attaching == LIMITS.attaching * ALL_FACTOR // STRANGERS_PART
    limits.answered(crowds[0], LIMITS.answer_bytes_all // STRANGERS_PART + 1)
    with pytest.raises(ResourceExhausted):
        limits.check_answers(crowds[1])
    session = limits.crowd("session a")
    limits.check_answers(session)
    limits.answered(crowds[0], -(LIMITS.answer_bytes_all // STRANGERS_PART + 1))
    limits.open_stream(session, watches=True)
    assert not limits.may_attach(session)
    # What is given back is there again.
    limits.close_stream(crowds[0], watches=True)
    limits.open_stream(crowds[1], watches=True)
    limits.attached(crowds[0], -1)
    assert not limits.may_attach(crowds[-1])


@loop
async def test_paused_users_go_on_one_after_the_other() -> None:
    limits, resumed, all_resumed = budgets(), list[str](), asyncio.Event()

    class Waits:
        def __init__(self, key: str) -> None:
            self.key = key

        def resume(self) -> None:
            resumed.append(self.key)
            limits.asked(limits.crowd(self.key))
            if len(resumed) == 200:
                all_resumed.set()

    first = limits.crowd("user 100000")
    while limits.may_ask(first):
        limits.asked(first)
    for uid in range(200):
        crowd = limits.crowd(f"user {100_000 + uid}")
        limits.pause(crowd, Waits(crowd.key))
    await asyncio.wait_for(all_resumed.wait(), 20)
    assert len(set(resumed)) == 200


@loop
async def test_root_is_no_stranger() -> None:
    limits = budgets()
    for key in ("session a", "user 0", "the daemon"):
        assert limits.crowd(key).turns_key == key
    assert limits.crowd("user 1000").turns_key == f"{STRANGERS}/user 1000"
