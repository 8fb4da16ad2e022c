"""A daemon killed in the middle of its work, and the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup
from tests.conftest import StartDaemon
from tests.harness import PATIENCE, AgentProcess, DaemonProcess, wait_until

CALLS = 50


@pytest.fixture
def fresh(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon that a test may kill."""
    return start_daemon("[calls]\nattach_timeout = '2s'\n")


def start_tools(agent: AgentProcess, count: int) -> list[str]:
    """`count` calls held by the agent, each with a sleeping tool in it."""
    ids: list[str] = agent.run(
        """
tools = {}
for _ in range(count):
    call_id = stub.BeginCall(pb.BeginCallRequest(name="tool")).id
    tools[call_id] = subprocess.Popen([EXEC, "--call", call_id, "--", "sleep", "1000"])
result = list(tools)
""",
        count=count,
    )
    return ids


def entered(daemon: DaemonProcess) -> int:
    """How many call cgroups hold a process whose launcher has become the tool."""
    count = 0
    for directory in daemon.call_dirs():
        for pid in (directory / "cgroup.procs").read_text().split():
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                count += file.read().startswith(b"sleep")
    return count


def test_fifty_calls_survive_a_killed_daemon_and_end_properly(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    ids = start_tools(agent, CALLS)
    wait_until("all tools run", lambda: entered(fresh) == CALLS, 20)
    fresh.kill()
    # Meanwhile ten tools end: nobody is there to see it.
    agent.run("for c in list(tools)[:10]:\n    tools[c].kill()\n    tools[c].wait()")
    assert len(fresh.call_dirs()) == CALLS
    fresh.start()
    listed = {c.id for c in fresh.admin.ListCalls(pb.ListCallsRequest()).calls}
    assert listed == set(ids)
    ended = agent.run(
        """
result = {}
for call_id, tool in tools.items():
    status = -tool.returncode if tool.returncode is not None else None
    report = stub.EndCall(
        pb.EndCallRequest(call_id=call_id, wait_status=status), wait_for_ready=True
    )
    result[call_id] = (report.verdict, report.evidence)
    tool.wait()
"""
    )
    for call_id in ids[:10]:
        # The kernel keeps no status of a process that nobody held; its parent's word is taken.
        assert ended[call_id] == (pb.VERDICT_SIGNALED, pb.EVIDENCE_CLIENT)
    for call_id in ids[10:]:
        assert ended[call_id][0] == pb.VERDICT_CANCELLED
    assert fresh.call_dirs() == []
    assert fresh.admin.GetPool(pb.GetPoolRequest()).calls_ended == CALLS


def test_calls_whose_tools_and_owner_ended_meanwhile_are_reported(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    ids = start_tools(agent, 5)
    wait_until("all tools run", lambda: entered(fresh) == 5)
    fresh.kill()
    agent.run("for t in tools.values():\n    t.kill()\n    t.wait()")
    agent.close()
    fresh.start()
    assert fresh.call_dirs() == []
    reports = fresh.admin.ListReports(pb.ListReportsRequest()).reports
    assert {r.call_id for r in reports} == set(ids)
    assert {r.verdict for r in reports} == {pb.VERDICT_UNKNOWN}


def test_reports_and_sessions_are_there_after_a_restart(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha", priority="important", calls_max="7")
    agent.run("agent.run(['sh', '-c', 'exit 5'])")
    before = fresh.admin.GetReport(pb.GetReportRequest())
    fresh.kill()
    fresh.start()
    assert fresh.admin.GetReport(pb.GetReportRequest(call_id=before.call_id)) == before
    session = fresh.admin.ListSessions(pb.ListSessionsRequest()).sessions[0]
    assert (session.id, session.priority, session.calls_max) == ("alpha", 80, 7)
    assert session.calls_ended == 1


def test_an_orderly_stop_keeps_calls_too(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    ids = start_tools(agent, 3)
    wait_until("all tools run", lambda: entered(fresh) == 3)
    fresh.stop()
    assert len(fresh.call_dirs()) == 3
    fresh.start()
    assert {c.id for c in fresh.admin.ListCalls(pb.ListCallsRequest()).calls} == set(ids)


def test_a_frozen_call_goes_on_within_two_seconds_of_a_restart(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    start_tools(agent, 1)
    wait_until("the tool runs", lambda: entered(fresh) == 1)
    freeze = fresh.call_dirs()[0] / "cgroup.freeze"
    fresh.kill()
    freeze.write_text("1")
    fresh.start()
    wait_until("it is thawed", lambda: freeze.read_text().strip() == "0", 2, promised=True)


def test_leftovers_are_swept_and_what_is_not_ours_is_left_alone(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    agent.run("pass")  # it is in
    fresh.stop()
    session = Cgroup.open(fresh.cgroup_dir / "alpha")
    # As after a crash between mkdir and the record.
    session.make_child("call-000000000000")
    strange = session.make_child("call-111111111111")
    strange.attach(agent.process.pid)
    (fresh.cgroup_dir / "stray").mkdir()
    fresh.start()
    assert fresh.admin.GetPool(pb.GetPoolRequest()).leftovers_removed == 2
    assert [d.name for d in fresh.call_dirs()] == ["call-111111111111"]
    assert not (fresh.cgroup_dir / "stray").exists()
    os.kill(agent.process.pid, 0)
    session.close()


@pytest.mark.parametrize("leftovers", ["end", "keep"])
def test_what_a_command_left_running_is_known_after_a_restart(
    fresh: DaemonProcess, tmp_path: Path, leftovers: str
) -> None:
    agent = fresh.open("alpha")
    go = tmp_path / "go"
    os.mkfifo(go)
    script = f"sleep 1000 > /dev/null 2>&1 & read line < {go}"
    agent.run(
        """
argv = [EXEC, f"--leftovers={leftovers}", "--", "sh", "-c", script]
tool = subprocess.Popen(argv)
""",
        leftovers=leftovers,
        script=script,
    )
    wait_until("the tool runs", lambda: entered(fresh) >= 1)
    fresh.kill()
    go.write_text("go\n")
    assert agent.run("result = tool.wait()") == 0
    fresh.start()
    if leftovers == "end":
        wait_until("the call has ended", lambda: not fresh.call_dirs())
        request = pb.ListReportsRequest(session_id="alpha", limit=1)
        report = fresh.admin.ListReports(request).reports[0]
        assert pb.FEEDBACK_CODE_LEFTOVERS in [f.code for f in report.feedback]
        return
    with pytest.raises(AssertionError):
        wait_until("the call ends", lambda: not fresh.call_dirs(), 1.5, promised=True)
    fresh.admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"))
    assert not fresh.call_dirs()


def test_two_daemons_do_not_share_a_run_directory(fresh: DaemonProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agentcgroupd", "--config", str(fresh.config)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 78
    assert "another daemon is running" in done.stderr
    assert fresh.open("beta").run("result = stub.GetSession(pb.GetSessionRequest()).id") == "beta"


@pytest.mark.parametrize("ends", ["while the daemon is away", "after its return"])
def test_the_sdk_rides_over_a_restart(fresh: DaemonProcess, tmp_path: Path, ends: str) -> None:
    agent = fresh.open("alpha")
    end = tmp_path / "end"
    # The SDK gives up the report after some seconds, in which a busy machine starts no daemon.
    agent.run(
        """
import threading
import agentcgroup.flow
agentcgroup.flow.END_TIMEOUT_S = 300.0
box = {}
def work():
    box["done"] = agent.run(["sh", "-c", 'while [ ! -e "$0" ]; do sleep 0.1; done; exit 6', end])
thread = threading.Thread(target=work)
thread.start()
""",
        end=str(end),
    )
    wait_until("the tool runs", lambda: bool(fresh.call_dirs()) and _tool_runs(fresh))
    (procs,) = (directory / "cgroup.procs" for directory in fresh.call_dirs())
    fresh.kill()
    if ends == "while the daemon is away":
        end.touch()
        wait_until("the tool has ended", lambda: procs.read_text() == "")
    fresh.start()
    end.touch()
    result = agent.run(
        "thread.join()\nresult = (box['done'].returncode, str(box['done'].report.verdict))"
    )
    assert result == (6, "failed")
    assert fresh.call_dirs() == []


def _tool_runs(daemon: DaemonProcess) -> bool:
    """The launcher has its answer and has become the tool."""
    for pid in (daemon.call_dirs()[0] / "cgroup.procs").read_text().split():
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if file.read().startswith(b"sh\0"):
                return True
    return False


def test_a_session_closed_while_calls_run_takes_them_along(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    start_tools(agent, 3)
    wait_until("all tools run", lambda: entered(fresh) == 3)
    closed = fresh.admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"))
    assert closed.calls_ended == 3
    assert not (fresh.cgroup_dir / "alpha").exists()
    assert agent.process.wait(10 * PATIENCE) == -signal.SIGKILL


@pytest.mark.waits
def test_servers_that_do_not_end_keep_no_call_frozen(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.module = "tests.stuck_daemon"
    daemon.start()
    try:
        agent = daemon.open("alpha")
        (call_id,) = start_tools(agent, 1)
        freeze = daemon.cgroup_dir / f"alpha/call-{call_id}/cgroup.freeze"
        wait_until("the call is frozen", lambda: freeze.read_text() == "1\n")
        assert daemon.process is not None
        daemon.process.terminate()
        wait_until("the call goes on", lambda: freeze.read_text() == "0\n", 1)
        assert daemon.process.poll() is None, "its servers are still there"
        assert daemon.process.wait(30 * PATIENCE) == 0
        said = daemon.log.read_text()
        for role in ("agent", "admin"):
            assert f"the {role} gRPC server did not stop within 2 s" in said
    finally:
        daemon.close()
