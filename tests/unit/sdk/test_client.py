"""The sync client against a fake daemon, with real processes."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentcgroup import (
    Agent,
    AgentcgError,
    AgentcgWarning,
    AsyncAgent,
    CallNotFound,
    CheckFailed,
    FeedbackCode,
    InvalidIntent,
    LauncherNotFound,
    NotInSession,
    Refused,
    ReportNotReady,
    Unavailable,
    Verdict,
)
from agentcgroup import flow as flow_module
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.unit.fake_daemon import MIB, FakeDaemon, later, running


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


@pytest.fixture
def agent(daemon: FakeDaemon) -> Iterator[Agent]:
    with Agent() as agent:
        yield agent


def test_run_has_a_report(daemon: FakeDaemon, agent: Agent) -> None:
    result = agent.run(["echo", "hi"], capture_output=True, text=True, memory="512M")
    assert isinstance(result, subprocess.CompletedProcess)
    assert (result.args, result.returncode, result.stdout, result.stderr) == (
        ["echo", "hi"],
        0,
        "hi\n",
        "",
    )
    assert result.report is not None
    assert result.report.verdict is Verdict.OK
    assert result.report.verdict.value == "ok"
    assert result.report.memory_peak_bytes == 190 * MIB
    assert result.report.memory_high_events is None
    assert [item.code for item in result.feedback] == [FeedbackCode.THAWED]
    assert result.call_id == result.report.call_id == "c1"
    assert daemon.begun[0].name == "echo"
    assert list(daemon.begun[0].argv) == ["echo", "hi"]
    assert daemon.begun[0].intent.memory == "512M"
    assert not daemon.calls


def test_intent_becomes_text(daemon: FakeDaemon, agent: Agent) -> None:
    with agent.tool_call(
        "x",
        memory=512 * MIB,
        memory_max="2G",
        cpu_weight=200,
        cpu_max=1.5,
        pids_max=10,
        timeout=30.0,
        priority="important",
        on_pressure="freeze",
        hint=None,
    ):
        pass
    intent = daemon.begun[0].intent
    assert (intent.memory, intent.memory_max, intent.cpu_weight) == ("536870912", "2G", "200")
    assert (intent.cpu_max, intent.pids_max, intent.timeout) == ("1.5", "10", "30")
    assert (intent.priority, intent.on_pressure, intent.hint) == ("important", "freeze", "")


def test_numbers_are_plain_decimals(daemon: FakeDaemon, agent: Agent) -> None:
    with agent.tool_call("x", memory=1e22, cpu_max=0.00005, timeout=float("nan")):
        pass
    intent = daemon.begun[0].intent
    assert intent.memory == "10000000000000000000000"
    assert intent.cpu_max == "0.00005"
    assert intent.timeout == "nan"
    with pytest.raises(InvalidIntent) as caught:
        agent.tool_call("x", memory=True)
    assert caught.value.field == "memory"
    with pytest.raises(TypeError, match="memroy"):
        agent.tool_call("x", memroy="1G")  # type: ignore[call-arg]


def test_report_is_ready_after_the_block(daemon: FakeDaemon, agent: Agent) -> None:
    with agent.tool_call("pytest", memory_max="512M") as call:
        assert call.confined
        assert call.grant is not None
        assert call.grant.memory_max_bytes == 512 * MIB
        assert call.grant.cpu_max_millicores is None
        first = call.run(["true"])
        second = call.run(["false"])
        with pytest.raises(ReportNotReady, match="c1"):
            _ = first.report
        with pytest.raises(ReportNotReady):
            _ = call.report
        grant = call.update(memory_max="1G")
        assert grant is call.grant
        assert grant is not None and grant.memory_max_bytes == 1024 * MIB
    assert second.returncode == 1
    assert call.report is first.report is second.report
    assert call.report is not None
    assert (call.report.verdict, call.report.exit_code) == (Verdict.FAILED, 1)
    assert daemon.ended[0].wait_status == 1 << 8
    assert len(daemon.entered("c1")) == 2
    assert call.end() is call.report
    assert len(daemon.ended) == 1


def test_call_ends_when_the_body_raises(daemon: FakeDaemon, agent: Agent) -> None:
    with pytest.raises(KeyError), agent.tool_call("x") as call:
        raise KeyError("body")
    assert not daemon.calls
    assert call.report is not None
    assert not daemon.ended[0].HasField("wait_status")
    with pytest.raises(RuntimeError, match="not open"):
        call.run(["true"])
    with pytest.raises(RuntimeError, match="once"):
        call.begin()


def test_popen_is_ended_with_the_call(daemon: FakeDaemon, agent: Agent) -> None:
    with agent.tool_call("server") as call:
        process = call.popen(["sleep", "100"], stdout=subprocess.PIPE)
        assert process.args == ["sleep", "100"]
        while not daemon.entered("c1"):
            assert process.poll() is None
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert not daemon.ended[0].HasField("wait_status")
    process.communicate()


def test_popen_that_has_ended_gives_the_status(daemon: FakeDaemon, agent: Agent) -> None:
    with agent.tool_call("x") as call, call.popen(["sh", "-c", "kill -TERM $$"]) as process:
        process.wait()
    assert process.returncode == -signal.SIGTERM
    assert call.report is not None and call.report.term_signal == signal.SIGTERM


def test_input_cwd_env_text(agent: Agent, tmp_path: Path) -> None:
    result = agent.run(  # noqa: S604
        'cat; pwd; printf %s "$WORD"',
        shell=True,
        input="in\n",
        encoding="utf-8",
        cwd=tmp_path,
        env={"WORD": "wörd", "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.stdout == f"in\n{tmp_path}\nwörd"
    assert result.stderr is None
    raw = agent.run(["cat"], input=b"\xff\n", capture_output=True)
    assert raw.stdout == b"\xff\n"


def test_contradicting_arguments(daemon: FakeDaemon, agent: Agent) -> None:
    with agent.tool_call("x") as call:
        with pytest.raises(ValueError, match="stdin"):
            call.run(["cat"], input=b"", stdin=subprocess.DEVNULL)
        with pytest.raises(ValueError, match="capture_output"):
            call.run(["cat"], stdout=subprocess.PIPE, capture_output=True)
        with pytest.raises(ValueError, match="executable"):
            call.run(["cat"], executable="/bin/cat")
    with pytest.raises(ValueError, match="empty"):
        agent.run([])
    assert len(daemon.begun) == 1


def test_check(agent: Agent) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        agent.run(["sh", "-c", "echo out; exit 4"], check=True, capture_output=True, text=True)
    error = caught.value
    assert isinstance(error, CheckFailed)
    assert (error.returncode, error.cmd[0], error.stdout) == (4, "sh", "out\n")
    assert error.result.report is not None
    assert error.result.report.exit_code == 4
    with pytest.raises(subprocess.CalledProcessError), agent.tool_call("x") as call:
        call.run(["false"], check=True)
    with pytest.raises(subprocess.CalledProcessError):
        agent.run(["false"]).check_returncode()


def test_timeout_kills_and_raises(daemon: FakeDaemon, agent: Agent) -> None:
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        # The grandchild holds the pipe: waiting for its end would take the full minute.
        agent.run(["sh", "-c", "sleep 60 & echo early; sleep 60"], capture_output=True, timeout=0.3)
    assert time.monotonic() - began < 10
    assert caught.value.cmd[0] == "sh"
    assert caught.value.stdout == b"early\n"
    assert daemon.ended[0].reason == pb.END_REASON_TIMEOUT
    assert not daemon.begun[0].intent.timeout


def test_call_timeout_is_the_daemons(daemon: FakeDaemon, agent: Agent) -> None:
    agent.run(["true"], call_timeout="10m", timeout=20)
    assert daemon.begun[0].intent.timeout == "10m"


def test_programs_that_cannot_run(agent: Agent, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        agent.run(["no-such-program"], stderr=subprocess.DEVNULL)
    with pytest.raises(FileNotFoundError):
        agent.run(["./nothing"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    with pytest.raises(PermissionError):
        agent.run(["./plain"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert agent.run(["sh", "-c", "exit 127"]).returncode == 127


def test_refusals_raise_and_leave_nothing(daemon: FakeDaemon, agent: Agent) -> None:
    with pytest.raises(InvalidIntent) as caught:
        agent.run(["true"], memory_max="lots")
    error = caught.value
    assert str(error) == "memory_max: 'lots' cannot be used"
    assert (error.field, error.value) == ("memory_max", "lots")
    assert error.allowed == "bytes, e.g. 512M"
    assert error.code == "INVALID_ARGUMENT"
    with pytest.raises(Refused, match="64 calls") as refused:
        agent.run(["true"], memory="1P")
    assert refused.value.code == "RESOURCE_EXHAUSTED"
    daemon.in_session = False
    with pytest.raises(NotInSession, match="no session"):
        agent.run(["true"])
    assert not daemon.calls and not daemon.ended
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InvalidIntent
    assert again.to_dict() == error.to_dict()


def test_daemon_away_runs_bare_with_one_warning(daemon: FakeDaemon, agent: Agent) -> None:
    daemon.stop()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = agent.run(["echo", "bare"], capture_output=True, text=True)
    assert [w.category for w in caught] == [AgentcgWarning]
    assert caught[0].filename == __file__
    assert "cannot be reached" in str(caught[0].message)
    assert (result.stdout, result.report, result.feedback, result.call_id) == (
        "bare\n",
        None,
        (),
        "",
    )
    with pytest.warns(AgentcgWarning), agent.tool_call("x") as call:
        assert not call.confined
        assert call.grant is None
        assert call.update(memory_max="1G") is None
        left = call.popen(["sleep", "100"])
        with pytest.raises(FileNotFoundError):
            call.run(["no-such-program"])
    assert left.wait(timeout=10) == -signal.SIGKILL
    assert call.report is None


def test_daemon_away_and_refuse(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    daemon.stop()
    made = tmp_path / "made"
    with pytest.raises(Unavailable), Agent(on_unavailable="refuse") as agent:
        agent.run(["touch", str(made)])
    monkeypatch.setenv("AGENTCG_ON_UNAVAILABLE", "refuse")
    with pytest.raises(Unavailable):
        Agent().run(["touch", str(made)])
    assert not made.exists()
    monkeypatch.setenv("AGENTCG_ON_UNAVAILABLE", "perhaps")
    with pytest.raises(InvalidIntent, match="perhaps"):
        Agent()
    with pytest.raises(Unavailable):
        Agent(on_unavailable="run").budget()


def test_policy_reaches_the_launcher(daemon: FakeDaemon) -> None:
    daemon.launcher.write_text('#!/bin/sh\necho "$@"\n')
    with Agent(on_unavailable="refuse") as agent:
        result = agent.run(["tool", "--call=x"], capture_output=True, text=True)
    words = result.stdout.split()
    assert words[3].startswith("--error-fd=")
    assert words[4] == words[3].replace("--error-fd", "--call-fd")
    assert words[:3] + words[5:] == [
        f"--socket={daemon.run_dir}/agent/attach.sock",
        "--on-unavailable=refuse",
        "--own-group",
        "--",
        "tool",
        "--call=x",
    ]


def test_begin_waits_for_a_daemon_that_was_there(daemon: FakeDaemon, agent: Agent) -> None:
    agent.budget()
    daemon.stop()
    timer = later(0.5, daemon.start)
    result = agent.run(["true"])
    timer.join()
    assert result.report is not None


def test_given_up_daemon_is_not_waited_for_again(
    daemon: FakeDaemon, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.budget()
    daemon.stop()
    monkeypatch.setattr(flow_module, "RETURN_TIMEOUT_S", 0.5)
    with pytest.warns(AgentcgWarning):
        agent.run(["true"])
    began = time.monotonic()
    with pytest.warns(AgentcgWarning):
        agent.run(["true"])
    assert time.monotonic() - began < 0.4
    daemon.start()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if agent.run(["true"]).report is not None:
                return
    pytest.fail("a daemon that came back was not found again")


def test_restart_in_the_middle_keeps_the_report(daemon: FakeDaemon, agent: Agent) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with agent.tool_call("x") as call:
            daemon.stop()
            result = call.run(["sh", "-c", "exit 5"])
            timer = later(0.7, daemon.start)
        timer.join()
    assert result.returncode == 5
    assert call.report is not None
    assert call.report.exit_code == 5
    assert len(daemon.ended) == 1


def test_daemon_dies_while_it_ends_the_call(daemon: FakeDaemon, agent: Agent) -> None:
    """An end whose answer was lost: the report is fetched from the restarted daemon."""

    def end_and_die(request: Any) -> None:
        call = daemon.calls.pop("c1")
        daemon.reports["c1"] = daemon.report_of(call, request)
        daemon.stop()
        later(0.3, daemon.start)

    daemon.before["EndCall"] = end_and_die
    result = agent.run(["true"])
    assert result.report is not None
    assert result.report.verdict is Verdict.OK
    assert daemon.attempts["EndCall"] == 2
    assert daemon.attempts["GetReport"] == 1


def test_call_that_ended_by_itself(daemon: FakeDaemon, agent: Agent) -> None:
    with agent.tool_call("x") as call:
        ended = daemon.calls.pop(call.id)
        ended.name = "stopped"
        daemon.before["EndCall"] = lambda request: daemon.reports.update(
            {"c1": daemon.report_of(ended, request)}
        )
    assert call.report is not None and call.report.name == "stopped"


def test_daemon_stays_away_at_the_end(
    daemon: FakeDaemon, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_module, "END_TIMEOUT_S", 0.5)
    with pytest.warns(AgentcgWarning, match="lost"), agent.tool_call("x") as call:
        result = call.run(["echo", "kept"], capture_output=True)
        daemon.stop()
    assert result.stdout == b"kept\n"
    assert result.report is None
    assert call.report is None


def test_lost_report_is_a_warning(daemon: FakeDaemon, agent: Agent) -> None:
    daemon.before["EndCall"] = lambda request: daemon.calls.clear()
    with pytest.warns(AgentcgWarning, match="no report of call 'c1'"):
        assert agent.run(["echo"], stdout=subprocess.DEVNULL).report is None


def test_missing_launcher_is_said_before_the_call_begins(
    daemon: FakeDaemon, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTCG_EXEC", "/nowhere/agentcg-exec")
    with pytest.raises(LauncherNotFound, match="/nowhere/agentcg-exec"):
        agent.run(["true"])
    assert not daemon.begun


def test_questions(daemon: FakeDaemon, agent: Agent) -> None:
    assert agent.session().id == "s1"
    budget = agent.budget()
    assert budget.memory_available_bytes == 1024 * MIB
    assert budget.memory_used_bytes is None
    with agent.tool_call("a") as call:
        (open_call,) = agent.calls()
        assert (open_call.id, open_call.state) == (call.id, "pending")
        assert open_call.usage is not None
        assert open_call.usage.memory_current_bytes == 3 * MIB
    assert agent.report(call.id).name == "a"
    assert agent.report().call_id == call.id
    agent.run(["true"])
    assert [report.name for report in agent.reports()] == ["true", "a"]
    assert len(agent.reports(limit=1)) == 1
    with pytest.raises(CallNotFound) as caught:
        agent.report("none")
    assert caught.value.value == "none"
    with agent.tool_call("b") as other:
        assert agent.end_call(other.id).verdict is Verdict.CANCELLED


def test_feedback_goes_on_after_a_restart(daemon: FakeDaemon, agent: Agent) -> None:
    with agent.feedback() as stream:
        daemon.say("one")
        item = next(stream)
        assert (item.sentence, item.code) == ("one", FeedbackCode.FROZEN)
        assert item.numbers == {"frozen_usec": 1500.0}
        daemon.stop()
        daemon.start()
        daemon.say("two")
        assert next(stream).sentence == "two"
        closer = later(0.2, stream.close)
        assert list(stream) == []
        closer.join()
    daemon.stop()
    with pytest.raises(Unavailable):
        agent.feedback()


def test_fork(daemon: FakeDaemon, agent: Agent) -> None:
    agent.budget()
    pid = os.fork()
    if pid == 0:
        # The child must not go on with the parent's test run, whatever happens.
        status = 1
        try:
            signal.alarm(20)
            status = 0 if agent.run(["true"]).report is not None else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert agent.run(["true"]).report is not None


def test_threads_share_an_agent(daemon: FakeDaemon, agent: Agent) -> None:
    reports: list[object] = []
    threads = [
        threading.Thread(target=lambda: reports.append(agent.run(["true"]).report))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 16 and None not in reports
    assert len({request.call_id for request in daemon.ended}) == 16


def test_odd_command_lines_are_cut_for_the_daemon_only(daemon: FakeDaemon, agent: Agent) -> None:
    script = "import sys; print(len(sys.argv[1]), len(sys.argv[2]))"
    odd = os.fsdecode(b"\xff\xfe")
    result = agent.run(
        [sys.executable, "-c", script, odd, "ä" * 60_000], capture_output=True, text=True
    )
    assert result.stdout == "2 60000\n"
    assert sum(len(argument.encode()) for argument in daemon.begun[0].argv) <= 4096
    agent.run(["true"], name="n" * 1000)
    assert len(daemon.begun[1].name) == 128


def test_errors_have_one_base() -> None:
    assert issubclass(Unavailable, AgentcgError)
    assert issubclass(AgentcgWarning, UserWarning)


def test_an_answer_that_no_packet_holds_is_asked_for_over_grpc(
    daemon: FakeDaemon, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.fake_daemon.AttachSocket._forward", lambda *_: b"LONG\0")

    async def ask() -> int:
        async with AsyncAgent() as other:
            return (await other.budget()).calls_max

    assert agent.budget().calls_max == asyncio.run(ask()) == 64
    assert daemon.attempts["GetBudget"] == 2
