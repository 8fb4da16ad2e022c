"""The audit log: what one session may take, what is done when it cannot be written, and whether
what is missing shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentcgroup import audit as form
from agentcgroup import cli
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.telemetry import audit as module
from agentcgroupd.telemetry.audit import Audit, AuditLimits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Moves the clock that rates and pauses go by."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    yield move


def small(path: Path, **limits: Any) -> Audit:
    """A log whose files hold some 100 entries."""
    return Audit(path, 20_000, AuditLimits(20_000, **limits))


def entries(path: Path) -> list[dict[str, Any]]:
    return list(form.entries(form.files_of(path)))


def events(path: Path, **fields: Any) -> list[dict[str, Any]]:
    """The entries that have all of these fields."""
    return [e for e in entries(path) if all(e.get(k) == v for k, v in fields.items())]


def problems(path: Path) -> list[str]:
    return form.verify(form.files_of(path)).problems


# Files and chain


def test_files_follow_one_another_and_the_oldest_goes(path: Path) -> None:
    audit = small(path, files=3, session_percent=100)
    for number in range(1000):
        audit.write("step", number=number)
    audit.close()
    files = form.files_of(path)
    assert [file.name for file in files] == [
        "audit.3.jsonl",
        "audit.2.jsonl",
        "audit.1.jsonl",
        "audit.jsonl",
    ]
    assert all(file.stat().st_size <= 20_000 for file in files)
    numbers = [entry["number"] for entry in events(path, event="step")]
    assert numbers == list(range(numbers[0], 1000)) and numbers[0] > 0
    found = form.verify(files)
    assert found.good and found.files == 4, found.problems


def test_a_restart_goes_on_with_the_chain(path: Path) -> None:
    for start in range(3):
        audit = Audit(path, 1 << 20)
        audit.write("step", number=start)
        audit.close()
    assert [entry["seq"] for entry in entries(path)] == [1, 2, 3]
    assert problems(path) == []


def test_a_new_log_without_an_entry_leaves_no_file(path: Path) -> None:
    Audit(path, 1 << 20).close()
    assert not path.exists()


def test_reports_are_found_across_files(path: Path) -> None:
    audit = small(path, session_percent=100)
    for number in range(200):
        report = pb.Report(call_id=str(number), session_id="s")
        audit.write("call_ended", session="s", call=str(number), report=report)
    audit.close()
    found = [report.call_id for report in Audit(path, 20_000).ended_reports()]
    assert path.with_suffix(".1.jsonl").exists()
    assert found == [str(number) for number in range(200 - len(found), 200)] and len(found) > 100


@pytest.mark.parametrize("what", ["change", "remove", "swap", "first", "insert", "cut", "append"])
def test_what_somebody_else_did_to_a_file_shows(path: Path, what: str) -> None:
    audit = Audit(path, 1 << 20)
    for number in range(10):
        audit.write("step", number=number)
    audit.close()
    assert problems(path) == []
    lines = path.read_bytes().splitlines(keepends=True)
    if what == "change":
        lines[4] = lines[4].replace(b'"number": 4', b'"number": 5')
    elif what == "remove":
        del lines[4]
    elif what == "swap":
        lines[4], lines[5] = lines[5], lines[4]
    elif what == "first":
        del lines[0]
    elif what == "insert":
        lines.insert(4, lines[3])
    elif what == "cut":
        lines[4] = lines[4][:20]
    else:
        lines.append(b'{"event": "step", "at_unix_usec": 1}\n')
    path.write_bytes(b"".join(lines))
    assert problems(path) != []


def test_a_missing_file_shows(path: Path) -> None:
    audit = small(path)
    for number in range(500):
        audit.write("step", number=number)
    audit.close()
    files = form.files_of(path)
    assert form.verify(files[1:]).good  # what was before the first is not asked about
    (problem, *_) = form.verify([files[0], *files[2:]]).problems
    assert f"{files[2]}:1: entries before it are missing" in problem


def test_a_line_that_a_crash_cut_short_is_told_by_the_next_daemon(path: Path) -> None:
    audit = Audit(path, 1 << 20)
    audit.write("step", number=1)
    audit.close()
    with path.open("ab") as file:
        file.write(b'{"at_unix_usec": 17, "event": "st')
    again = Audit(path, 1 << 20)
    again.write("step", number=2)
    again.close()
    found = form.verify([path])
    assert (found.good, found.torn) == (True, 1), found.problems
    assert [e["number"] for e in events(path, event="step")] == [1, 2]
    assert events(path, event="audit_torn")[0]["bytes"] == 33


def test_a_log_of_an_older_daemon_is_gone_on_with(path: Path) -> None:
    old = b'{"at_unix_usec": 1, "event": "call_ended", "report": {"call_id": "x"}}\n'
    path.write_bytes(old)
    audit = Audit(path, 1 << 20)
    audit.write("step")
    audit.close()
    assert path.read_bytes().startswith(old)
    assert [report.call_id for report in Audit(path, 1 << 20).ended_reports()] == ["x"]
    (problem,) = problems(path)
    assert "of an older daemon" in problem


@pytest.mark.parametrize(
    "garbage", [b"\0" * 5000 + b"\n", b"[" * 99999 + b"\n", b"\xff\n{}\n[]\n", b"\n\n"]
)
def test_garbage_in_the_file_ends_nothing(path: Path, garbage: bytes) -> None:
    path.write_bytes(garbage)
    audit = Audit(path, 1 << 20)
    audit.write("step", number=1)
    audit.close()
    assert list(Audit(path, 1 << 20).ended_reports()) == []
    assert [e["number"] for e in events(path, event="step")] == [1]
    assert problems(path) != []


def test_a_clock_that_jumps_back_breaks_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = small(path)
    times = iter([9_000_000_000, 5, 6, 7, 8, 9, 10, 11])
    monkeypatch.setattr(module, "unix_usec", lambda: next(times))
    for _ in range(3):
        audit.write("step", session="a")
    assert [entry["seq"] for entry in entries(path)] == [1, 2, 3]
    assert problems(path) == []


# One session among others


def test_one_session_cannot_write_away_what_others_did(path: Path) -> None:
    audit = small(path, files=2)
    audit.write("call_begun", session="victim", call="v")
    for number in range(10_000):
        audit.write("call_refused", session="hog", name="x" * (number % 50))
    audit.write("call_ended", session="victim", call="v")
    audit.close()
    assert len(form.files_of(path)) == 1
    assert [e["event"] for e in events(path, session="victim")] == ["call_begun", "call_ended"]
    kept = len(events(path, event="call_refused"))
    told = sum(entry["count"] for entry in events(path, event="audit_left_out", session="hog"))
    assert 20 < kept < 60 and kept + told == 10_000 and told == audit.left_out
    found = form.verify([path])
    assert (found.good, found.left_out) == (True, told)


def test_that_entries_are_left_out_is_told_at_once_and_then_now_and_then(
    path: Path, clock: Callable[[float], None]
) -> None:
    audit = small(path)
    for _ in range(1000):
        audit.write("call_refused", session="hog")
    (told,) = events(path, event="audit_left_out")
    assert (told["session"], told["count"]) == ("hog", 1) and "25 % of this file" in told["why"]
    clock(61)
    audit.write("call_refused", session="hog")
    assert len(events(path, event="audit_left_out")) == 2


def test_a_session_has_a_rate(path: Path, clock: Callable[[float], None]) -> None:
    audit = Audit(path, 1 << 30, AuditLimits(1 << 30, session_rate=10))
    for _ in range(150):
        audit.write("step", session="hog")
    assert len(events(path, event="step")) == 100
    audit.write("step", session="other")
    clock(2)
    for _ in range(50):
        audit.write("step", session="hog")
    assert len(events(path, event="step", session="hog")) == 120
    assert len(events(path, event="step", session="other")) == 1
    # What was left out is told when it goes on, and again before the end.
    audit.close()
    assert sum(e["count"] for e in events(path, event="audit_left_out")) == 80


def test_the_operators_entries_are_never_left_out(path: Path) -> None:
    audit = small(path)
    for _ in range(200):
        audit.write("step", session="hog")
    audit.write("session_closed", session="hog", calls_ended=1)
    audit.write("policy", name="x")
    assert len(events(path, event="session_closed")) == len(events(path, event="policy")) == 1


def test_a_session_alone_gets_a_new_file_after_a_day(
    path: Path, clock: Callable[[float], None]
) -> None:
    audit = small(path, least_age_s=100.0)
    for _ in range(300):
        audit.write("step", session="only")
    assert len(form.files_of(path)) == 1
    clock(101)
    audit.write("step", session="only", number=7)
    audit.close()
    assert len(form.files_of(path)) == 2
    assert form.entries([path]) and entries(path)[-1]["number"] == 7
    assert problems(path) == []


def test_a_restart_gives_no_new_share(path: Path) -> None:
    for _ in range(20):
        audit = small(path)
        for _ in range(100):
            audit.write("step", session="hog")
        audit.close()
    assert sum(len(line) for line in form.lines_of(path) if b'"step"' in line) < 6_000


# Moved, emptied, full


def test_a_file_that_was_moved_is_followed_by_a_new_one(
    path: Path, clock: Callable[[float], None]
) -> None:
    audit = small(path)
    audit.write("step", number=1)
    moved = path.with_name("audit.jsonl-20260101")
    path.rename(moved)
    clock(1.1)
    audit.write("step", number=2)
    assert [e["number"] for e in entries(path) if e["event"] == "step"] == [2]
    assert form.verify([moved, path]).good
    # And it is still renamed when it is full.
    for number in range(300):
        audit.write("step", number=number)
    assert path.with_suffix(".1.jsonl").exists() and audit.lost == 0
    assert problems(path) == []


def test_a_file_that_was_removed_right_before_it_is_full(path: Path) -> None:
    audit = small(path)
    audit.write("step")
    path.unlink()
    for number in range(300):
        audit.write("step", number=number)
    assert audit.lost == 0 and path.exists()


def test_a_file_that_was_copied_and_emptied(path: Path, clock: Callable[[float], None]) -> None:
    audit = small(path)
    for number in range(5):
        audit.write("step", number=number)
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.truncate(path, 0)
    clock(1.1)
    audit.write("step", number=5)
    assert form.verify([copy, path]).good
    assert [e["number"] for e in entries(path) if e["event"] == "step"] == [5]


def test_a_name_that_is_taken_keeps_nothing_from_being_written(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path.with_suffix(".1.jsonl") / "x").mkdir(parents=True)
    audit = small(path, files=1)
    for number in range(300):
        audit.write("step", number=number)
    assert audit.lost == 0 and len(list(form.entries([path]))) == 300
    (said,) = [r.getMessage() for r in caplog.records if "cannot be renamed" in r.getMessage()]
    assert "Is a directory" in said


FULL = """
import os, resource, signal, sys
from pathlib import Path
from agentcgroupd.telemetry.audit import Audit
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
audit = Audit(path, 1 << 30)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for end in (3001, 3002, 5123, 20_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (end, hard))
    for number in range(50):
        audit.write("step", number=number)
    if end == 3001:
        print(audit.lost)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
