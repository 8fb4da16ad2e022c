"""The store: what is still there after a crash, a full disk and damage, and what is counted."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import FailedPrecondition, Unavailable
from agentcgroupd.history import read, schema
from agentcgroupd.history import store as module
from agentcgroupd.history.history import History
from agentcgroupd.history.read import ALL, Wanted
from agentcgroupd.history.rows import GONE, Batch, Ended, Entry, Opened, SessionKey
from agentcgroupd.telemetry.audit import Audit
from tests.harness import wait_until
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
    written,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/history.db"


def whole(path: Path) -> str:
    """What SQLite says of a file."""
    with read_only(path) as db:
        return str(db.execute("PRAGMA integrity_check").fetchone()[0])


def test_reports_are_there_as_they_were_after_the_file_was_closed(path: Path) -> None:
    full = report("c1", memory_peak_bytes=5, exit_code=3, argv=["sh", "-c", "x"])
    full.facts.add(what="it ended", source="pidfd", at_unix_usec=7)
    full.feedback.add(sentence="Ask for more.", numbers={"a_usec": 1.5})
    store = started(path)
    store.put(Ended.of(ALPHA, full))
    assert store.close(WAIT_S)
    assert [file.name for file in path.parent.iterdir()] == ["history.db"]
    with read_only(path) as db:
        assert read.report(db, ALL, "c1") == full
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_of_two_reports_of_a_call_the_later_counts_and_sums_have_it_once(path: Path) -> None:
    store = started(path)
    store.put(ended(ALPHA, "c1", cpu_usage_usec=100, sentence="first"))
    store.put(ended(ALPHA, "c1", cpu_usage_usec=100, sentence="second"))
    store.put(ended(ALPHA, "c2", cpu_usage_usec=50, verdict=pb.VERDICT_TIMEOUT))
    store.put(ended(ALPHA, "inner", cpu_usage_usec=50, parent_call_id="c2"))
    assert store.close(WAIT_S)
    with read_only(path) as db:
        again = read.report(db, ALL, "c1")
        (past,), _ = read.sessions(db, "", 0, 10, (read.NO_END, read.NO_END))
    assert again is not None and again.sentence == "second"
    sums = past.sums
    assert (sums.calls, sums.calls_not_ok, sums.cpu_usage_usec) == (3, 1, 150)
    assert not sums.HasField("memory_peak_bytes")


def test_memory_is_summed_up_where_it_was_measured(path: Path) -> None:
    store = started(path)
    store.put(ended(ALPHA, "c1"))
    store.put(ended(ALPHA, "c2", memory_peak_bytes=300, wall_usec=2_000_000))
    store.put(ended(ALPHA, "c3", memory_peak_bytes=100, wall_usec=1_000_000))
    assert store.close(WAIT_S)
    with read_only(path) as db:
        (past,), _ = read.sessions(db, "", 0, 10, (read.NO_END, read.NO_END))
    assert (past.sums.memory_peak_bytes, past.sums.memory_byte_seconds) == (300, 700)


# Crashes

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.unit.history.making import ALPHA, ended, started, written
store = started(Path(sys.argv[1]))
number = 0
while True:
    for _ in range(200):
        store.put(ended(ALPHA, f"c{number}", argv=["x" * 500]))
        number += 1
    written(store)
    print(number, flush=True)
"""


def test_a_writer_killed_again_and_again_loses_nothing_that_was_written(path: Path) -> None:
    """SIGKILL at other moments of its work each time, the next one on the same file."""
    for turn in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(ROOT)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged = int(writer.stdout.readline())
        time.sleep(0.013 * turn)
        writer.send_signal(signal.SIGKILL)
        rest = [line for line in writer.stdout.read().splitlines() if line.isdecimal()]
        writer.wait()
        acknowledged = int(rest[-1]) if rest else acknowledged
        ids = set(kept(path))
        assert {f"c{number}" for number in range(acknowledged)} <= ids
        assert whole(path) == "ok"
    store = started(path)
    written(store)
    assert store.is_unclean
    assert store.close(WAIT_S)
    again = started(path)
    written(again)
    assert not again.is_unclean
    assert again.close(WAIT_S)


