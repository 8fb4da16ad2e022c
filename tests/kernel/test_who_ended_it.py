"""Whose doing an end was: told where it is known, and nothing claimed where it is not."""

from __future__ import annotations

import errno
import signal
import subprocess

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess, RemoteRpcError, wait_until
from tests.kernel.test_endings import end, last
from tests.kernel.test_nesting import SLEEP, begin, tool_in

BEGIN = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="held")).id
result = call_id
"""
HELD = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="held")).id
command = [EXEC, "--call", call_id, "--", "sh", "-c", "read line; exit 0"]
tool = subprocess.Popen(command, stdin=subprocess.PIPE)
"""
LOWER = """
intent = pb.Intent(timeout="500ms")
stub.UpdateIntent(pb.UpdateIntentRequest(call_id=call_id, intent=intent))
"""
END = "result = stub.EndCall(pb.EndCallRequest(call_id=call_id)).SerializeToString()"
RUN = """
tool = subprocess.Popen([EXEC, "--", "sh", "-c", script])
"""


# Processes that nobody attached


def begin_by_hand(
    daemon: DaemonProcess, agent: AgentProcess, script: str
) -> subprocess.Popen[bytes]:
    """Begin a call that the agent holds, and start a process that moves itself into it."""
    call_id = agent.run(BEGIN)
    directory = next(path for path in daemon.call_dirs() if path.name == f"call-{call_id}")
    enter = f"echo $$ > {directory}/cgroup.procs; {script}"
    tool = subprocess.Popen(["sh", "-c", enter])
    procs = directory / "cgroup.procs"
    wait_until("it has entered", lambda: bool(procs.read_text()) or tool.poll() is not None)
    return tool


def test_a_call_that_was_entered_by_hand_is_ended(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    tool = begin_by_hand(daemon, agent, "exec sleep 1000")
    report = end(agent)
    assert tool.wait() == -9
    assert report.verdict == pb.VERDICT_CANCELLED and "its agent ended" in report.sentence
    assert not daemon.call_dirs()


def test_the_session_of_a_call_that_was_entered_by_hand_is_closed(daemon: DaemonProcess) -> None:
    agent = daemon.open("by-hand")
    tool = begin_by_hand(daemon, agent, "exec sleep 1000")
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="by-hand"))
    assert tool.wait() == -9


def test_what_entered_by_hand_is_no_main_process(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    tool = begin_by_hand(daemon, agent, "sleep 0.2; exit 3")
    assert tool.wait() == 3
    report = end(agent, pb.END_REASON_DONE)
    assert report.verdict == pb.VERDICT_UNKNOWN
    assert "none of its processes was known as its main process" in report.sentence
    # Its parent's word is taken where it is given.
    tool = begin_by_hand(daemon, agent, "sleep 0.2; exit 3")
    report = end(agent, pb.END_REASON_DONE, wait_status=tool.wait() << 8)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 3)
    assert last(daemon).call_id == report.call_id


def test_a_callers_word_is_no_process_that_entered(agent: AgentProcess) -> None:
    agent.run(BEGIN)
    report = end(agent, pb.END_REASON_DONE, wait_status=0)
    assert report.verdict == pb.VERDICT_ABANDONED
    assert report.sentence.startswith("No process ever entered the call.")


NO_SUCH_DIRECTORY = """
try:
    with agent.tool_call("nowhere") as call:
        call.run(["true"], cwd="/no/such/directory")
except FileNotFoundError:
    result = str(call.report.verdict)
"""


def test_a_tool_that_could_not_be_started_never_entered(agent: AgentProcess) -> None:
    assert agent.run(NO_SUCH_DIRECTORY) == "abandoned"


TOO_LONG = """
try:
    agent.run(["sh", "-c", "#" * 200_000])
except OSError as error:
    result = error.errno
"""


def test_arguments_that_the_kernel_refuses_are_told_as_that(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    assert agent.run(TOO_LONG) == errno.E2BIG
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_ABANDONED, 126)
    assert "its caller says that the command could not be started" in report.sentence
    assert "in a file or on standard input" in report.sentence
    assert "agentcg-exec" not in report.sentence


# Processes that went to a cgroup which somebody else ends


@pytest.mark.parametrize("where", ["call", "agent"])
def test_of_a_kill_somewhere_else_the_daemon_does_not_say_that_it_was_not(
    daemon: DaemonProcess, agent: AgentProcess, where: str
) -> None:
    session = f"neighbour-{where}"
    neighbour = daemon.open(session)
    neighbour.run(HELD)
    (way,) = (daemon.cgroup_dir / session).glob(f"{where}*")
    left = daemon.directory / f"left-{where}"
    script = f"echo $$ > {way}/cgroup.procs; echo > {left}; while :; do sleep 0.1; done"
    agent.run(RUN, script=script)
    wait_until("it has left", left.exists)
    if where == "call":
        neighbour.run("stub.EndCall(pb.EndCallRequest(call_id=call_id))")
    else:
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id=session))
    assert agent.run("result = tool.wait()") == -9
    wait_until("it is over", lambda: not list((daemon.cgroup_dir / "alpha").glob("call-*")))
    request = pb.ListReportsRequest(session_id="alpha", limit=1)
    (report,) = daemon.admin.ListReports(request).reports
    assert report.verdict == pb.VERDICT_SIGNALED
    if "in a cgroup that has been removed since" not in report.sentence:
        # It was seen there before that.
        assert "outside of its call, by whom is not known" in report.sentence
        assert f"left the call's cgroup for {daemon.pool_path}/{session}/" in report.sentence
    assert "not the daemon" not in report.sentence


# A timeout


