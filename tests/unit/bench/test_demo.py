"""The demo's arithmetic, its verdict and its view. That it runs is shown in the guest."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentcgroup_lab.replay import engine
from agentcgroup_lab.replay.backends import ReplayError
from agentcgroup_lab.replay.meeting import ENDED, HELD, REACHED, Meeting, Place
from agentcgroup_lab.replay.progress import Progress, SessionProgress
from agentcgroup_lab.replay.result import (
    CallResult,
    Outcome,
    ReplayResult,
    SessionResult,
    SessionState,
    StrategyResult,
    Timeline,
)
from agentcgroup_lab.trace import plan
from agentcgroup_lab.trace.plan import PlannedCall, Step
from bench.demo import choose, verdict
from bench.demo.__main__ import RECORDINGS, _undisturbed
from bench.demo.beside import run_beside
from bench.demo.live import Lines, View

FAST = choose.Speed(touch_bytes_per_s=8e9, free_bytes=64 * 10**9)
SMALL = choose.Speed(touch_bytes_per_s=200e6, free_bytes=1500 * 10**6)
MB = 10**6


def chosen(scale: float) -> choose.Choice:
    options = plan.Options(memory_scale=scale, speed=5.0)
    return choose.choose(choose.load_recordings(RECORDINGS), options)


@pytest.mark.parametrize("scale", choose.SCALES)
def test_the_contrast_is_certain_with_the_own_recordings_at_every_scale(scale: float) -> None:
    choice = chosen(scale)
    assert choice.weakness() == ""
    first, *others = choice.peaks
    agents = [
        choose.agent_least_bytes(one, call)
        for one, call in zip(choice.plans, choice.peaks, strict=True)
    ]
    # Any one session can finish; all together cannot, and neither can those that are left when
    # the kernel has killed the largest, which is the important session's.
    assert first.peak_bytes + sum(map(choose.agent_bytes, choice.plans)) < choice.pool_bytes
    assert sum(call.peak_bytes for call in others) + sum(agents) > choice.pool_bytes
    room = choice.pool_bytes - first.peak_bytes - sum(agents)
    assert first.peak_bytes > max(room, max(call.peak_bytes for call in others))
    assert not choice.may_lose_an_agent()
    # An even part kills the largest call of each, which is more than all of them but one.
    assert all(choice.too_large(one) for one in choice.plans)


def test_a_pool_that_is_full_while_the_second_call_is_small_may_cost_an_agent() -> None:
    choice = chosen(1.0)
    agents = sum(map(choose.agent_bytes, choice.plans))
    full_early = agents + choice.peaks[0].peak_bytes + (4 << 20)
    assert replace(choice, pool_bytes=full_early).may_lose_an_agent()


@pytest.mark.parametrize("speed", [FAST, SMALL])
def test_the_others_are_there_before_the_important_call_is_at_its_peak(
    speed: choose.Speed,
) -> None:
    choice = chosen(choose.shrink(chosen(1.0), speed, 18.0))
    meeting, delays_s = choose.meet(choice, 18.0)
    first, *others = choice.peaks
    reached_s = delays_s[0] + choose.peak_at_s(first)
    assert min(delays_s) == 0.0
    for delay_s, call in zip(delays_s[1:], others, strict=True):
        assert delay_s + call.start_s == pytest.approx(reached_s - 1.8, abs=0.01)
    assert meeting.leader == "s1" and set(meeting.calls) == {"s1", "s2", "s3", "s4"}
    assert meeting.alone().calls == {"s1": first.index}


def test_the_scale_is_what_the_machine_can_touch_and_has() -> None:
    choice = chosen(1.0)
    assert choose.shrink(choice, FAST, 18.0) == 1.0
    little = replace(FAST, free_bytes=choice.pool_bytes)
    assert choose.shrink(choice, little, 18.0) == 0.5
    with pytest.raises(ReplayError, match="too small: it touches 1 MiB a second"):
        choose.shrink(choice, replace(FAST, touch_bytes_per_s=1e6), 18.0)


def test_recordings_without_contrast_are_refused() -> None:
    recordings = choose.load_recordings(RECORDINGS)
    same = {f"r{number}": recordings["analyse"] for number in range(4)}
    with pytest.raises(ReplayError, match="no recording has a call that is clearly larger"):
        choose.choose(same, plan.Options())


def test_too_few_recordings(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="holds 0 recordings"):
        choose.load_recordings(tmp_path)


def test_a_missing_load_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_load", lambda: "/bin/false")
    with pytest.raises(ReplayError, match="/bin/false ended with"):
        choose.measure()


# --- the meeting ---------------------------------------------------------------------------------

CALL = PlannedCall(
    3, "c", "g++", 1.0, 2.0, 0.5, False, (Step(10, 5, 1), Step(20, 9, 2), Step(30, 0, 3))
)


def test_the_leader_rises_first_and_holds_its_peak(tmp_path: Path) -> None:
    place = Place(Meeting("s1", {"s1": 3, "s2": 3}, 1.5), tmp_path)
    leader = place.schedule("s1", CALL).splitlines()
    assert leader == [
        "10 5 1",
        "20 9 2",
        f"tell {tmp_path}/reached-s1",
        "1500 9 0",
        f"await {tmp_path}/part",
        "30 0 3",
    ]
    other = place.schedule("s2", CALL).splitlines()
    assert other[0] == f"await {tmp_path}/rise-s2" and "1500 9 0" not in other
    assert place.schedule("s3", CALL) == "10 5 1\n20 9 2\n30 0 3\n"
    assert place.schedule("s1", replace(CALL, index=4)) == "10 5 1\n20 9 2\n30 0 3\n"


def test_nobody_parts_before_each_is_at_its_peak_has_ended_or_is_held(tmp_path: Path) -> None:
    place = Place(Meeting("s1", {"s1": 3, "s2": 3, "s3": 3}, 1.0), tmp_path)
    ended: set[str] = set()
    held: set[str] = set()

    def look() -> None:
        place.look(lambda name, index: name in ended, lambda name, index: name in held)

    look()
    assert not list(tmp_path.glob("rise*"))
    (tmp_path / "reached-s1").touch()
    held.add("s3")
    look()
    assert [path.name for path in tmp_path.glob("rise*")] == ["rise-s2"]
    ended.add("s2")
    held.remove("s3")
    look()
    assert (tmp_path / "rise-s3").exists() and not (tmp_path / "part").exists()
    held.add("s3")
    look()
    assert (tmp_path / "part").exists()
    assert place.became == {"s1": REACHED, "s2": ENDED, "s3": HELD}


def test_a_leader_that_was_killed_keeps_nobody_waiting(tmp_path: Path) -> None:
    place = Place(Meeting("s1", {"s1": 3, "s2": 3}, 1.0), tmp_path)
    place.look(lambda name, index: True, lambda name, index: False)
    assert (tmp_path / "part").exists()
    assert place.became == {"s1": ENDED, "s2": ENDED}


def test_what_the_leader_waited_for_who_was_late_is_known(tmp_path: Path) -> None:
    place = Place(Meeting("s1", {"s1": 3, "s2": 3}, 1.5), tmp_path)
    assert place.waited_s() == 0.0  # nobody came at all
    (tmp_path / "reached-s1").touch()
    (tmp_path / "reached-s2").touch()
    place.look(lambda name, index: False, lambda name, index: False)
    os.utime(tmp_path / "reached-s1", (1000.0, 1000.0))
    for parted_s, waited_s in ((1001.0, 0.0), (1001.5, 0.0), (1004.0, 2.5)):
        os.utime(tmp_path / "part", (parted_s, parted_s))
        assert place.waited_s() == pytest.approx(waited_s)


# --- two replays at once -------------------------------------------------------------------------


def both_started(how: engine.EngineOptions, seconds: float) -> StrategyResult:
    assert how.together is not None
    how.together.wait(10)  # broken where the other does not come
    return strategy("none", "ff", "ff", seconds, ENDED)


def test_two_replays_start_together() -> None:
    first, other = run_beside(
        lambda how: both_started(how, 1.0),
        engine.EngineOptions(),
        lambda how: both_started(how, 2.0),
        engine.EngineOptions(),
    )
    assert (first.sessions[0].seconds, other.sessions[0].seconds) == (1.0, 2.0)


def waits_for_the_other(how: engine.EngineOptions) -> StrategyResult:
    engine.wait_for_others(how)
    raise AssertionError("the other never came")


def cannot_start(how: engine.EngineOptions) -> StrategyResult:
    raise ReplayError("no memory controller")


@pytest.mark.parametrize("first", [waits_for_the_other, cannot_start])
def test_the_error_of_the_one_that_failed_is_told(
    first: Callable[[engine.EngineOptions], StrategyResult],
) -> None:
    other = cannot_start if first is waits_for_the_other else waits_for_the_other
    with pytest.raises(ReplayError, match="no memory controller"):
        run_beside(first, engine.EngineOptions(), other, engine.EngineOptions())


def test_once_the_others_hold_the_pool_the_important_session_asks_for_what_is_always_free() -> None:
    choice = chosen(0.2)
    first, peak = choice.plans[0], choice.peaks[0]
    after = [call.peak_bytes for call in first.calls if call.index > peak.index]
    assert after and max(after) <= choose.ALWAYS_FREE * choice.pool_bytes
    before = [call.peak_bytes for call in first.calls if call.index < peak.index]
    assert max(before) > choose.ALWAYS_FREE * choice.pool_bytes


# --- the verdict ---------------------------------------------------------------------------------


def session(name: str, outcomes: str, seconds: float) -> SessionResult:
    words: dict[str, Outcome] = {"f": "finished", "k": "killed", "n": "not run", "r": "refused"}
    calls = tuple(
        CallResult(index, "g++", words[letter], 1.0, 5) for index, letter in enumerate(outcomes)
    )
    state: SessionState = "lost" if "n" in outcomes else "finished"
    return SessionResult(name, "r", name == "s1", state, 0.0, seconds, 9.0, 5, 5, 0, calls)


def strategy(name: str, first: str, second: str, seconds: float, met: str) -> StrategyResult:
    sessions = (session("s1", first, seconds), session("s2", second, 12.0))
    timeline = Timeline((0.0,), (5,), {"s1": (5,), "s2": (5,)})
    came = {"s1": REACHED, "s2": met}
    return StrategyResult(name, 100 * MB, 12.0, sessions, timeline, (), (), came)


def replayed(
    none: str = "fk", static: str = "kk", ours: str = "ff", seconds: float = 10.4
) -> ReplayResult:
    alone = strategy("none", "ff", "", 10.0, ENDED)
    alone = replace(alone, sessions=alone.sessions[:1], met={"s1": REACHED})
    results = (
        strategy("none", none, "ff", 9.0, ENDED),
        strategy("static", static, "nn", 8.0, ENDED),
        strategy("ours", ours, "ff", seconds, HELD),
    )
    return ReplayResult("7", "native", 1.0, 5.0, results, {}, alone)


def both(seconds: float, first: str = "ff") -> tuple[StrategyResult, StrategyResult]:
    alone = strategy("none", "ff", "", 10.0, ENDED)
    return strategy("ours", first, "ff", seconds, HELD), alone


@pytest.mark.parametrize(
    ("tries", "runs", "seconds"),
    [
        ([both(10.4)], 1, 10.4),
        ([both(12.0), both(10.2)], 2, 10.2),
        ([both(12.0), both(11.0), both(13.0), both(14.0)], 4, 11.0),
        ([both(12.0, "fk"), both(10.2)], 1, 12.0),  # what is lost is not tried again
        ([both(12.0), both(10.2, "fk")], 2, 10.2),
    ],
)
def test_a_disturbed_time_is_measured_again_and_a_lost_call_is_not(
    tries: list[Any], runs: int, seconds: float
) -> None:
    left = list(tries)
    found, _ = _undisturbed(lambda: left.pop(0), Lines(io.StringIO()))
    assert verdict.seconds_of_important(found) == seconds
    assert len(tries) - len(left) == runs


def test_what_is_claimed_is_said_in_three_sentences() -> None:
    result = replayed()
    assert verdict.failures(result) == []
    none, static, ours = verdict.sentences(result)
    assert none == "Without control 1 of 4 calls were lost, 1 of them the important session's."
    assert static == "With an even part of 48 MiB for each, 4 were lost, and 1 agent with them."
    assert ours.endswith("took 10.4 s, 1.04 times its 10.0 s alone at the same time.")
    assert "agentcgroup lost none" in ours
    table = verdict.table(result).splitlines()
    assert table[-1].startswith("important alone ")
    assert max(map(len, table)) <= 80, "a terminal's width"


def test_what_the_meeting_itself_cost_is_not_the_daemon_s() -> None:
    result = replayed(seconds=13.0)
    assert verdict.of_alone(result) == pytest.approx(1.3)
    *others, ours = result.strategies
    late = replace(result, strategies=(*others, replace(ours, meeting_waited_s=2.8)))
    assert verdict.of_alone(late) == pytest.approx(1.02)
    assert verdict.failures(late) == []


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (replayed(none="ff"), "without control the important session lost no call"),
        (replayed(ours="fr"), "agentcgroup lost 1 calls"),
        (replayed(seconds=10.6), "took 1.060 times its time alone"),
        (
            replace(
                replayed(),
                strategies=(
                    *replayed().strategies[:1],
                    strategy("static", "kf", "ff", 8.0, ENDED),
                    *replayed().strategies[2:],
                ),
            ),
            "no more than no control",
        ),
        (
            replace(
                replayed(),
                strategies=(
                    strategy("none", "fk", "ff", 9.0, HELD),
                    *replayed().strategies[1:],
                ),
            ),
            "nobody did so",
        ),
    ],
)
def test_what_does_not_hold_is_named(result: ReplayResult, said: str) -> None:
    assert any(said in text for text in verdict.failures(result))


# --- the view ------------------------------------------------------------------------------------


def at(passed_s: float) -> Progress:
    first = SessionProgress("s1", True, 50 * MB, 2, 1, 9, "", "g++", False)
    second = SessionProgress("s2", False, 25 * MB, 3, 0, 9, "", "pytest", True)
    return Progress("ours", passed_s, 75 * MB, 100 * MB, (first, second))


def test_the_view_is_drawn_in_place() -> None:
    out = io.StringIO()
    view = View(out)
    view.begin("two sessions, agentcgroup")
    view.watch(at(1.0))
    once = out.getvalue()
    assert "[" + "1" * 22 + "2" * 11 + "." * 11 + "]" in once
    assert "pytest paused" in once and "1 killed" in once and "\x1b[4A" not in once
    view.watch(at(1.2))
    assert out.getvalue().removeprefix(once).startswith("\x1b[4A\x1b[0J")


def test_lines_are_plain_and_few() -> None:
    out = io.StringIO()
    lines = Lines(out)
    lines.begin("two sessions")
    for tenth in range(50):
        lines.watch(at(tenth / 10))
    assert out.getvalue().count("\n") == 3 and "\x1b" not in out.getvalue()
