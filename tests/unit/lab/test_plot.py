"""A replay's result is the same after JSON, its table names what happened, its picture shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agentcgroup_lab.replay import plot, result

MIB = 1 << 20


def call(index: int, outcome: result.Outcome, start_s: float, end_s: float) -> result.CallResult:
    ran = outcome != "not run"
    return result.CallResult(
        index=index,
        tool="Bash",
        outcome=outcome,
        planned_s=1.0,
        planned_peak_bytes=100 * MIB,
        began_s=start_s if ran else None,
        ended_s=end_s if ran else None,
        term_signal=9 if outcome == "killed" else None,
        frozen=(result.Span(start_s + 0.2, end_s - 0.2),) if index == 1 else (),
    )


def session(name: str, important: bool, state: result.SessionState) -> result.SessionResult:
    outcomes: tuple[result.Outcome, ...] = ("finished", "finished", "killed", "not run")
    return result.SessionResult(
        id=name,
        recording=f"recording-of-{name}-{'x' * 60}",
        important=important,
        state=state,
        began_s=0.5,
        ended_s=9.0,
        planned_s=8.0,
        planned_peak_bytes=300 * MIB,
        peak_bytes=290 * MIB,
        oom_kills=1,
        calls=tuple(
            call(i, outcome, 1.0 + 2 * i, 2.5 + 2 * i) for i, outcome in enumerate(outcomes)
        ),
        alloc_latency=result.Latency(10, 1.0, 2.0, 3.0, 4.0),
    )


@pytest.fixture
def replayed() -> result.ReplayResult:
    sessions = (session("s1", False, "lost"), session("s2", True, "finished"))
    times = tuple(float(i) for i in range(10))
    timeline = result.Timeline(
        times,
        (300 * MIB,) * 10,
        {"s1": (100 * MIB,) * 9 + (None,), "s2": tuple(i * 20 * MIB for i in range(10))},
    )
    strategies = tuple(
        result.StrategyResult(name, 512 * MIB, 9.5, sessions, timeline, leaks)
        for name, leaks in (("none", ()), ("static", ()), ("ours", ("/pool/s1/call-1",)))
    )
    return result.ReplayResult("7.0", "here", 0.5, 2.0, strategies, {"pool": "why"})


def test_a_result_is_the_same_after_json(replayed: result.ReplayResult, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    replayed.write(path)
    assert result.read(path) == replayed
    assert list(tmp_path.iterdir()) == [path]
    path.write_text('{"schema": "other/1"}')
    with pytest.raises(ValueError, match="agentcgroup-replay/1"):
        result.read(path)


def test_the_table_has_a_line_for_each_session(replayed: result.ReplayResult) -> None:
    lines = result.table(replayed.strategies).splitlines()
    assert re.search(r"^none +s1 +2/4 +1 +0 +1 +8.5 s +290 MiB +lost$", lines[2])
    assert re.search(r"^ +s2 \* +2/4 .* finished$", lines[3])
    assert [line.strip() for line in lines if "leaked" in line] == [
        "cgroups leaked: 0; 9.5 s in all",
        "cgroups leaked: 0; 9.5 s in all",
        "cgroups leaked: 1; 9.5 s in all",
    ]


def test_the_picture_names_strategies_and_sessions(
    replayed: result.ReplayResult, tmp_path: Path
) -> None:
    mpl = pytest.importorskip("matplotlib")
    png, svg = tmp_path / "m.png", tmp_path / "m.svg"
    with mpl.rc_context({"svg.fonttype": "none"}):
        plot.save(replayed, [png, svg])
    assert png.read_bytes().startswith(b"\x89PNG")
    width = int.from_bytes(png.read_bytes()[16:20], "big")
    assert width == 1400
    text = svg.read_text(encoding="utf-8")
    for words in (
        "no control: 4 of 8 calls finished, 2 killed, 1 agent lost",
        "static split (256 MiB each)",
        "agentcgroup: ",
        "pool limit 512 MiB",
        "s2 (important)",
        "agent lost",
        "call frozen",
    ):
        assert words in text, words


def test_every_axis_is_the_same(replayed: result.ReplayResult) -> None:
    pytest.importorskip("matplotlib")
    axes = plot.draw(replayed).axes
    assert len(axes) == 2 * len(replayed.strategies)
    assert len({one.get_xlim() for one in axes}) == 1
    assert len({one.get_ylim() for one in axes[::2]}) == 1
