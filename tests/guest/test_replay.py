"""Replay and record on a real kernel, small: what limits do to sessions, and that nothing stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup_lab.replay import engine
from agentcgroup_lab.replay.result import SessionResult, StrategyResult
from agentcgroup_lab.trace import format as trace_format
from agentcgroup_lab.trace import plan, record
from agentcgroupd.cgroup.tree import cgroup2_mount
from tests.conftest import StartDaemon
from tests.harness import EXEC, PATIENCE

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MB = 1_000_000
AGENT_MB, RISE_MB = 40.0, 120.0


def recorded(name: str, stays_s: int) -> trace_format.Trace:
    """Two calls: a small one, and one that rises by RISE_MB and stays there."""
    levels = [AGENT_MB] * 10 + [AGENT_MB + 10] * 5 + [AGENT_MB] * 5
    levels += [AGENT_MB + RISE_MB] * (10 * stays_s) + [AGENT_MB] * 10
    samples = tuple(trace_format.TraceSample(i / 10, mb, 5.0, 5.0) for i, mb in enumerate(levels))
    calls = (
        trace_format.TraceCall(0.95, 1.45, "a", "git", "git status"),
        trace_format.TraceCall(1.75, 1.95 + stays_s, "b", "pytest", "pytest -q"),
    )
    return trace_format.Trace(name, "made", 0.1, samples, calls)


def sessions(n: int, stays_s: int = 2) -> list[engine.SessionSpec]:
    plans = {name: plan.make_plan(recorded(name, stays_s)) for name in (f"s{i}" for i in range(n))}
    return [
        engine.SessionSpec(name, "made", made, important=name == "s0")
        for name, made in plans.items()
    ]


def run(strategy: str, n: int, pool_mb: float, stays_s: int = 2) -> StrategyResult:
    options = engine.EngineOptions(timeout_s=120)
    result = engine.run_strategy(
        strategy, sessions(n, stays_s), int(pool_mb * MB), options, say=lambda line: print(line)
    )
    assert result.leaks == ()
    assert not list(cgroup2_mount().glob("agentcg-replay-*"))
    return result


def outcomes(session: SessionResult) -> list[str]:
    return [call.outcome for call in session.calls]


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTCG_LOAD", LOAD)
    monkeypatch.setenv("AGENTCG_EXEC", EXEC)


def test_with_room_enough_all_follow_their_recording() -> None:
    result = run("none", 2, 600)
    for session in result.sessions:
        assert session.state == "finished"
        assert outcomes(session) == ["finished", "finished"]
        assert session.ended_s >= session.planned_s - 0.1
        # The level of the recording, and the little that interpreter and load need themselves.
        assert session.peak_bytes is not None
        assert 0.9 <= session.peak_bytes / MB / (AGENT_MB + RISE_MB) <= 1.2
        big = session.calls[1]
        assert big.began_s is not None and big.ended_s is not None
        assert big.ended_s - big.began_s >= big.planned_s - 0.01


def test_a_static_split_kills_what_the_pool_could_have_held() -> None:
    result = run("static", 2, 2 * (AGENT_MB + RISE_MB / 2))
    for session in result.sessions:
        assert outcomes(session)[0] == "finished"
        assert outcomes(session)[1] == "killed"
        assert session.oom_kills is not None and session.oom_kills >= 1
        assert session.state in ("finished", "lost")


def test_the_daemon_brings_all_through_a_pool_too_small_for_all_peaks() -> None:
    # Both peaks together are 320 MB; one peak beside the other agent is 200 MB. They last so long
    # that they meet, also where one call rises seconds later than the other.
    result = run("ours", 2, 270, stays_s=8)
    assert [session.state for session in result.sessions] == ["finished", "finished"]
    assert [outcomes(session) for session in result.sessions] == [["finished"] * 2] * 2
    assert {call.verdict for session in result.sessions for call in session.calls} == {"ok"}
    important, other = result.sessions
    assert not any(call.frozen for call in important.calls)
    assert any(call.frozen for call in other.calls)
    assert max(result.timeline.pool_bytes) <= result.limit_bytes


def test_a_driver_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stuck = tmp_path / "load"
    stuck.write_text("#!/bin/sh\nexec sleep 3600\n")
    stuck.chmod(0o755)
    monkeypatch.setenv("AGENTCG_LOAD", str(stuck))
    options = engine.EngineOptions(timeout_s=3 + PATIENCE / 6)
    result = engine.run_strategy("none", sessions(1), 300 * MB, options)
    assert result.sessions[0].state == "timed out"
    assert outcomes(result.sessions[0]) == ["killed", "not run"]
    assert not list(cgroup2_mount().glob("agentcg-replay-*"))


def test_a_recording_of_a_session_is_what_ran_in_it(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon("")
    output = tmp_path / "s.jsonl.gz"
    agent = daemon.open("s")
    command = [
        sys.executable,
        "-m",
        "tests.guest.test_replay",
        "s",
        str(output),
        str(daemon.run_dir),
    ]
    recorder = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert recorder.stderr is not None
    assert "recording s" in recorder.stderr.readline()
    agent.run(
        """
tool = subprocess.Popen([EXEC, "--name", "grow", "--", LOAD],
                        stdin=subprocess.PIPE, text=True)
tool.communicate(f"1500 {80 << 20} 20\\n500 {80 << 20} 0\\n")
result = tool.returncode
""",
        LOAD=LOAD,
    )
    agent.close()
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="s"))
    assert recorder.wait(10 * PATIENCE) == 0
    made = trace_format.read(output)
    assert made.task == "s"
    (call,) = made.calls
    assert call.tool == "grow"
    assert (call.command or "").startswith(LOAD)
    assert 2.0 <= call.end_s - call.start_s
    before = max(sample.mem_mb for sample in made.samples if sample.t_s < call.start_s)
    inside = max(s.mem_mb for s in made.samples if call.start_s <= s.t_s <= call.end_s)
    assert 80 <= inside - before <= 100
    assert len(made.samples) + made.extra["missed_samples"] == pytest.approx(
        made.duration_s / 0.1, abs=3
    )
    # What was recorded can be replayed.
    assert plan.make_plan(made).calls[0].peak_bytes > 70 * MB


def main() -> None:
    """Record in a process of its own: signals are its own, too."""
    session, output, run_dir = sys.argv[1:]
    made = record.record(
        session,
        Path(output),
        run_dir=run_dir,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(len(made.samples)))


if __name__ == "__main__":
    main()
