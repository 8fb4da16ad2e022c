"""The life of a call on a real kernel, through the SDK, the launcher and the wire."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import (
    EXEC,
    SLOW,
    AgentProcess,
    DaemonProcess,
    RemoteRpcError,
    wait_until,
)

BEGIN = "result = stub.BeginCall(pb.BeginCallRequest(name=name, intent=pb.Intent(**intent))).id"
SPAWN = """
import subprocess
result = subprocess.run([EXEC, *options, "--", *argv], capture_output=True, text=True)
result = (result.returncode, result.stdout, result.stderr)
"""
END = "result = stub.EndCall(pb.EndCallRequest(call_id=call_id)).SerializeToString()"


def begin(agent: AgentProcess, name: str = "tool", **intent: str) -> str:
    """The id of a call held open by the agent."""
    call_id: str = agent.run(BEGIN, name=name, intent=intent)
    return call_id


def end(agent: AgentProcess, call_id: str) -> pb.Report:
    """End the call and return its report."""
    return pb.Report.FromString(agent.run(END, call_id=call_id))


def tool(agent: AgentProcess, options: list[str], *argv: str) -> tuple[int, str, str]:
    """Run agentcg-exec in the session: exit status (negative: signal), stdout, stderr."""
    status, out, err = agent.run(SPAWN, options=options, argv=list(argv))
    return status, out, err


def report_of_last(daemon: DaemonProcess, session: str = "alpha") -> pb.Report:
    """The newest report of a session."""
    request = pb.ListReportsRequest(session_id=session, limit=1)
    return daemon.admin.ListReports(request).reports[0]


def test_a_tool_runs_in_its_own_cgroup_and_nothing_remains(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code, out, err = tool(agent, [], "cat", "/proc/self/cgroup")
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if line.startswith("0::"))
    assert line.startswith(f"0::{daemon.pool_path}/alpha/call-")
    wait_until("the call's cgroup is gone", lambda: not daemon.call_dirs())
    report = report_of_last(daemon)
    assert line.endswith(f"call-{report.call_id}")
    assert (report.verdict, report.name, report.exit_code) == (pb.VERDICT_OK, "cat", 0)
    assert report.evidence == pb.EVIDENCE_KERNEL
    assert list(report.argv) == ["cat", "/proc/self/cgroup"]
    assert report.wall_usec > 0


def test_cpu_time_is_told(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """The tool takes enough of it to be seen by a kernel that counts in clock ticks."""
    spin = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    tool(agent, [], sys.executable, "-c", spin)
    # The tool's parent may see its end before the daemon does.
    wait_until("the call has ended", lambda: not daemon.call_dirs())
    assert report_of_last(daemon).cpu_usage_usec >= 150_000


@pytest.mark.parametrize(
    ("script", "status", "verdict", "exit_code", "term_signal"),
    [
        ("exit 0", 0, pb.VERDICT_OK, 0, None),
        ("exit 3", 3, pb.VERDICT_FAILED, 3, None),
        ("exit 137", 137, pb.VERDICT_FAILED, 137, None),
        ("kill -SEGV $$", -signal.SIGSEGV, pb.VERDICT_SIGNALED, None, signal.SIGSEGV),
        ("kill -KILL $$", -signal.SIGKILL, pb.VERDICT_SIGNALED, None, signal.SIGKILL),
    ],
)
def test_the_verdict_is_the_kernels(
    daemon: DaemonProcess,
    agent: AgentProcess,
    script: str,
    status: int,
    verdict: pb.Verdict.ValueType,
    exit_code: int | None,
    term_signal: int | None,
) -> None:
    before = daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended
    assert tool(agent, ["--name", "t"], "sh", "-c", script)[0] == status
    wait_until(
        "the call has ended",
        lambda: daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended > before,
    )
    report = report_of_last(daemon)
    assert report.verdict == verdict
    assert report.evidence == pb.EVIDENCE_KERNEL
    assert (report.exit_code if report.HasField("exit_code") else None) == exit_code
    assert (report.term_signal if report.HasField("term_signal") else None) == term_signal


def test_kill_9_from_outside_is_not_called_out_of_memory(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    call_id = begin(agent)
    agent.run(
        "import subprocess; p = subprocess.Popen([EXEC, '--call', call_id, '--', 'sleep', '100'])",
        call_id=call_id,
    )
    directory = daemon.cgroup_dir / "alpha" / f"call-{call_id}"
    wait_until("the tool is in", lambda: (directory / "cgroup.procs").read_text().strip() != "")
    wait_until("it is sleep", lambda: b"sleep" in _command(directory))
    os.kill(int((directory / "cgroup.procs").read_text()), signal.SIGKILL)
    agent.run("p.wait()")
    report = end(agent, call_id)
    assert report.verdict == pb.VERDICT_SIGNALED
    assert report.term_signal == signal.SIGKILL
    assert not report.oom_kills
    assert [f.code for f in report.feedback] == [pb.FEEDBACK_CODE_KILLED]
    assert "out of memory" not in report.sentence.lower() or "cannot be seen" in report.sentence


def _command(directory: object) -> bytes:
    with open(f"{directory}/cgroup.procs") as file:
        pids = file.read().split()
    if not pids:
        return b""
    with open(f"/proc/{pids[0]}/cmdline", "rb") as file:
        return file.read()


def test_several_commands_run_in_a_held_call(daemon: DaemonProcess, agent: AgentProcess) -> None:
    call_id = begin(agent)
    for text in ("one", "two"):
        assert tool(agent, ["--call", call_id], "echo", text)[:2] == (0, f"{text}\n")
        assert (daemon.cgroup_dir / "alpha" / f"call-{call_id}").exists()
    assert tool(agent, ["--call", call_id], "false")[0] == 1
    report = end(agent, call_id)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 1)
    assert not (daemon.cgroup_dir / "alpha" / f"call-{call_id}").exists()


def test_ending_a_running_call_cancels_it(agent: AgentProcess) -> None:
    call_id = begin(agent)
    start = (
        "p = subprocess.Popen([EXEC, '--call', call_id, '--', 'sleep', '100'])\ntime.sleep(wait)\n"
    )
    agent.run(start, call_id=call_id, wait=0.1 * SLOW)
    report = end(agent, call_id)
    assert report.verdict == pb.VERDICT_CANCELLED
    assert agent.run("result = p.wait()") == -signal.SIGKILL


def test_leftovers_are_ended_with_the_call_and_told(agent: AgentProcess) -> None:
    call_id = begin(agent)
    script = "sleep 100 >/dev/null 2>&1 & exit 0"
    assert tool(agent, ["--call", call_id], "sh", "-c", script)[0] == 0
    report = end(agent, call_id)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_OK, 0)
    assert [f.code for f in report.feedback] == [pb.FEEDBACK_CODE_LEFTOVERS]
    assert report.feedback[0].numbers["processes"] == 1


def test_a_call_goes_on_while_its_children_do(daemon: DaemonProcess, agent: AgentProcess) -> None:
    script = "setsid sleep 0.5 >/dev/null 2>&1 & exit 0"
    options = ["--name", "server", "--leftovers", "keep"]
    assert tool(agent, options, "sh", "-c", script)[0] == 0
    assert len(daemon.call_dirs()) == 1
    wait_until("the child has ended", lambda: not daemon.call_dirs())
    assert report_of_last(daemon).verdict == pb.VERDICT_OK


def test_detach_lets_the_tool_finish(daemon: DaemonProcess, agent: AgentProcess) -> None:
    call_id = begin(agent)
    detach = (
        "p = subprocess.Popen([EXEC, '--call', call_id, '--', 'sleep', '0.5'])\n"
        "time.sleep(wait)\n"
        "stub.EndCall(pb.EndCallRequest(call_id=call_id, detach=True))\n"
        "result = p.wait()"
    )
    agent.run(detach, call_id=call_id, wait=0.05 * SLOW)
    wait_until("it has ended", lambda: not daemon.call_dirs())
    assert report_of_last(daemon).verdict == pb.VERDICT_OK


def test_timeout_ends_the_call_and_says_so(daemon: DaemonProcess, agent: AgentProcess) -> None:
    timeout = f"{0.3 * SLOW:.1f}"
    started = time.monotonic()
    status = tool(agent, ["--timeout", timeout], "sleep", "1000")[0]
    assert status == -signal.SIGTERM
    assert time.monotonic() - started >= float(timeout)
    wait_until("it has ended", lambda: not daemon.call_dirs())
    report = report_of_last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    assert report.feedback[0].code == pb.FEEDBACK_CODE_TIMEOUT


def test_a_tool_that_ignores_sigterm_is_killed_after_the_grace(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = "trap '' TERM; while :; do sleep 0.1; done"
    status = tool(agent, ["--timeout", f"{0.3 * SLOW:.1f}"], "sh", "-c", script)[0]
    assert status == -signal.SIGKILL
    wait_until("it has ended", lambda: not daemon.call_dirs())
    assert report_of_last(daemon).verdict == pb.VERDICT_TIMEOUT


def test_a_refused_intent_leaves_nothing(daemon: DaemonProcess, agent: AgentProcess) -> None:
    before = daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun
    refused = {
        "memory": "-1",
        "memory_max": "NaN",
        "pids_max": "0",
        "cpu_max": "1e400",
        "timeout": "never",
        "priority": "101",
        "on_pressure": "explode",
        "hint": "memory:huge",
    }
    for field, value in refused.items():
        with pytest.raises(RemoteRpcError) as caught:
            begin(agent, **{field: value})
        assert caught.value.code == "INVALID_ARGUMENT"
        assert caught.value.error.field == field
        assert caught.value.error.value == value
        assert field in caught.value.details and value in caught.value.details
        option = f"--{field.replace('_', '-')}"
        status, _, err = tool(agent, [f"{option}={value}"], "true")
        assert status == 125 and f"{option}: " in err
    with pytest.raises(RemoteRpcError) as caught:
        begin(agent, name="")
    assert caught.value.error.field == "name"
    assert daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun == before
    assert daemon.call_dirs() == []


def test_unknown_fields_are_refused(agent: AgentProcess) -> None:
    code = """
