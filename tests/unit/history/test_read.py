"""What is asked of the store: pages, filters, and who may see what."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField, NotFound, Unavailable
from agentcgroupd.history import read, reader
from agentcgroupd.history.file import File
from agentcgroupd.history.history import History
from agentcgroupd.history.read import ALL, Scope, Wanted
from agentcgroupd.history.rows import Closed, Entry, Opened, SessionKey
from agentcgroupd.rpc.past import Past
from tests.unit.history.making import (
    ALPHA,
    BETA,
    OPENED_USEC,
    WAIT_S,
    ended,
    history_at,
    kept,
    read_only,
    report,
    run,
    started,
)

EARLIER = SessionKey("alpha", OPENED_USEC - 50_000_000)
"""Another session of the same name, closed before the present one was opened."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with calls of three sessions, two of one name."""
    file = tmp_path / "history.db"
    store = started(file)
    for key in (ALPHA, BETA, EARLIER):
        store.put(Opened(key, pb.Session(id=key.name).SerializeToString()))
    for number in range(10):
        verdict = pb.VERDICT_TIMEOUT if number % 5 == 0 else pb.VERDICT_OK
        for key, prefix in ((ALPHA, "a"), (BETA, "b"), (EARLIER, "e")):
            at = key.opened_usec + number * 1_000_000
            store.put(ended(key, f"{prefix}{number}", verdict=verdict, began_unix_usec=at))
    store.put(Closed(EARLIER, EARLIER.opened_usec + 20_000_000, "done", b""))
    store.put(Entry(ALPHA, "a1", OPENED_USEC, "freeze", '{"why":"room"}'))
    store.put(Entry(ALPHA, "", OPENED_USEC, "slow", '{"why":"stall"}'))
    assert store.close(WAIT_S)
    return file


def numbered(prefix: str, *numbers: int) -> list[str]:
    return [f"{prefix}{number}" for number in numbers]


def test_newest_come_first_and_pages_fit_together(path: Path) -> None:
    assert kept(path, limit=7) == kept(path)
    assert kept(path, session="beta", limit=3) == numbered("b", *range(9, -1, -1))
    both = kept(path, session="alpha", limit=4)
    assert both == numbered("a", *range(9, -1, -1)) + numbered("e", *range(9, -1, -1))


def test_verdicts_and_times_are_filtered(path: Path) -> None:
    timeouts = kept(path, verdicts=(pb.VERDICT_TIMEOUT,))
    assert set(timeouts) == {f"{prefix}{number}" for prefix in "abe" for number in (0, 5)}
    two = (pb.VERDICT_TIMEOUT, pb.VERDICT_OK)
    assert kept(path, session="beta", verdicts=two) == numbered("b", *range(9, -1, -1))
    assert kept(path, verdicts=(pb.VERDICT_OOM_CALL,)) == []
    late = OPENED_USEC + 8_000_000
    assert sorted(kept(path, since_usec=late)) == ["a8", "a9", "b8", "b9"]
    timeout = (pb.VERDICT_TIMEOUT,)
    assert kept(path, session="alpha", verdicts=timeout, limit=1) == ["a5", "a0", "e5", "e0"]


def test_a_session_sees_its_own_calls_alone_and_none_of_one_before_it(path: Path) -> None:
    mine = Scope(ALPHA)
    assert kept(path, mine, limit=3) == numbered("a", *range(9, -1, -1))
    assert kept(path, mine, session="beta") == kept(path, mine), "the name asked for is not heard"
    assert kept(path, mine, verdicts=(pb.VERDICT_TIMEOUT,)) == ["a5", "a0"]
    with read_only(path) as db:
        assert read.report(db, mine, "a1") is not None
        for other in ("b1", "e1", "none"):
            assert read.report(db, mine, other) is None
        assert read.report(db, ALL, "e1") is not None


