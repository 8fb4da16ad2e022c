"""What a command leaves running: ended shortly after it, or kept, as its intent says."""

from __future__ import annotations

import time

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import PATIENCE, SLOW, AgentProcess, DaemonProcess, wait_until
from tests.kernel.test_calls import end, report_of_last, tool

LONG = "sleep 1000"
PIPE = """
import subprocess
start = time.monotonic()
shell = '"$@" | cat'
argv = ["sh", "-c", shell, "sh", EXEC, *options, "--", "sh", "-c", script]
done = subprocess.run(argv, capture_output=True, text=True)
result = (done.stdout, time.monotonic() - start)
"""
RUN = """
start = time.monotonic()
done = agent.run(["sh", "-c", script], capture_output=True, text=True, **options)
result = (done.returncode, done.stdout, time.monotonic() - start, str(done.report.verdict),
          [str(item.code) for item in done.feedback], done.call_id)
"""


def test_a_pipe_ends_although_a_child_holds_it(daemon: DaemonProcess, agent: AgentProcess) -> None:
    out, took = agent.run(PIPE, options=["--name", "t"], script=f"{LONG} & echo done")
    assert out == "done\n"
    assert took < 20 * PATIENCE
    wait_until("the call has ended", lambda: not daemon.call_dirs())
    # Where programs are loaded, the shell with the pipe is a call of its own.
    reports = daemon.admin.ListReports(pb.ListReportsRequest(session_id="alpha", limit=5)).reports
    report = next(report for report in reports if report.name == "t")
    assert (report.verdict, report.exit_code) == (pb.VERDICT_OK, 0)
    assert report.grant.leftovers == "end"
    assert [f.code for f in report.feedback] == [pb.FEEDBACK_CODE_LEFTOVERS]
    assert report.feedback[0].numbers["processes"] == 1


@pytest.mark.parametrize("way", ["trap '' TERM; ", "setsid "])
def test_what_is_left_is_killed_if_it_does_not_end(
    daemon: DaemonProcess, agent: AgentProcess, way: str
) -> None:
    script = f"({way}sh -c '{LONG}; {LONG}') > /dev/null 2>&1 & exit 4"
    assert tool(agent, ["--name", "t"], "sh", "-c", script)[0] == 4
    wait_until("the call has ended", lambda: not daemon.call_dirs())
    report = report_of_last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 4)
    assert pb.FEEDBACK_CODE_LEFTOVERS in [f.code for f in report.feedback]


def test_what_ends_by_itself_is_not_told(daemon: DaemonProcess, agent: AgentProcess) -> None:
    told = []
    for _ in range(5):
        tool(agent, ["--name", "t"], "sh", "-c", "sleep 0.02 > /dev/null 2>&1 & exit 0")
        wait_until("the call has ended", lambda: not daemon.call_dirs())
        report = report_of_last(daemon)
        assert report.verdict == pb.VERDICT_OK
        told.append(bool(report.feedback))
    # On a busy machine it may take longer than what is left has, now and then.
    assert SLOW > 1 or not all(told)


def test_kept_servers_go_on_within_the_call(daemon: DaemonProcess, agent: AgentProcess) -> None:
    options = ["--name", "server", "--leftovers", "keep"]
    assert tool(agent, options, "sh", "-c", f"{LONG} > /dev/null 2>&1 & exit 0")[0] == 0
    call_id = daemon.call_dirs()[0].name.removeprefix("call-")
    time.sleep(1.5 * SLOW)  # longer than leftovers would have lived
    assert daemon.call_dirs()
    report = end(agent, call_id)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_OK, 0)
    assert report.grant.leftovers == "keep"
    assert not daemon.call_dirs()


def test_the_agent_is_told_that_its_servers_are_kept(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code = """
stream = stub.WatchFeedback(pb.WatchFeedbackRequest())
stream.initial_metadata()
import subprocess
argv = [EXEC, "--leftovers", "keep", "--", "sh", "-c", "sleep 1000 > /dev/null 2>&1 &"]
subprocess.run(argv, check=True)
item = next(stream)
result = (item.code, item.call_id, item.sentence)
stream.cancel()
"""
    told, call_id, sentence = agent.run(code)
    assert told == pb.FEEDBACK_CODE_LEFTOVERS_KEPT
    assert daemon.call_dirs()[0].name == f"call-{call_id}"
    assert f"agentcg end {call_id}" in sentence
    end(agent, call_id)


def test_the_sdk_returns_when_the_command_has_ended(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    options = {"timeout": 300}
    status, out, took, verdict, codes, _ = agent.run(
        RUN, script=f"{LONG} & echo done; exit 3", options=options
    )
    assert (status, out, verdict) == (3, "done\n", "failed")
    assert codes == ["leftovers"]
    assert took < 20 * PATIENCE
    assert not daemon.call_dirs()


def test_the_sdk_keeps_servers(daemon: DaemonProcess, agent: AgentProcess) -> None:
    # The server writes into the pipe that `run` has returned from, and lives.
    script = "while :; do echo line || exit; sleep 0.05; done & echo done"
    status, out, took, verdict, codes, call_id = agent.run(
        RUN, script=script, options={"leftovers": "keep"}
    )
    assert (status, verdict, codes) == (0, "ok", ["leftovers_kept"])
    assert "done\n" in out and took < 20 * PATIENCE
    time.sleep(1.0 * SLOW)
    procs = daemon.cgroup_dir / "alpha" / f"call-{call_id}" / "cgroup.procs"
    assert procs.read_text().split()
    assert agent.run("result = [call.id for call in agent.calls()]") == [call_id]
    ended = agent.run("result = agent.end_call(call_id).to_dict()", call_id=call_id)
    assert ended["verdict"] == "ok"
    assert not daemon.call_dirs()


def test_leftovers_are_ended_when_the_owner_has_gone(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code = """
import subprocess, sys
script = (
    "import agentcgroup, os; call = agentcgroup.Agent().tool_call('x').begin(); "
    "call.run(['sh', '-c', 'sleep 1000 > /dev/null 2>&1 &']); os._exit(0)"
)
subprocess.run([sys.executable, "-c", script], check=True)
"""
    agent.run(code)
    wait_until("the call has ended", lambda: not daemon.call_dirs())
    report = report_of_last(daemon)
    assert report.verdict == pb.VERDICT_OK
    assert [f.code for f in report.feedback] == [pb.FEEDBACK_CODE_LEFTOVERS]


def test_an_update_changes_what_becomes_of_them(daemon: DaemonProcess, agent: AgentProcess) -> None:
    options = ["--name", "server", "--leftovers", "keep"]
    tool(agent, options, "sh", "-c", f"{LONG} > /dev/null 2>&1 & exit 0")
    call_id = daemon.call_dirs()[0].name.removeprefix("call-")
    update = """
intent = pb.Intent(leftovers="end")
stub.UpdateIntent(pb.UpdateIntentRequest(call_id=call_id, intent=intent))
"""
    agent.run(update, call_id=call_id)
    wait_until("the call has ended", lambda: not daemon.call_dirs())
    assert [f.code for f in report_of_last(daemon).feedback] == [pb.FEEDBACK_CODE_LEFTOVERS]


def test_a_timeout_of_the_callers_is_told(agent: AgentProcess) -> None:
    code = """
import subprocess
try:
    agent.run(["sleep", "1000"], timeout=wait)
except subprocess.TimeoutExpired:
    report = agent.report()
result = (str(report.verdict), report.sentence)
"""
    verdict, sentence = agent.run(code, wait=0.3 * SLOW)
    assert verdict == "cancelled"
    assert "a timeout of its own had passed" in sentence