def test_what_a_killed_daemon_had_not_written_comes_from_the_audit_log(
    path: Path, tmp_path: Path
) -> None:
    """The file is left as by kill -9, and the log has two reports that it has not."""
    log = tmp_path / "audit.jsonl"
    audit = Audit(log, 1 << 20)
    for number in range(3):
        made = report(f"c{number}", sentence=f"{number}")
        audit.write("call_ended", session="alpha", call=made.call_id, report=made)
    other = report("other", "closed-since", began_unix_usec=OPENED_USEC + 5)
    audit.write("call_ended", session="closed-since", call="other", report=other)
    audit.close()
    store = started(path)
    store.put(ended(ALPHA, "c0", sentence="as written first"))
    written(store)
    with closing(sqlite3.connect(path)) as db:  # a copy of it is what kill -9 leaves
        copy = path.with_name("copy.db")
        db.execute("VACUUM INTO ?", (str(copy),))
    assert store.close(WAIT_S)

    async def restart(file: Path) -> None:
        history = history_at(file)
        history.session_opened(pb.Session(id="alpha", opened_unix_usec=OPENED_USEC))
        there = Audit(log, 1 << 20)
        history.settle(there.ended_reports, there.closed_sessions)
        await history.ask("test", lambda db: None)
        await history.ask("test", lambda db: None)
        await history.close()

    with closing(sqlite3.connect(copy)) as db:
        db.execute("PRAGMA journal_mode = WAL")
    run(restart(copy))
    assert set(kept(copy)) == {"c0", "c1", "c2", "other"}
    with read_only(copy) as db:
        first = read.report(db, ALL, "c0")
        assert first is not None and first.sentence == "as written first"
        assert read.session_of(db, "c1") == ALPHA
    run(restart(path))
    assert kept(path) == ["c0"], "a file that was closed misses nothing"


def test_why_a_session_was_closed_comes_from_the_audit_log_if_need_be(
    path: Path, tmp_path: Path
) -> None:
    """The row is lost with a daemon that is killed right then."""
    log = tmp_path / "audit.jsonl"
    store = started(path)
    for name in ("alpha", "beta"):
        message = pb.Session(id=name).SerializeToString()
        store.put(Opened(SessionKey(name, OPENED_USEC), message))
        store.put(Opened(SessionKey(name, OPENED_USEC - 100), message))
    written(store)
    copy = path.with_name("copy.db")
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM INTO ?", (str(copy),))
    assert store.close(WAIT_S)
    audit = Audit(log, 1 << 20)
    audit.write("session_closed", session="alpha", calls_ended=0, why="the operator closed it")
    audit.write("session_closed", session="gamma", calls_ended=0, why="whatever")

    async def restart() -> None:
        history = history_at(copy)
        history.settle(audit.ended_reports, audit.closed_sessions)
        for _ in range(2):
            await history.ask("test", lambda db: None)
        await history.close()

    run(restart())
    with read_only(copy) as db:
        found, _ = read.sessions(db, "", 0, 10, (read.NO_END, read.NO_END))
    (last,) = (past for past in found if "operator" in past.closed_why)
    assert last.closed_unix_usec > OPENED_USEC
    assert sorted((past.session.id, past.closed_why) for past in found) == [
        ("alpha", GONE),
        ("alpha", "the operator closed it"),
        ("beta", GONE),
        ("beta", GONE),
    ]


def test_only_lines_since_a_time_are_read_back_from_the_audit_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = Audit(tmp_path / "audit.jsonl", 1 << 20)
    for number in range(3):
        monkeypatch.setattr("agentcgroupd.telemetry.audit.unix_usec", lambda n=number: 100 * n)
        audit.write("call_ended", session="a", call=f"c{number}", report=report(f"c{number}"))
    found = [each.call_id for each in audit.ended_reports(100)]
    assert found == ["c1", "c2"]


def test_sessions_that_are_not_there_after_a_restart_count_as_closed(path: Path) -> None:
    async def life(*names: str) -> None:
        history = history_at(path)
        for name in names:
            opened = pb.Session(id=name, opened_unix_usec=OPENED_USEC, priority=80)
            history.session_opened(opened)
        history.settle(lambda since: (), lambda since: ())
        if "gamma" in names:
            history.session_closed("gamma", None, "the operator closed it")
        await history.close()

    run(life("alpha", "beta", "gamma"))
    run(life("beta"))
    with read_only(path) as db:
        found, _ = read.sessions(db, "", 0, 10, (read.NO_END, read.NO_END))
    why = {past.session.id: (bool(past.closed_unix_usec), past.closed_why) for past in found}
    assert why == {
        "alpha": (True, GONE),
        "beta": (False, ""),
        "gamma": (True, "the operator closed it"),
    }
    assert {past.session.priority for past in found} == {80}


# A disk that is full, or does not answer

FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.harness import wait_until
from tests.unit.history.making import ALPHA, BETA, ended, kept, started, written
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = started(path)
store.put(ended(ALPHA, "before"))
written(store)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))
for number in range(20_000):
    store.put(ended(ALPHA, f"a{number}", argv=["x" * 1000]))
wait_until("it is said", lambda: bool(store.wrong))
store.put(ended(BETA, "quiet"))
lost = store.lost
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
wait_until("it is written again", lambda: not store.wrong)
written(store)
store.put(ended(ALPHA, "after"))
assert store.close(30)
ids = set(kept(path))
print(lost, store.lost, len([i for i in ids if i[0] == "a" and i != "after"]),
      {"before", "quiet", "after"} <= ids)
"""


def test_a_full_disk_costs_rows_that_are_counted_and_no_others(path: Path) -> None:
    """What fits into the queue meanwhile is written once there is room; a session that floods it
    leaves room for others."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lost, lost_at_last, there, others = done.stdout.split()
    assert 0 < int(lost) == int(lost_at_last)
    assert int(there) + int(lost) == 20_000
    assert others == "True"
    assert whole(path) == "ok"
    assert done.stderr.count("history is not kept for now") <= 2, done.stderr


def test_a_disk_that_hangs_holds_nobody_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread waits in the middle of a write; who hands over rows does not."""
    store = started(path)
    written(store)
    hangs, go_on = threading.Event(), threading.Event()
    write = Ended.write

    def hang(self: Ended, batch: Batch) -> None:
        hangs.set()
        assert go_on.wait(WAIT_S)
        write(self, batch)

    monkeypatch.setattr(Ended, "write", hang)
    store.put(ended(ALPHA, "first"))
    assert hangs.wait(WAIT_S)
    longest = 0.0
    for number in range(20_000):
        row = ended(ALPHA, f"a{number}", argv=["x" * 500])
        began = time.perf_counter()
        store.put(row)
        longest = max(longest, time.perf_counter() - began)
    before = store.lost
    store.put(ended(BETA, "quiet"))
    assert store.lost == before > 0
    assert longest < 0.5
    assert not store.close(0.05), "the end of the daemon does not wait for it either"
    go_on.set()
    store.thread.join(WAIT_S)
    assert "quiet" in kept(path)


def test_a_file_that_cannot_be_made_is_said_once_and_tried_again(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    path.parent.write_text("a file where the directory belongs")
    with caplog.at_level(logging.WARNING):
        store = started(path)
        store.put(ended(ALPHA, "early"))
        wait_until("it is said", lambda: bool(store.wrong))
        time.sleep(0.1)
        path.parent.unlink()
        wait_until("it is kept", lambda: not store.wrong and store.generation > 0)
        assert store.close(WAIT_S)
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if line.startswith("history is not kept")]) == 1
    assert kept(path) == ["early"]


def test_another_program_that_reads_for_long_makes_no_file_grow(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write-ahead log cannot be written back while it is read; rows wait then."""
    monkeypatch.setattr("agentcgroupd.history.file.WAL_BYTES_MAX", 6 << 20)
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    store = started(path)
    store.put(ended(ALPHA, "first"))
    written(store)
    with read_only(path) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM calls").fetchone()
        number = 0
        while not store.wrong:
            for _ in range(100):
                store.put(ended(ALPHA, f"c{number}", argv=["x" * 1000]))
                number += 1
            written(store)
        assert "another program has been reading" in store.wrong
        assert Path(f"{path}-wal").stat().st_size < 12 << 20
        for _ in range(200):
            store.put(ended(ALPHA, f"c{number}", argv=["x" * 1000]))
            number += 1
        other.execute("ROLLBACK")
    wait_until("it is written again", lambda: not store.wrong)
    assert store.close(WAIT_S)
    assert (store.lost, len(kept(path))) == (0, number + 1)


# Damage, and files of others