raw = pb.BeginCallRequest(name="x").SerializeToString() + bytes([0xfa, 0x01, 1, 97])
request = pb.BeginCallRequest.FromString(raw)
stub.BeginCall(request)
"""
    with pytest.raises(RemoteRpcError) as caught:
        agent.run(code)
    assert caught.value.code == "INVALID_ARGUMENT" and "31" in caught.value.details


def test_a_command_line_of_a_megabyte_is_cut_in_the_record_only(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    argument = "x" * 100_000
    code, out, _ = tool(agent, [], "sh", "-c", 'echo $#:"${#1}"', "sh", *[argument] * 10)
    assert (code, out) == (0, "10:100000\n")
    wait_until("it has ended", lambda: not daemon.call_dirs())
    assert sum(len(a) for a in report_of_last(daemon).argv) <= 4100
    call_id = agent.run(
        "result = stub.BeginCall(pb.BeginCallRequest(name='x', argv=['y' * 60_000])).id"
    )
    record = os.getxattr(daemon.cgroup_dir / "alpha" / f"call-{call_id}", "trusted.agentcgroup")
    assert len(record) < 4096 and len(json.loads(record)["argv"][0]) <= 512
    end(agent, call_id)


def test_a_call_that_nobody_enters_is_given_up_when_its_owner_ends(daemon: DaemonProcess) -> None:
    visitor = daemon.enter("alpha") if "alpha" in _sessions(daemon) else daemon.open("alpha")
    call_id = begin(visitor)
    assert len(daemon.call_dirs()) == 1
    visitor.close()
    wait_until("the call is gone", lambda: not daemon.call_dirs())
    report = daemon.admin.GetReport(pb.GetReportRequest(call_id=call_id))
    assert report.verdict == pb.VERDICT_ABANDONED


def _sessions(daemon: DaemonProcess) -> set[str]:
    return {s.id for s in daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions}


def test_the_sdk_runs_a_tool_and_reports(agent: AgentProcess) -> None:
    result = agent.run(
        "done = agent.run(['sh', '-c', 'echo out; echo err >&2; exit 4'], capture_output=True, "
        "text=True)\n"
        "result = (done.returncode, done.stdout, done.stderr, str(done.report.verdict), "
        "done.report.exit_code)"
    )
    assert result == (4, "out\n", "err\n", "failed", 4)


def test_feedback_streams_as_it_happens(agent: AgentProcess) -> None:
    result = agent.run(
        """
