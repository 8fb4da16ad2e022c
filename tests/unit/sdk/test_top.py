"""`agentcg top`: what it shows of a pool, what it advises, and what its keys do."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentcgroup import Agent, cli
from agentcgroup.cli import terminal
from agentcgroup.cli.keyboard import Operator
from agentcgroup.cli.live import Look, Rates, advice, reason
from agentcgroup.cli.screen import CHOSEN, View, frame
from agentcgroup.cli.top import BOTH, INTERVAL_S, REST, rest_s
from agentcgroup.errors import AgentcgError
from agentcgroup.types import CallState
from tests.unit.fake_daemon import FakeDaemon, running
from tests.unit.sdk import top_scene
from tests.unit.sdk.top_scene import AT_UNIX_USEC, GIB, scene

PAGE = Path(__file__).parents[3] / "docs/top.md"


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


def shown(
    view: View, width: int = 80, height: int = 24, found: tuple[Look, Rates] | None = None
) -> list[str]:
    """The text of a screen."""
    look, rates = found or scene()
    return [text for text, _ in frame(look, rates, view, width, height, AT_UNIX_USEC)]


def picture(view: View) -> str:
    """The screen without its clock, which is in local time."""
    lines = shown(view)
    return "\n".join([re.sub(r"\d\d:\d\d:\d\d", "10:04:05", lines[0]), *lines[1:]])


# What it shows


def test_the_pictures_in_the_docs_are_what_it_shows() -> None:
    text = PAGE.read_text()
    for view in (View(), View(mode="session", session_id="nightly")):
        lines = [line.rstrip() for line in picture(view).split("\n")]
        assert "\n".join(lines) in text, "\n".join(lines)


def test_one_screen_answers_who_uses_it_who_is_paused_why_and_what_helps() -> None:
    text = picture(View())
    order = [text.index(name) for name in ("refactor-7 ", "nightly ", "planner ", "scratch ")]
    assert order == sorted(order), "who uses most stands first"
    assert "make of nightly paused for 12.40 s: Paused: the pool is 93 % full" in text
    assert "link of refactor-7 waits 41.00 s: number 1 of 2, expects 2.0 GiB" in text
    assert "1.1 GiB more would let link of refactor-7 begin" in text
    assert "Ending call 0000000000c1 (make of nightly, priority 20) would free 3.5 GiB" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 14), (40, 10), (200, 60)])
@pytest.mark.parametrize("mode", ["pool", "session", "call"])
def test_a_screen_is_as_large_as_the_terminal_and_not_larger(
    mode: str, width: int, height: int
) -> None:
    view = View(mode=mode, session_id="nightly", story=["a long line " * 30] * 50)
    lines = shown(view, width, height)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert "quit" in lines[-1] or width < 80


def test_rates_are_of_the_time_between_two_looks_of_the_same_cgroup() -> None:
    before, now = top_scene.look(0), top_scene.look(2)
    rates = Rates.between(before, now)
    planner = rates.sessions["planner"]
    assert planner.cores == pytest.approx(1.4)
    assert planner.io_bytes == pytest.approx(20 << 20)
    assert planner.net_bytes == pytest.approx(300)
    assert rates.sessions["refactor-7"].net_bytes is None, "it is not counted"
    other = [dataclasses.replace(each, cgroup_id=7) for each in before.sessions]
    rates = Rates.between(dataclasses.replace(before, sessions=other), now)
    assert rates.sessions["planner"].cores is None, "one of that name was closed meanwhile"


def test_the_chosen_line_is_on_the_screen_among_a_thousand() -> None:
    now, rates = scene()
    many = [dataclasses.replace(now.sessions[0], id=f"s{n:04}") for n in range(1000)]
    look = dataclasses.replace(now, sessions=many)
    lines = frame(look, rates, View(chosen=700, sort="name"), 80, 24, AT_UNIX_USEC)
    (chosen,) = [text for text, style in lines if style == CHOSEN]
    assert chosen.startswith("> s0700")


def test_names_cannot_move_the_cursor() -> None:
    now, rates = scene()
    bad = dataclasses.replace(now.sessions[0], id="a\x1b[2J\u202eb")
    worse = dataclasses.replace(now.calls[2], name="c\x1b]0;x\x07", paused_why="\x9b31m\nwhy")
    found = dataclasses.replace(now, sessions=[bad], calls=[worse]), rates
    for view in (View(), View(mode="session", session_id=bad.id)):
        for line in shown(view, found=found):
            assert line.isprintable(), line


@pytest.mark.parametrize(
    ("sort", "first"),
    [("memory", "refactor-7"), ("cpu", "planner"), ("priority", "planner"), ("name", "nightly")],
)
def test_sorting(sort: str, first: str) -> None:
    (chosen,) = [line for line in shown(View(sort=sort)) if line.startswith(">")]
    assert chosen.split()[1] == first


# What would help


def without(now: Look, *states: CallState) -> Look:
    return dataclasses.replace(now, calls=[c for c in now.calls if c.state not in states])


def test_where_nobody_waits_it_says_what_is_free() -> None:
    now, _ = scene()
    calm = without(now, CallState.FROZEN, CallState.WAITING)
    calm = dataclasses.replace(calm, sessions=[s for s in now.sessions if s.id != "nightly"])
    assert advice(calm, Rates()) == [
        "Nothing: no call waits or is paused, and 1.0 GiB are free.",
    ]


def test_file_cache_that_can_be_dropped_does_not_count_as_used() -> None:
    """With containers it may be more than the whole pool."""
    now, rates = scene()
    pool = dataclasses.replace(now.pool, memory_current_bytes=20 * GIB, memory_held_bytes=7 * GIB)
    (first, *_) = shown(View(), found=(dataclasses.replace(now, pool=pool), rates))
    assert "memory 7.0 GiB of 14.0 GiB (50%)" in first


def test_a_session_at_its_own_limit_is_told_apart_from_a_full_pool() -> None:
    now, _ = scene()
    (only,) = advice(without(now, CallState.FROZEN, CallState.WAITING), Rates())
    assert only.startswith("Session nightly is at 98% of its own limit of 4.1 GiB")


def test_what_the_operator_holds_is_told() -> None:
    now, _ = scene()
    held = without(now, CallState.WAITING)
    held = dataclasses.replace(held, calls=[c for c in held.calls if c.held or c.id[-2:] == "a1"])
    assert "You hold call 0000000000d1 paused" in advice(held, Rates())[0]


def test_agents_that_hold_much_outside_of_calls_are_named() -> None:
    now, _ = scene()
    large = dataclasses.replace(
        now.sessions[0],
        usage=dataclasses.replace(now.sessions[0].usage, memory_current_bytes=9 * GIB),  # type: ignore[type-var]
    )
    found = advice(dataclasses.replace(now, sessions=[large, *now.sessions[1:]]), Rates())
    assert any("outside of their calls: with swap (pool.zram)" in each for each in found)


def test_busy_cpus_and_disks_are_named() -> None:
    now, rates = scene()
    calm = without(now, CallState.FROZEN, CallState.WAITING)
    pool = dataclasses.replace(
        calm.pool, cpu_millicores=2700, cpu_some_percent=60.0, io_some_percent=40.0
    )
    found = advice(dataclasses.replace(calm, pool=pool), rates)
    assert "All 2.7 cores are busy: more would help." in found
    assert found[-1] == (
        "Tasks wait for disks 40 % of the time, most of it for session refactor-7."
    )


def test_a_pause_without_a_word_is_not_hidden() -> None:
    now, _ = scene()
    assert reason(dataclasses.replace(now.calls[2], paused_why="")) == "Nobody said why."


# Keys


class FakeAdmin:
    """An operator's client that takes down what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._now, _ = scene()

    def pool(self) -> Any:
        return self._now.pool

    def sessions(self) -> Any:
        return self._now.sessions

    def calls(self) -> Any:
        return self._now.calls

    def story(self, call_id: str) -> Any:
        raise AgentcgError(f"nothing is known of {call_id}")

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            self.asked.append((name, *args, *kwargs.items()))
            return 1

        return ask


