"""History of a real daemon: asked by the operator and by agents, across restarts and kill -9."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from agentcgroup import Admin, CallNotFound, InvalidIntent
from agentcgroup.types import Verdict
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.rows import GONE
from tests.conftest import StartDaemon
from tests.harness import EXEC, AgentProcess, DaemonProcess, RemoteRpcError, wait_until

FRONT = str(Path(EXEC).with_name("agentcg"))
RUN = "result = agent.run(argv, **intent).call_id"


@pytest.fixture
def fresh(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon that a test may kill."""
    return start_daemon("")


def ran(agent: AgentProcess, *argv: str, **intent: str) -> str:
    """Run a command as a call; returns its id."""
    call_id: str = agent.run(RUN, argv=list(argv), intent=intent)
    return call_id


def close(daemon: DaemonProcess, session_id: str) -> None:
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id=session_id))


def agentcg(daemon: DaemonProcess, *argv: str) -> str:
    """What the command prints for the operator."""
    env = {**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    done = subprocess.run([FRONT, *argv], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_closed_sessions_and_their_calls_are_known_after_a_restart(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha", priority="important")
    good = ran(agent, "true")
    bad = ran(agent, "sh", "-c", "exit 3", memory_max="64M", call_timeout="10s")
    before = fresh.admin.GetReport(pb.GetReportRequest(call_id=bad))
    agent.close()
    with Admin(str(fresh.run_dir)) as admin:
        assert len(admin.history()) == 2, "what was asked for is written"
    close(fresh, "alpha")
    fresh.kill()
    fresh.start()
    with Admin(str(fresh.run_dir)) as admin:
        wait_until("the log was read", lambda: GONE not in admin.past_sessions()[0].closed_why)
        assert [report.call_id for report in admin.history()] == [bad, good]
        assert [r.call_id for r in admin.history(verdicts=[Verdict.FAILED])] == [bad]
        assert admin.report().call_id == bad
        assert [r.call_id for r in admin.reports(5, "alpha")] == [bad, good]
        (past,) = admin.past_sessions()
        assert past.session is not None and past.sums is not None
        assert (past.session.id, past.session.priority) == ("alpha", 80)
        assert past.closed_unix_usec > past.session.opened_unix_usec
        assert past.closed_why == "the operator closed it"
        assert (past.sums.calls, past.sums.calls_not_ok) == (2, 1)
        story = admin.story(bad)
        with pytest.raises(CallNotFound):
            admin.report("none")
    assert fresh.admin.GetReport(pb.GetReportRequest(call_id=bad)) == before
    assert [step.what for step in story.steps][:2] == ["asked", "granted"]
    assert story.steps[0].sentence == "It asked for memory_max 64 MiB, timeout 10 s."
    assert story.steps[-1].what == "ended" and "Verdict: failed" in story.steps[-1].sentence
    assert bad in agentcg(fresh, "history", "--verdict", "bad")
    assert "It asked for memory_max 64 MiB" in agentcg(fresh, "explain", bad)
    assert f"{bad}  sh  (session alpha)" in agentcg(fresh, "report", "--session", "alpha")


def test_use_is_added_up_by_labels_that_stay_with_a_session(fresh: DaemonProcess) -> None:
    with Admin(str(fresh.run_dir)) as admin:
        with pytest.raises(InvalidIntent) as refused:
            admin.open_session("bad", labels={"team": "a\nb"})
        assert (refused.value.field, refused.value.value) == ("labels[team]", "a\nb")
    web = fresh.open("web", labels={"team": "shop", "user": "anna"})
    other = fresh.open("other", labels={"team": "shop"})
    plain = fresh.open("plain")
    for agent in (web, other, plain):
        ran(agent, "true")
    fresh.kill()
    fresh.start()
    assert web.run("result = dict(agent.session().labels)") == {"team": "shop", "user": "anna"}
    ran(web, "true")
    with Admin(str(fresh.run_dir)) as admin:
        wait_until("all are known", lambda: len(admin.history(limit=9)) == 4)
        calls = {each.key: each.sums.calls for each in admin.usage("label") if each.sums}
        assert calls == {"team=shop": 3, "user=anna": 2, "": 1}
        with pytest.raises(InvalidIntent, match="set when it is opened"):
            admin.update_session("web", labels={"team": "ops"})
    close(fresh, "web")
    lines = agentcg(fresh, "usage", "--by", "label", "--csv").splitlines()
    assert {line.split(",")[0]: line.split(",")[1] for line in lines} == {
        "label": "calls",
        "team=shop": "3",
        "user=anna": "2",
        "": "1",
    }
    assert '"team": "shop"' in agentcg(fresh, "history", "--sessions", "--json")


@pytest.mark.waits
def test_what_ended_right_before_kill_9_is_not_lost(fresh: DaemonProcess) -> None:
    """Rows are gathered for a moment before they are written; the audit log has them by then."""
    agent = fresh.open("alpha")
    ids = [ran(agent, "true") for _ in range(5)]
    for _ in range(3):
        ids.append(ran(agent, "true"))
        fresh.kill()
        fresh.start()
        with Admin(str(fresh.run_dir)) as admin:
            wait_until(
                "history has all",
                lambda: {r.call_id for r in admin.history(limit=100)} == set(ids),
            )
            (past,) = admin.past_sessions()
            assert past.sums is not None and past.sums.calls == len(ids)
            assert past.closed_unix_usec == 0


def test_an_agent_sees_its_own_history_alone(fresh: DaemonProcess) -> None:
    agent, other = fresh.open("alpha"), fresh.open("beta")
    mine, theirs = ran(agent, "true"), ran(other, "true")
    assert agent.run("result = [r.call_id for r in agent.history()]") == [mine]
    for code in (
        "agent.story(call_id)",
        "agent.report(call_id)",
        "stub.ListHistory(pb.ListHistoryRequest(session_id='beta'))",
    ):
        with pytest.raises((RemoteRpcError, AssertionError)) as refused:
            agent.run(code, call_id=theirs)
        assert "NOT_FOUND" in str(refused.value) or "CallNotFound" in str(refused.value)
    agent.close()
    close(fresh, "alpha")
    again = fresh.open("alpha")
    assert again.run("result = agent.history()") == []
    with pytest.raises(AssertionError, match="CallNotFound"):
        again.run("agent.story(call_id)", call_id=mine)


def test_a_tool_sees_the_calls_inside_its_own(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    beside = ran(agent, "true")
    outer: str = agent.run("result = stub.BeginCall(pb.BeginCallRequest(name='outer')).id")
    tool = fresh.enter("alpha")
    assert tool.run("result = packet('attach', 'call=' + call_id)", call_id=outer)[0] == "OK"
    inner = ran(tool, "true")
    assert tool.run("result = [r.call_id for r in agent.history()]") == [inner]
    assert tool.run("result = agent.story(call_id).name", call_id=inner) == "true"
    assert tool.run("result = agent.story(call_id).state.value", call_id=outer) == "running"
    with pytest.raises(AssertionError, match="CallNotFound"):
        tool.run("agent.story(call_id)", call_id=beside)
    assert inner in agent.run("result = [r.call_id for r in agent.history()]")


def test_a_timeout_with_leftovers_is_explained(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    call_id = ran(agent, "sh", "-c", "sleep 1000 & sleep 1000", call_timeout="0.3s")
    with Admin(str(fresh.run_dir)) as admin:
        story = admin.story(call_id)
    said = " ".join(step.sentence for step in story.steps)
    assert "timeout 300 ms" in said and "Verdict: timeout" in said
    assert any(step.what == "fact" and "timeout" in step.sentence for step in story.steps)
    at = [step.at_unix_usec for step in story.steps if step.at_unix_usec]
    assert at[0] <= at[-1] and story.report is not None
    assert story.report.verdict is Verdict.TIMEOUT


def test_an_open_call_is_told_of_as_far_as_it_is(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    call_id: str = agent.run("result = stub.BeginCall(pb.BeginCallRequest(name='held')).id")
    text = agentcg(fresh, "explain", call_id)
    assert text.startswith(f"call {call_id}  held  (session alpha): pending")
    assert "It asked for nothing in particular." in text


def test_a_daemon_without_history_says_so_and_answers_from_memory(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon("[history]\npath = ''\n")
    call_id = ran(daemon.open("alpha"), "true")
    assert daemon.admin.GetReport(pb.GetReportRequest()).call_id == call_id
    assert [r.call_id for r in daemon.admin.ListReports(pb.ListReportsRequest()).reports] == [
        call_id
    ]
    env = {**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    done = subprocess.run([FRONT, "history"], env=env, capture_output=True, text=True)
    assert (done.returncode, "history.path is empty" in done.stderr) == (4, True)
    assert not daemon.history_path.exists()