stream = stub.WatchFeedback(pb.WatchFeedbackRequest())
stream.initial_metadata()
call_id = stub.BeginCall(pb.BeginCallRequest(name="x")).id
stub.EndCall(pb.EndCallRequest(call_id=call_id))
first = next(stream)
stream.cancel()
result = (first.call_id == call_id, pb.FeedbackCode.Name(first.code), first.session_id)
"""
    )
    assert result == (True, "FEEDBACK_CODE_ABANDONED", "alpha")


def test_the_audit_log_has_every_step(daemon: DaemonProcess, agent: AgentProcess) -> None:
    tool(agent, ["--name", "audited"], "true")
    wait_until("it has ended", lambda: not daemon.call_dirs())
    entries = [json.loads(line) for line in daemon.audit_lines()]
    call_id = report_of_last(daemon).call_id
    mine = [e["event"] for e in entries if e.get("call") == call_id]
    assert mine == ["call_begun", "call_ended"]
    assert entries[0]["event"] == "session_opened"


def test_a_process_in_no_session_is_told_how_to_get_into_one(daemon: DaemonProcess) -> None:
    env = {**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    done = subprocess.run([EXEC, "--", "true"], env=env, capture_output=True, text=True)
    assert done.returncode == 125
    assert "agentcg session run" in done.stderr


@pytest.mark.full_speed
def test_a_thousand_calls_leave_nothing(daemon: DaemonProcess, agent: AgentProcess) -> None:
    before = daemon.admin.GetPool(pb.GetPoolRequest())
    agent.run(
        """
from concurrent.futures import ThreadPoolExecutor
def one(_):
    return subprocess.call([EXEC, "--name", "t", "--", "true"])
with ThreadPoolExecutor(64) as pool:
    codes = list(pool.map(one, range(1000)))
assert codes == [0] * 1000, codes
"""
    )
    wait_until("all have ended", lambda: not daemon.call_dirs())
    after = daemon.admin.GetPool(pb.GetPoolRequest())
    assert after.calls_ended - before.calls_ended == 1000
    assert after.leftovers_removed == before.leftovers_removed


def test_a_timeout_that_passes_before_anybody_enters_is_one(agent: AgentProcess) -> None:
    """A slow machine may need longer than that to start the command."""
    code = (
        "call = agent.tool_call('late', timeout='50ms')\n"
        "call.__enter__()\n"
        "while agent.calls(): time.sleep(0.01)\n"
        "report = agent.report(call.id)\n"
        "result = (str(report.verdict), report.sentence, dict(report.try_next.enough))"
    )
    verdict, sentence, enough = agent.run(code)
    assert verdict == "timeout" and "was ended at its timeout of 50 ms" in sentence
    assert enough == {"timeout": "1s"}