def test_a_tool_sees_the_calls_inside_its_own(tmp_path: Path) -> None:
    file = tmp_path / "history.db"
    store = started(file)
    for call, outer in (
        ("outer", ""),
        ("in1", "outer"),
        ("in2", "in1"),
        ("beside", ""),
        ("in-open", "still-open"),
    ):
        store.put(ended(ALPHA, call, parent_call_id=outer))
    assert store.close(WAIT_S)
    tool = Scope(ALPHA, ("outer", "still-open"))
    assert sorted(kept(file, tool, limit=2)) == ["in-open", "in1", "in2"]
    with read_only(file) as db:
        for call, seen in (("in2", True), ("in-open", True), ("outer", False), ("beside", False)):
            assert (read.report(db, tool, call) is not None) is seen, call


@pytest.mark.parametrize(("count", "chars"), [(30, 30_000), (600, 100)])
def test_a_page_fits_into_64_kib_whatever_is_in_it(tmp_path: Path, count: int, chars: int) -> None:
    file = tmp_path / "history.db"
    store = started(file)
    for number in range(count):
        at = OPENED_USEC + number
        store.put(ended(ALPHA, f"c{number}", argv=["x" * chars], began_unix_usec=at))
    assert store.close(WAIT_S)
    with read_only(file) as db:
        page, place = read.reports(db, ALL, Wanted(limit=10_000))
    assert place is not None
    size = pb.ListHistoryResponse(reports=page, next_page_token="9" * 40).ByteSize()
    assert size <= 64 << 10
    assert size > 30 << 10
    assert len(kept(file, limit=10_000)) == count


def test_a_report_that_is_larger_by_itself_comes_alone(tmp_path: Path) -> None:
    file = tmp_path / "history.db"
    store = started(file)
    for number in range(3):
        at = OPENED_USEC + number
        store.put(ended(ALPHA, f"c{number}", argv=["x" * 100_000], began_unix_usec=at))
    assert store.close(WAIT_S)
    with read_only(file) as db:
        page, place = read.reports(db, ALL, Wanted(limit=3))
    assert len(page) == 1 and place is not None
    assert kept(file) == ["c2", "c1", "c0"]


QUERIES: list[tuple[Scope, dict[str, Any]]] = [
    (ALL, {}),
    (ALL, {"session": "alpha"}),
    (ALL, {"verdicts": (pb.VERDICT_TIMEOUT,)}),
    (ALL, {"session": "alpha", "verdicts": (pb.VERDICT_TIMEOUT,)}),
    (Scope(ALPHA), {}),
    (Scope(ALPHA), {"verdicts": (pb.VERDICT_TIMEOUT,)}),
]


@pytest.mark.parametrize(("scope", "wanted"), QUERIES)
def test_no_list_sorts_or_reads_all_rows(path: Path, scope: Scope, wanted: dict[str, Any]) -> None:
    """Each is read off an index in its order, from where it begins to where the page ends."""
    plans: list[str] = []

    class Explained:
        def execute(self, sql: str, values: Any) -> list[Any]:
            plans.extend(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values))
            return []

    with read_only(path) as db:
        explained: Any = Explained()
        read.reports(explained, scope, Wanted(**wanted))
    assert any("USING INDEX calls_" in plan for plan in plans), plans
    assert not any(
        "TEMP B-TREE" in plan or plan.startswith("SCAN calls")
        for plan in plans
        if "USING INDEX" not in plan
    ), plans


# Stories, and the questions as they are asked over gRPC


async def asked(path: Path, question: Any) -> Any:
    """What a question to Past is answered with."""
    history = history_at(path)
    try:
        return await question(Past(history, lambda _: None, lambda _: False))
    finally:
        await history.close()


def test_a_story_has_what_was_kept_of_a_call_and_of_its_session(path: Path) -> None:
    told = run(asked(path, lambda past: past.story(ALL, "op", "a1", lambda _: True)))
    assert [step.what for step in told.steps] == ["freeze", "ended"]
    assert told.steps[0].sentence == "It was paused: room"
    told = run(asked(path, lambda past: past.story(Scope(ALPHA), "a", "a0", lambda _: True)))
    assert [step.what for step in told.steps] == ["slow", "ended"]
    assert told.steps[0].sentence.startswith("The whole session: ")


@pytest.mark.parametrize("call", ["b1", "e1", "none"])
def test_nobody_is_told_of_calls_of_others(path: Path, call: str) -> None:
    with pytest.raises(NotFound, match="nothing is known of a call"):
        run(asked(path, lambda past: past.story(Scope(ALPHA), "a", call, lambda _: True)))


