"""Sums by day, session and tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField
from agentcgroupd.history import store as module
from agentcgroupd.history.room import Bounds
from agentcgroupd.history.usage import OTHERS, TOOLS_MOST, usages
from agentcgroupd.rpc.past import Past
from tests.unit.history.making import (
    ALPHA,
    BETA,
    DAY_USEC,
    OPENED_USEC,
    WAIT_S,
    bounds,
    ended,
    history_at,
    kept,
    read_only,
    run,
    started,
    written,
)

NOON_USEC = (OPENED_USEC // DAY_USEC - 3) * DAY_USEC + DAY_USEC // 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with calls of two sessions on three days."""
    file = tmp_path / "history.db"
    store = started(file)
    for day in range(3):
        for number, tool in enumerate(("pytest", "make")):
            at = NOON_USEC + day * DAY_USEC
            common: dict[str, Any] = {"name": tool, "began_unix_usec": at}
            store.put(ended(ALPHA, f"a{day}{number}", cpu_usage_usec=1_000_000, **common))
            memory = {"memory_peak_bytes": 1 << 30, "wall_usec": 3_600_000_000}
            verdict = pb.VERDICT_FAILED
            row = ended(BETA, f"b{day}{number}", verdict=verdict, **memory, **common)
            store.put(row)
            store.put(row)
    store.put(ended(ALPHA, "inner", parent_call_id="a00", cpu_usage_usec=5, name="pytest"))
    assert store.close(WAIT_S)
    return file


def sums(path: Path, by: pb.UsageBy.ValueType, **wanted: Any) -> list[tuple[str, int, float, bool]]:
    """Key, calls, CPU time and whether memory was measured."""
    values = {"session": "", "since_usec": 0, "limit": 100, **wanted}
    with read_only(path) as db:
        found = usages(db, by, **values)
    return [
        (u.key, u.sums.calls, u.sums.cpu_usage_usec, u.sums.HasField("memory_byte_seconds"))
        for u in found
    ]


def test_sums_by_session_tool_and_day(path: Path) -> None:
    assert sums(path, pb.USAGE_BY_SESSION) == [
        ("alpha", 7, 6_000_000, False),
        ("beta", 6, 0, True),
    ]
    assert sums(path, pb.USAGE_BY_TOOL, session="alpha") == [
        ("make", 3, 3_000_000, False),
        ("pytest", 4, 3_000_000, False),
    ]
    days = sums(path, pb.USAGE_BY_DAY, session="beta")
    assert [calls for _, calls, _, _ in days] == [2, 2, 2]
    assert [day for day, _, _, _ in days] == sorted((day for day, *_ in days), reverse=True)
    last = sums(path, pb.USAGE_BY_DAY, session="beta", since_usec=NOON_USEC + 2 * DAY_USEC)
    assert last == days[:1]
    assert len(sums(path, pb.USAGE_BY_DAY, limit=1)) == 1


def test_gib_hours_and_calls_that_did_not_end_well(path: Path) -> None:
    with read_only(path) as db:
        found = {u.key: u.sums for u in usages(db, pb.USAGE_BY_SESSION, "", 0, 10)}
    assert found["beta"].memory_byte_seconds == 6 * (1 << 30) * 3600
    assert (found["alpha"].calls_not_ok, found["beta"].calls_not_ok) == (0, 6)


def test_a_session_with_a_thousand_tools_has_few_rows(tmp_path: Path) -> None:
    file = tmp_path / "history.db"
    store = started(file)
    for number in range(1000):
        store.put(ended(ALPHA, f"c{number}", name=f"tool-{number}", cpu_usage_usec=1))
    store.put(ended(BETA, "other", name="tool-999"))
    assert store.close(WAIT_S)
    found = sums(file, pb.USAGE_BY_TOOL, session="alpha", limit=1000)
    assert len(found) == TOOLS_MOST + 1
    assert found[0][:2] == (OTHERS, 1000 - TOOLS_MOST)
    assert sum(calls for _, calls, _, _ in found) == 1000
    assert sums(file, pb.USAGE_BY_TOOL, session="beta") == [("tool-999", 1, 0, False)]


def test_sums_stay_when_calls_go_and_the_oldest_day_goes_when_there_are_too_many(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sums(path, pb.USAGE_BY_SESSION)
    monkeypatch.setattr(module, "KEEP_HOUSE_S", 0.01)
    again = started(path, Bounds(64 << 20, 100, 1))
    for _ in range(20):
        written(again)
    assert again.close(WAIT_S)
    assert kept(path) == []
    assert sums(path, pb.USAGE_BY_SESSION) == before
    monkeypatch.setattr("agentcgroupd.history.room.USAGE_BYTES", (64 << 20) // 8)
    third = started(path, bounds())
    for _ in range(20):
        written(third)
    assert third.close(WAIT_S)
    assert len(sums(path, pb.USAGE_BY_DAY)) == 2


def test_what_is_no_key_is_named(path: Path) -> None:
    async def life() -> None:
        history = history_at(path)
        past = Past(history, lambda _: None, lambda _: False)
        request = pb.ListUsageRequest(by=9)  # type: ignore[arg-type]  # as a peer may send
        with pytest.raises(InvalidField) as refused:
            await past.list_usage("op", request)
        assert (refused.value.field, refused.value.value) == ("by", "9")
        found = await past.list_usage("op", pb.ListUsageRequest(limit=1, since_unix_usec=-5))
        assert [each.key for each in found.usages] == ["alpha"]
        await history.close()

    run(life())