def test_a_timeout_that_had_passed_when_it_was_given_is_told(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    agent.run(HELD)
    agent.run("time.sleep(1.2)")
    agent.run(LOWER)
    agent.run("tool.wait()")
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    words = "at its timeout of 500 ms, which it was given when it had run for 1."
    assert words in report.sentence


# A tool


def test_a_tool_that_ends_a_call_inside_is_told_as_that(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    outer = begin(agent, "outer")
    tool = tool_in(daemon, outer)
    inner = begin(tool, "inner")
    tool.run(SLEEP, call_id=inner.id)
    (directory,) = daemon.cgroup_dir.glob(f"*/*/call-{inner.id}")
    wait_until("it has entered", lambda: bool((directory / "cgroup.procs").read_text()))
    report = pb.Report.FromString(tool.run(END, call_id=inner.id))
    assert report.verdict == pb.VERDICT_CANCELLED
    assert f"while running: a tool in call {outer.id} ended it." in report.sentence
    agent.run(END, call_id=outer.id)


# A call that went on as another one beside it

OBSERVED = """
script = "sleep 1000 >/dev/null 2>&1 & sleep 0.4; exec " + EXEC + " --name beside -- sh -c 'exit 3'"
result = subprocess.call(["sh", "-c", script])
"""


@pytest.mark.programs
def test_what_it_had_left_running_is_told(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("")
    agent = daemon.open("alpha")
    assert agent.run(OBSERVED) == 3
    request = pb.ListCallsRequest(session_id="alpha")
    found = [call for call in daemon.admin.ListCalls(request).calls if call.observed]
    assert found, "the shell was not observed"
    (call,) = found
    report = daemon.admin.EndCall(pb.EndCallRequest(call_id=call.id))
    assert report.verdict == pb.VERDICT_OK
    assert report.sentence.startswith("It went on as call ")
    text = "1 process that it had left running was ended by the operator."
    assert report.sentence.endswith(f"Afterwards {text}")


# What a caller says


@pytest.mark.parametrize("reason", [pb.END_REASON_TIMEOUT, pb.END_REASON_CANCELLED])
def test_a_reason_to_let_go_is_none_for_the_end(
    daemon: DaemonProcess, agent: AgentProcess, reason: pb.EndReason.ValueType
) -> None:
    agent.run(HELD)
    wait_until("it runs", lambda: bool((daemon.call_dirs()[0] / "cgroup.procs").read_text()))
    assert "goes on" in end(agent, reason, detach=True).sentence
    agent.run("tool.communicate(b'go')")
    report = last(daemon)
    assert (report.verdict, report.sentence) == (pb.VERDICT_OK, "It ended well.")


SDK = """
try:
    with agent.tool_call("block") as call:
        call.run(["sh", "-c", "kill -9 $$"])
        raise RuntimeError
except RuntimeError:
    result = (str(call.report.verdict), call.report.sentence)
"""


def test_an_error_after_a_command_was_killed_is_not_who_killed_it(agent: AgentProcess) -> None:
    verdict, sentence = agent.run(SDK)
    assert verdict == "signaled" and "by whom is not known" in sentence


GIVEN_UP = """
import asyncio
from agentcgroup.aio import AsyncAgent
def blocking():
    with agent.tool_call("held") as call:
        try:
            call.run(["sleep", "1000"], timeout=0.3)
        except subprocess.TimeoutExpired:
            pass
        if after:
            call.run(after)
    return call.report
async def waiting():
    async with AsyncAgent() as agent:
        async with agent.tool_call("held") as call:
            try:
                await call.run(["sleep", "1000"], timeout=0.3)
            except subprocess.TimeoutExpired:
                pass
            if after:
                await call.run(after)
        return call.report
report = asyncio.run(waiting()) if use_asyncio else blocking()
result = str(report.verdict), report.sentence
"""


@pytest.mark.parametrize("use_asyncio", [False, True])
def test_a_command_that_its_caller_gives_up_in_a_held_call(
    agent: AgentProcess, use_asyncio: bool
) -> None:
    verdict, sentence = agent.run(GIVEN_UP, use_asyncio=use_asyncio, after=None)
    assert verdict == "cancelled"
    assert "its caller says that a timeout of its own had passed" in sentence
    # The call was not ended by it: another command runs in it, and is what it is judged by.
    verdict, sentence = agent.run(GIVEN_UP, use_asyncio=use_asyncio, after=["sh", "-c", "exit 3"])
    assert verdict == "failed" and "exit status 3" in sentence


CONTRADICTION = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="held")).id
stub.EndCall(pb.EndCallRequest(call_id=call_id, detach=True, command_only=True))
"""


def test_the_operator_ends_the_command_alone(daemon: DaemonProcess, agent: AgentProcess) -> None:
    call_id = agent.run(HELD + "result = call_id")
    wait_until("it runs", lambda: bool((daemon.call_dirs()[0] / "cgroup.procs").read_text()))
    request = pb.EndCallRequest(call_id=call_id, command_only=True)
    daemon.admin.EndCall(request)
    assert agent.run("result = tool.wait()") == -signal.SIGKILL
    assert [call.id for call in daemon.admin.ListCalls(pb.ListCallsRequest()).calls] == [call_id]
    # Once it has ended there is nothing to do.
    daemon.admin.EndCall(request)
    report = end(agent, pb.END_REASON_DONE)
    assert report.verdict == pb.VERDICT_CANCELLED and "the operator" in report.sentence
    with pytest.raises(RemoteRpcError) as caught:
        agent.run(CONTRADICTION)
    assert caught.value.error.field == "command_only"
    end(agent, pb.END_REASON_DONE)
