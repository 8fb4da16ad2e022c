"""`agentcg history`, `agentcg explain` and `agentcg report --session`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from agentcgroup import Admin, Agent, InvalidIntent
from agentcgroup.cli.history import BAD
from agentcgroup.types import Verdict
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.unit.fake_daemon import FakeDaemon, running
from tests.unit.sdk.test_cli import Cli


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon that knows of five ended calls, two of which did not end well."""
    for fake in running(monkeypatch):
        with Agent() as agent:
            for code in (0, 3, 0, 0, 4):
                agent.run(["sh", "-c", f"exit {code}"])
        yield fake


@pytest.fixture
def agent_only(daemon: FakeDaemon) -> FakeDaemon:
    """The same, seen from a container."""
    (daemon.run_dir / "admin" / "grpc.sock").unlink()
    return daemon


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def test_history_is_a_table_newest_first(daemon: FakeDaemon, run: Cli) -> None:
    head, *rows = run("history").splitlines()
    assert head.split()[:5] == ["ENDED", "CALL", "SESSION", "TOOL", "VERDICT"]
    assert [row.split()[2] for row in rows] == ["c5", "c4", "c3", "c2", "c1"]
    assert [each["call_id"] for each in run.json("history", "--limit", "2")] == ["c5", "c4"]


def test_history_by_verdict(daemon: FakeDaemon, run: Cli) -> None:
    found = run.json("history", "--verdict", "failed")
    assert [each["call_id"] for each in found] == ["c5", "c2"]
    assert run.json("history", "--verdict", BAD) == found
    both = run.json("history", "--verdict", "ok", "--verdict", BAD)
    assert len(both) == 5
    run("history", "--verdict", "good", code=2)
    assert "--verdict: 'good' cannot be used" in run.err
    assert "no call has ended" in run("history", "--verdict", "timeout")


def test_history_since_is_asked_of_the_daemon(daemon: FakeDaemon, run: Cli) -> None:
    asked: list[pb.ListHistoryRequest] = []
    daemon.before["ListHistory"] = asked.append
    run("history", "--since", "2h", "--session", "web", "--limit", "7")
    (request,) = asked
    assert (request.session_id, request.limit) == ("web", 7)
    assert abs(request.since_unix_usec / 1e6 - (time.time() - 7200)) < 60
    run("history", "--since", "soon", code=2)
    assert "'soon'" in run.err


def test_history_inside_a_session_is_its_own(agent_only: FakeDaemon, run: Cli) -> None:
    assert len(run.json("history")) == 5
    assert len(run.json("history", "--session", "s1")) == 5
    run("history", "--session", "other", code=4)
    assert "'other'" in run.err
    run("history", "--sessions", code=3)


def test_past_sessions(daemon: FakeDaemon, run: Cli) -> None:
    head, row = run("history", "--sessions").splitlines()
    assert head.split()[:3] == ["OPENED", "CLOSED", "SESSION"]
    assert "old" in row and "2.50 s" in row and "the operator closed it" in row
    assert " -  " in row, "memory was not measured"
    (past,) = run.json("history", "--sessions")
    assert (past["sums"]["calls_not_ok"], past["sums"]["memory_byte_seconds"]) == (1, None)
    assert past["session"]["id"] == "old"


def test_explain_tells_in_order(daemon: FakeDaemon, run: Cli) -> None:
    text = run("explain", "c2")
    assert text.splitlines()[0] == "call c2  sh  (session s1): failed"
    places = [
        text.index(part)
        for part in (
            ".000  It asked for memory 512 MiB.",
            "  ... 2 more",
            ".001  It was paused: room.",
            "what to know, and what to try",
            "Ask for more memory_max.",
        )
    ]
    assert places == sorted(places)
    found = run.json("explain", "c2")
    assert [step["what"] for step in found["steps"]] == ["asked", "freeze"]
    assert found["report"]["verdict"] == "failed"
    run("explain", "nobody", code=5)
    assert "'nobody'" in run.err


def test_report_of_a_session(daemon: FakeDaemon, run: Cli) -> None:
    assert run.json("report", "--session", "s1")["call_id"] == "c5"
    assert len(run.json("report", "--session", "s1", "--limit", "2")) == 2
    run("report", "--session", "s1", "--check", code=1)
    run("report", "c1", "--session", "s1", code=2)
    assert "not asked for together" in run.err
    daemon.reports.clear()
    run("report", "--session", "s1", code=5)
    assert "'s1'" in run.err


def test_report_of_another_session_is_not_for_agents(agent_only: FakeDaemon, run: Cli) -> None:
    assert run.json("report", "--session", "s1")["call_id"] == "c5"
    run("report", "--session", "other", code=4)
    assert "'other'" in run.err


def test_the_sdk_asks_for_history(daemon: FakeDaemon) -> None:
    with Agent() as agent, Admin() as admin:
        assert [r.call_id for r in agent.history(limit=4)] == ["c5", "c4", "c3", "c2"]
        assert [r.call_id for r in admin.history(verdicts=[Verdict.FAILED])] == ["c5", "c2"]
        assert admin.past_sessions()[0].closed_why == "the operator closed it"
        story = agent.story("c1")
        assert (story.report, story.steps[1].what) == (agent.report("c1"), "freeze")
        with pytest.raises(InvalidIntent) as refused:
            agent.history(verdicts=["good"])
    assert (refused.value.field, refused.value.value) == ("verdicts", "good")
    assert "timeout" in refused.value.allowed


def test_usage(daemon: FakeDaemon, run: Cli) -> None:
    asked: list[pb.ListUsageRequest] = []
    daemon.before["ListUsage"] = asked.append
    head, row = run("usage", "--by", "tool", "--session", "web", "--since", "1d").splitlines()
    assert head.split()[:2] == ["TOOL", "CALLS"]
    assert row.split()[:5] == ["web", "4", "0", "90.0", "0.000977"]
    (request,) = asked
    assert (request.by, request.session_id) == (pb.USAGE_BY_TOOL, "web")
    assert abs(request.since_unix_usec / 1e6 - (time.time() - 86_400)) < 60
    (each,) = run.json("usage")
    assert (each["key"], each["sums"]["memory_peak_bytes"]) == ("web", None)
    daemon.before["ListUsage"] = asked.append
    run("usage", "--by", "label")
    assert asked[-1].by == pb.USAGE_BY_LABEL
    run("usage", "--by", "colour", code=2)
    with Admin() as admin, pytest.raises(InvalidIntent, match="session, tool, day"):
        admin.usage("colour")
