"""How the daemon stops its parts, and what becomes of it when one of them fails."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd import stopping
from agentcgroupd.config import ServerConfig
from agentcgroupd.running import PartFailed, Running, rest_after


def running(compare_forever: Any) -> Running:
    """A daemon whose only work is `compare_forever`."""
    nothing: Any = SimpleNamespace()
    files = SimpleNamespace(compare_forever=compare_forever, reload_quietly=lambda: None)
    parts: Any = SimpleNamespace(
        calls=nothing,
        notices=SimpleNamespace(metrics=nothing),
        policy_files=files,
    )
    server = ServerConfig(metrics_address="")

    async def look_forever() -> None:
        await asyncio.Event().wait()

    disks: Any = SimpleNamespace(limits_forever=look_forever, rooms_forever=look_forever)
    return Running(parts, nothing, nothing, nothing, nothing, nothing, nothing, disks, server)


def test_a_part_that_fails_ends_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise ZeroDivisionError("of a part")

    with pytest.raises(PartFailed) as caught:
        asyncio.run(running(fail).until_stopped())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_every_part_and_is_no_failure(number: int) -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    async def run() -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        served = running(work)
        served.listen_to_signals()
        await served.until_stopped()
        assert len(asyncio.all_tasks()) == 1, "nothing goes on but this"

    asyncio.run(run())
    assert ended == ["work"]


def test_a_part_that_does_not_stop_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stopping, "STOP_MOST_S", 0.05)
    stopped: list[str] = []

    async def never() -> None:
        await asyncio.Event().wait()

    async def at_once() -> None:
        stopped.append("at once")

    async def wrong() -> None:
        raise OSError("cannot")

    async def run() -> None:
        await stopping.bounded("the stuck part", never)
        await stopping.bounded("the good part", at_once)
        with pytest.raises(OSError, match="cannot"):
            await stopping.bounded("the wrong part", wrong)

    asyncio.run(run())
    assert stopped == ["at once"]
    assert [r.getMessage() for r in caplog.records] == [
        "the stuck part did not stop within 0.05 s: the daemon ends without it"
    ]


@pytest.mark.parametrize(("took_s", "rest_s"), [(0.0, 10.0), (0.1, 20.0), (30.0, 60.0)])
def test_what_takes_long_is_done_less_often_up_to_a_bound(took_s: float, rest_s: float) -> None:
    assert rest_after(took_s, 10.0, 60.0) == pytest.approx(rest_s)