@pytest.mark.parametrize("token", ["x", "1", "1.x", "-1.2", "1." + "9" * 30, "9" * 30 + ".1"])
def test_a_token_that_is_none_is_named(path: Path, token: str) -> None:
    request = pb.ListHistoryRequest(page_token=token)
    with pytest.raises(InvalidField) as refused:
        run(asked(path, lambda past: past.list_history(ALL, "op", request)))
    assert (refused.value.field, refused.value.value) == ("page_token", token)


def test_a_verdict_that_is_none_is_named(path: Path) -> None:
    request = pb.ListHistoryRequest(verdicts=[99])  # type: ignore[list-item]  # as a peer may send
    with pytest.raises(InvalidField) as refused:
        run(asked(path, lambda past: past.list_history(ALL, "op", request)))
    assert (refused.value.field, refused.value.value) == ("verdicts", "99")


def test_pages_of_sessions_fit_together(path: Path) -> None:
    async def all_of(past: Past) -> list[tuple[str, bool, int]]:
        request = pb.ListPastSessionsRequest(limit=1)
        found: list[pb.PastSession] = []
        while True:
            page = await past.list_sessions("op", request)
            found += page.sessions
            if not page.next_page_token:
                return [
                    (s.session.id, bool(s.closed_unix_usec), s.sums.calls_not_ok) for s in found
                ]
            request.page_token = page.next_page_token

    assert sorted(run(asked(path, all_of))[:2]) == [("alpha", False, 2), ("beta", False, 2)]
    assert run(asked(path, all_of))[2] == ("alpha", True, 2)


def test_what_was_just_told_can_be_read(tmp_path: Path) -> None:
    async def life() -> list[int]:
        history = history_at(tmp_path / "history.db")
        history.session_opened(pb.Session(id="alpha", opened_unix_usec=OPENED_USEC))
        past, counts = Past(history, lambda _: None, lambda _: False), []
        for number in range(20):
            history.note("call_ended", {"session": "alpha", "report": report(f"c{number}")})
            found = await past.list_history(ALL, "op", pb.ListHistoryRequest(limit=100))
            counts.append(len(found.reports))
        await history.close()
        return counts

    assert run(life()) == list(range(1, 21))


def test_a_store_that_cannot_be_written_is_not_asked_for_the_newest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed sessions are asked of it all the same; of all together, memory knows more."""

    def held_up(self: File) -> bool:
        self.not_now("no room")
        return True

    async def life() -> list[bool]:
        history = history_at(path)
        past = Past(history, lambda _: None, lambda _: False)
        found = [await past.is_current(), await past.knows_more(""), await past.knows_more("a")]
        monkeypatch.setattr(File, "is_held_up", held_up)
        found += [await past.is_current(), await past.knows_more(""), await past.knows_more("a")]
        await history.close()
        return found

    assert run(life()) == [True, True, True, False, False, True]


def test_a_session_that_asks_for_much_waits_for_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty slow questions of one asker, and one of another, who is second in the thread."""

    def slow(db: sqlite3.Connection) -> float:
        time.sleep(0.02)
        return time.monotonic()

    async def life() -> tuple[int, int]:
        history = history_at(path)
        many = [asyncio.ensure_future(history.ask("session a", slow)) for _ in range(50)]
        await asyncio.sleep(0.01)
        other = await history.ask("session b", slow)
        ends = await asyncio.gather(*many)
        await history.close()
        return sum(end < other for end in ends), len(ends)

    before, count = run(life())
    assert count == 50 and before <= 3


def test_a_query_that_takes_too_long_is_given_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "QUERY_S", 0.05)

    def endless(db: sqlite3.Connection) -> Any:
        sql = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
        return db.execute(sql).fetchone()

    async def life() -> int:
        history: History = history_at(path)
        with pytest.raises(Unavailable, match="took longer"):
            await history.ask("op", endless)
        found = await history.ask("op", lambda db: db.execute("SELECT 1").fetchone())
        await history.close()
        return int(found[0])

    assert run(life()) == 1