@pytest.mark.parametrize("where", ["header", "pages"])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(
    path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = started(path)
    for number in range(2000):
        store.put(ended(ALPHA, f"c{number}", argv=["x" * 300]))
    assert store.close(WAIT_S)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(0 if where == "header" else schema.PAGE_BYTES)
        file.write(b"\xa5" * (100 if where == "header" else size - schema.PAGE_BYTES))
    with caplog.at_level(logging.ERROR):
        again = started(path)
        again.put(ended(ALPHA, "new"))
        written(again)
        wait_until("it is kept", lambda: not again.wrong)
        assert again.close(WAIT_S)
    assert kept(path) == ["new"]
    assert whole(path) == "ok"
    aside = Path(f"{path}.damaged")
    assert aside.stat().st_size == size
    (said,) = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert str(aside) in said


def spoil(path: Path) -> None:
    """Write over all pages but the first ones."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(20 * schema.PAGE_BYTES)
        file.write(os.urandom(path.stat().st_size - 20 * schema.PAGE_BYTES))


def test_damage_that_a_reader_finds_is_dealt_with(path: Path) -> None:
    newest = partial(read.reports, scope=ALL, wanted=Wanted(limit=500))

    async def life() -> list[str]:
        history = history_at(path)
        history.session_opened(pb.Session(id="alpha", opened_unix_usec=OPENED_USEC))
        for number in range(3000):
            made = report(f"c{number}", argv=["x" * 300])
            history.note("call_ended", {"session": "alpha", "report": made})
        await history.ask("test", newest)
        spoil(path)
        with pytest.raises(Unavailable, match="cannot be read"):
            while True:
                await history.ask("test", newest)
        history.note("call_ended", {"session": "alpha", "report": report("last")})
        found: list[pb.Report] = []
        deadline = time.monotonic() + WAIT_S
        while len(found) != 1 and time.monotonic() < deadline:
            with contextlib.suppress(Unavailable):
                found, _ = await history.ask("test", newest)
        await history.close()
        return [each.call_id for each in found]

    assert run(life()) == ["last"]
    assert Path(f"{path}.damaged").exists()


def newer(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE later (x)")
        db.execute(f"PRAGMA application_id = {schema.APPLICATION}")
        db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        db.commit()


def foreign(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
        db.commit()


@pytest.mark.parametrize("make", [newer, foreign])
def test_a_file_of_a_newer_daemon_or_of_others_is_left_alone(
    path: Path, make: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(make)
    make(path)
    before = path.read_bytes()

    async def life() -> str:
        history = history_at(path)
        history.session_opened(pb.Session(id="alpha", opened_unix_usec=OPENED_USEC))
        history.note("freeze", {"session": "alpha", "call": "c1", "why": "room"})
        with pytest.raises(FailedPrecondition) as refused:
            await history.ask("test", lambda db: None)
        assert history.lost == 2
        await history.close()
        return refused.value.sentence

    with caplog.at_level(logging.ERROR):
        sentence = run(life())
    assert "it is left alone" in sentence and str(path) in sentence
    assert [record.getMessage() for record in caplog.records] == [sentence]
    assert path.read_bytes() == before


def test_a_file_that_somebody_removed_is_followed_by_a_new_one(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = started(path)
    store.put(ended(ALPHA, "before"))
    written(store)
    for file in path.parent.iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            store.put(ended(ALPHA, f"c{number}"))
            written(store)
        assert store.close(WAIT_S)
    assert set(kept(path)) == {"c0", "c1", "c2"}
    said = [r.getMessage() for r in caplog.records if "moved or removed" in r.getMessage()]
    assert len(said) == 1


def test_a_link_in_place_of_the_file_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    other = tmp_path / "precious"
    other.write_text("precious")
    path.symlink_to(other)
    store = started(path)
    wait_until("it is said", lambda: "it is no file" in store.wrong)
    store.close(WAIT_S)
    assert other.read_text() == "precious"


def test_a_start_that_comes_to_nothing_leaves_no_file(path: Path) -> None:
    async def life() -> None:
        history = history_at(path)
        history.settle(lambda since: (), lambda since: ())
        await history.ask("test", lambda db: None)
        await history.close()

    run(life())
    assert list(path.parent.iterdir()) == []


def test_without_a_path_nothing_is_kept_and_that_is_said() -> None:
    async def life() -> None:
        history = History()
        history.session_opened(pb.Session(id="alpha"))
        history.note("freeze", {"session": "alpha"})
        assert (await history.is_kept(), history.lost) == (False, 0)
        with pytest.raises(FailedPrecondition, match=r"history\.path is empty"):
            await history.ask("test", lambda db: None)
        await history.close()

    run(life())


def test_rows_that_nobody_can_write_cost_no_others(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = started(path)
    store.put(ended(ALPHA, "one"))
    store.put(Entry(SessionKey("alpha", 1 << 70), "c", 1, "freeze", "{}"))
    store.put(Entry(ALPHA, "c", 1 << 64, "freeze", "{}"))
    store.put(ended(ALPHA, "two"))
    assert store.close(WAIT_S)
    assert sorted(kept(path)) == ["one", "two"]
    assert store.lost == 2
