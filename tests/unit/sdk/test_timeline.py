"""`agentcg timeline`: what is drawn of a session's calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from agentcgroup import Agent, cli
from agentcgroup.cli.picture import Row, held_over_time, page, row_of, svg
from agentcgroup.types import Report, Story
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.unit.fake_daemon import FakeDaemon, running

PICTURE = Path(__file__).parents[3] / "docs/timeline.svg"
SVG = "{http://www.w3.org/2000/svg}"
S, GIB = 1_000_000, 1 << 30
BEGAN = 1_767_261_845 * S


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def row(number: int, name: str, at_s: float, for_s: float, peak: int, **fields: object) -> Row:
    """A call; `steps`: what happened to it, as (seconds after the beginning of all, what, why)."""
    steps = fields.pop("steps", ())
    values = {"verdict": pb.VERDICT_OK, "sentence": "It ended with status 0.", **fields}
    report = pb.Report(
        call_id=f"{number:012x}",
        session_id="planner",
        name=name,
        argv=[name, "-q"],
        began_unix_usec=BEGAN + int(at_s * S),
        wall_usec=int(for_s * S),
        memory_peak_bytes=peak,
        cpu_usage_usec=int(for_s * S / 2),
        **values,  # type: ignore[arg-type]
    )
    story = pb.Story(call_id=report.call_id)
    for after_s, what, sentence in steps:  # type: ignore[attr-defined]
        story.steps.add(at_unix_usec=BEGAN + int(after_s * S), what=what, sentence=sentence)
    return row_of(Report.from_proto(report), Story.from_proto(story))


def scene() -> list[Row]:
    """Five calls of a minute: one paused twice, one that waited, one ended by policy."""
    more = "pytest of planner is more important and still grows."
    return [
        row(1, "git", 0, 2, 40 << 20),
        row(
            2,
            "cargo",
            3,
            45,
            5 * GIB,
            steps=[
                (12, "freeze", f"It was paused: {more}"),
                (21, "thaw", "It went on: there is room again."),
                (30, "hold", "The operator paused it: lunch."),
                (38, "unhold", "The operator let it go on."),
            ],
        ),
        row(3, "rustc", 6, 30, 2 * GIB, parent_call_id=f"{2:012x}"),
        row(4, "pytest", 10, 22, 3 * GIB, waited_usec=4 * S),
        row(
            5,
            "python3",
            34,
            20,
            4 * GIB,
            verdict=pb.VERDICT_STOPPED,
            sentence="The policy ended it: nothing else could go on.",
            steps=[
                (48, "deny", "It was allowed to grow no further: the pool is 95 % full."),
                (54, "kill", "It was ended by policy: nothing else could go on."),
            ],
        ),
    ]


def drawn(rows: list[Row], most: int | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(svg("planner", rows, most))


def titles(root: ElementTree.Element, kind: str) -> list[str]:
    """What is read by whoever points at the shapes of a class."""
    return [
        title.text or ""
        for shape in root.iter()
        if shape.get("class") == kind
        for title in shape.iter(f"{SVG}title")
    ]


def test_the_picture_in_the_docs_is_what_is_drawn() -> None:
    assert PICTURE.read_text() == svg("planner", scene(), 10 * GIB)


def test_pauses_waits_and_decisions_are_shown_with_their_sentences() -> None:
    root = drawn(scene())
    first, second = titles(root, "pause")
    assert first.startswith("paused for 9.00 s: It was paused: pytest of planner")
    assert second == "paused for 8.00 s: The operator paused it: lunch."
    assert titles(root, "wait") == ["waited 4.00 s in the queue"]
    assert [text.split(":")[0] for text in titles(root, "mark")] == [
        "It was allowed to grow no further",
        "It was ended by policy",
    ]


def test_a_pause_that_the_end_came_in_lasts_until_then() -> None:
    (only,) = [row(1, "make", 0, 10, GIB, steps=[(4, "freeze", "It was paused.")])]
    assert list(only.pauses()) == [(BEGAN + 4 * S, BEGAN + 10 * S, "It was paused.")]


def test_calls_inside_others_are_not_counted_twice() -> None:
    held = dict(held_over_time(scene()))
    assert held[BEGAN + 6 * S if BEGAN + 6 * S in held else BEGAN + 3 * S] == 5 * GIB
    assert max(held.values()) == 9 * GIB
    assert list(held.values())[-1] == 0


def test_one_short_call_without_numbers_can_be_drawn() -> None:
    report = Report.from_proto(pb.Report(call_id="x", name="true", began_unix_usec=BEGAN))
    root = ElementTree.fromstring(svg("a", [row_of(report, None)]))
    assert any((text.text or "") == "not measured" for text in root.iter(f"{SVG}text"))


def test_names_are_text_and_nothing_else() -> None:
    evil = "</text><script>alert(1)</script>\x1b[31m\u202e"
    picture = svg(evil, [row(1, evil, 0, 1, GIB, sentence=evil)])
    root = ElementTree.fromstring(picture)
    assert not list(root.iter(f"{SVG}script")) and not list(root.iter("script"))
    assert "\x1b" not in picture and "\u202e" not in picture
    assert "<script" not in page(evil, picture)
    assert "default-src 'none'" in page(evil, picture)


@pytest.mark.parametrize("kind", ["svg", "html"])
def test_the_command_writes_a_file(
    daemon: FakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with Agent() as agent:
        agent.run(["true"])
        session = agent.session().id
    file = tmp_path / f"out.{kind}"
    assert cli.main(["timeline", session, "--out", str(file)]) == 0
    assert "1 calls of session" in capsys.readouterr().out
    text = file.read_text()
    assert "<svg" in text and (kind == "svg") == text.startswith("<svg")


def test_what_cannot_be_written_is_said(
    daemon: FakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["timeline", "a", "--out", "x.png"]) == 2
    assert "does not end in .svg or .html" in capsys.readouterr().err
    assert cli.main(["timeline", "a", "--out", str(tmp_path / "a.svg")]) == 5
    assert "no call of session 'a'" in capsys.readouterr().err
    with Agent() as agent:
        agent.run(["true"])
    assert cli.main(["timeline", "a", "--out", str(tmp_path / "none/a.svg")]) == 1
    assert "none/a.svg" in capsys.readouterr().err