audit.write("step", number="last")
print(audit.lost)
audit.close()
"""


def test_a_full_disk_costs_entries_that_are_counted_and_told(path: Path) -> None:
    """The kernel writes as much as there is room for, and refuses the rest."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    )
    first, lost = map(int, done.stdout.split())
    assert 0 < first < lost
    found = form.verify([path])
    assert (found.good, found.lost, found.torn) == (True, lost, 0), found.problems
    assert len(events(path, event="step")) + lost == 201
    assert events(path, event="step")[-1]["number"] == "last"
    assert done.stderr.count("entries are lost and counted") <= 4


def test_a_fragment_that_cannot_be_taken_back_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = Audit(path, 1 << 20)
    audit.write("step", number=1)
    write, truncate = os.write, os.ftruncate

    def half(fd: int, data: bytes) -> int:
        return write(fd, data[: len(data) // 2])

    def refuse(fd: int, size: int) -> None:
        raise PermissionError(1, "append only")

    monkeypatch.setattr(os, "write", half)
    monkeypatch.setattr(os, "ftruncate", refuse)
    audit.write("step", number=2)
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "ftruncate", truncate)
    audit.write("step", number=3)
    audit.close()
    found = form.verify([path])
    assert (found.good, found.lost, found.torn) == (True, 1, 1), found.problems


# The command


@pytest.fixture
def log(path: Path) -> Path:
    audit = Audit(path, 1 << 20)
    audit.write("call_begun", session="a", call="1", name="x\x1b[2J\u202ey\n")
    audit.write("call_ended", session="b", call="2", report=pb.Report(sentence="It ended."))
    audit.close()
    return path


def test_the_command_shows_what_was_asked_for(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = f"--file={log}"
    assert cli.main(["audit", file]) == 0
    shown = capsys.readouterr().out
    assert "It ended." in shown and "session=b" in shown and len(shown.splitlines()) == 2
    assert "\x1b" not in shown and "\u202e" not in shown and r"\x1b[2J\u202ey\n" in shown
    for arguments in (["--session", "a"], ["--call", "1"], ["--event", "call_begun"]):
        assert cli.main(["audit", file, "--json", *arguments]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["call"] == "1"
    assert cli.main(["audit", file, "--limit", "1"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert cli.main(["audit", file, "--since", "1h"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.main(["audit", file, "--since", "2999-01-01"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["audit", file, "--since", "yesterday"]) == 2


def test_the_command_says_what_is_missing(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = Audit(log, 1 << 20)
    audit.write("step")
    audit.close()
    assert cli.main(["audit", "verify", f"--file={log}"]) == 0
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join((lines[0], *lines[2:])))
    assert cli.main(["audit", "verify", f"--file={log}"]) == 1
    assert "1 entries before it are missing" in capsys.readouterr().out
    assert cli.main(["audit", "verify", "--json", f"--file={log}"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["good"] is False and found["entries"] == 2
    assert cli.main(["audit", "verify", f"--file={log}.gone"]) == 5
    assert "No such file" in capsys.readouterr().err