@pytest.fixture
def operator() -> Operator:
    made = Operator(FakeAdmin())  # type: ignore[arg-type]
    made.refresh()
    return made


def press(operator: Operator, *keys: str) -> list[tuple[Any, ...]]:
    """Press keys; returns what the daemon was asked."""
    for key in keys:
        operator.key(key)
    asked: list[tuple[Any, ...]] = operator._admin.asked  # type: ignore[attr-defined]
    return asked


def test_nothing_is_changed_without_a_second_key(operator: Operator) -> None:
    for key in "pre":
        assert press(operator, key, "n", "y") == []
    assert press(operator, "e", "x") == []
    assert operator.view.message == "nothing was changed"


def test_a_session_is_paused_resumed_and_closed(operator: Operator) -> None:
    press(operator, "down")  # nightly: one paused, one running
    assert press(operator, "p", "y") == [("pause_call", "0000000000c2")]
    assert press(operator, "r", "y")[1:] == [("resume_call", "0000000000c1")]
    assert press(operator, "e")[2:] == []
    assert operator.view.prompt == ("Close session nightly with its agent and all its calls? y/n")
    assert press(operator, "y")[2:] == [("close_session", "nightly")]


def test_one_call_is_reached_and_paused(operator: Operator) -> None:
    press(operator, "down", "enter", "down", "p")
    assert operator.view.prompt == "Pause call 0000000000c2 (ld of nightly)? y/n"
    assert press(operator, "y") == [("pause_call", "0000000000c2")]


def test_limits_are_typed_shown_and_set(operator: Operator) -> None:
    assert press(operator, "l", *"memory_max=2Gx", "backspace", *" cpu-max=1.5", "enter") == []
    assert "Set memory_max=2G cpu-max=1.5 of session refactor-7?" in operator.view.prompt
    assert press(operator, "y") == [
        ("update_session", "refactor-7", ("memory_max", "2G"), ("cpu_max", "1.5"))
    ]


def test_limits_that_are_none_are_refused_at_once(operator: Operator) -> None:
    assert press(operator, "l", *"colour=red", "enter", "y") == []
    assert press(operator, "l", *"colour=red", "enter") == []
    assert "'colour=red' is no limit" in operator.view.message


def test_filter_and_escape(operator: Operator) -> None:
    press(operator, "/", *"nig", "enter")
    assert operator.view.wanted == "nig"
    press(operator, "/", *"x", "escape")
    assert (operator.view.wanted, operator.view.prompt) == ("nig", "")


def test_what_the_daemon_refuses_is_said(operator: Operator) -> None:
    press(operator, "enter", "enter")
    assert operator.view.message.startswith("nothing is known of")
    assert operator.view.mode == "session"


def test_keys_as_terminals_send_them() -> None:
    data = b"\033[A\033OBq\xc3\xa4\x7f\r\033"
    assert list(terminal.keys_of(data)) == ["up", "down", "q", "ä", "backspace", "enter", "escape"]
    assert list(terminal.keys_of(b"\x00\xff")) == []


def test_looks_take_at_most_a_twentieth_of_the_time() -> None:
    assert rest_s(2, 0.01, 0.005) == 2
    assert rest_s(2, 0.5, 0.1) == 0.5 * REST == 10
    busy = rest_s(2, 5, 0.025)
    assert busy == pytest.approx(REST * BOTH * 0.025), "it waited, most of the time"
    assert 1 / (1 + REST) < 0.05


# The command


def agentcg(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def test_once_and_json(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    with Agent() as agent, agent.tool_call("build"):
        text = agentcg(capsys, "top", "--once")
        found = json.loads(agentcg(capsys, "top", "--json"))
    assert "WHAT WOULD HELP" in text and "\033" not in text and "quit" not in text
    assert {*found} == {"pool", "sessions", "calls", "advice"}
    assert found["calls"][0]["name"] == "build"
    assert {*found["calls"][0]["rate"]} == {"cores", "io_bytes", "net_bytes"}


def test_pause_and_resume(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    with Agent() as agent, agent.tool_call("build") as call:
        assert "is paused until" in agentcg(capsys, "pause", call.id, "--why", "lunch")
        assert daemon.calls[call.id].paused_why == "lunch"
        assert "goes on" in agentcg(capsys, "resume", call.id)


def test_a_terminal_is_given_back_as_it_was(daemon: FakeDaemon) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    argv = [sys.executable, "-c", "import sys; from agentcgroup import cli; sys.exit(cli.main())"]
    process = subprocess.Popen(
        [*argv, "top", "--watch", "0.2"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )
    text, deadline = b"", time.monotonic() + 60
    while text.count(b"WHAT WOULD HELP") < 3 and time.monotonic() < deadline:
        if select.select([master], [], [], 1)[0]:
            text += os.read(master, 65536)
    assert b"\033[?1049h" in text and text.count(b"WHAT WOULD HELP") >= 3, text
    os.write(master, b"q")
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            text += os.read(master, 65536)
    if select.select([master], [], [], 1)[0]:
        text += os.read(master, 65536)
    assert process.wait(timeout=10) == 0
    assert text.rstrip().endswith(b"\033[?1049l")
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


def test_an_interval_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "x", "nan"):
        assert cli.main(["top", "--watch", text]) == 2
    assert "is no number of seconds" in capsys.readouterr().err
    assert INTERVAL_S == 2
