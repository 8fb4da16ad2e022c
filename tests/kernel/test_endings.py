"""Ends of calls on a real kernel: what is said of each is what happened."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.host.syscalls import pidfd_info
from tests.harness import SLOW, AgentProcess, DaemonProcess, wait_until

SPAWN = """
done = subprocess.run([EXEC, *options, "--", *argv], stdout=subprocess.DEVNULL)
result = done.returncode
"""
HELD = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="held", intent=pb.Intent(**intent))).id
tool = subprocess.Popen([EXEC, "--call", call_id, "--", *argv], stdout=subprocess.DEVNULL)
result = call_id
"""
END = """
report = stub.EndCall(pb.EndCallRequest(call_id=call_id, reason=reason, **more))
result = report.SerializeToString()
"""
SECOND = f"{1.0 * SLOW:.1f}"
THREAD_GOES_ON = """
import ctypes, os, signal, sys, threading, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def work():
    time.sleep(float(sys.argv[1]))
    os._exit(7)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
ctypes.CDLL(None).syscall(60, 0)  # exit(2): of the main thread alone
"""


def run(agent: AgentProcess, *argv: str, **options: str) -> int:
    """Run a tool in a call of its own; returns its exit status, negative for a signal."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    status: int = agent.run(SPAWN, options=words, argv=list(argv))
    return status


def last(daemon: DaemonProcess) -> pb.Report:
    """The newest report, once all calls have ended."""
    wait_until("all calls have ended", lambda: not daemon.call_dirs())
    return daemon.admin.GetReport(pb.GetReportRequest())


def codes(report: pb.Report) -> list[str]:
    """The names of a report's feedback."""
    return [pb.FeedbackCode.Name(f.code).removeprefix("FEEDBACK_CODE_") for f in report.feedback]


def end(
    agent: AgentProcess,
    reason: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED,
    **more: int,
) -> pb.Report:
    """End the call that the agent holds."""
    return pb.Report.FromString(agent.run(END, reason=reason, more=more))


# What was left running


@pytest.mark.waits
@pytest.mark.parametrize("deaf", [False, True])
def test_a_timeout_that_ended_only_what_was_left_is_told(
    daemon: DaemonProcess, agent: AgentProcess, deaf: bool
) -> None:
    trap = "trap '' TERM; " if deaf else ""
    script = f"for i in 1 2; do ({trap}exec sleep 1000) >/dev/null 2>&1 & done; exit 3"
    assert run(agent, "sh", "-c", script, timeout=SECOND, leftovers="keep") == 3
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 3)
    assert "At the call's timeout of" in report.sentence
    assert "2 processes that it had left running were ended" in report.sentence
    assert codes(report) == ["LEFTOVERS"] and report.feedback[0].numbers["processes"] == 2
    assert any("timeout passed; its main process had ended" in f.what for f in report.facts)


def test_what_a_tool_left_in_cgroups_of_its_own_is_ended_too(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    mount = cgroup2_mount()
    script = (
        f"here={mount}$(sed -n 's/^0:://p' /proc/self/cgroup); mkdir $here/a $here/a/b; "
        "(sh -c 'echo $$ > '$here'/a/b/cgroup.procs; exec sleep 1000') >/dev/null 2>&1 & "
        "until grep -q . $here/a/b/cgroup.procs; do sleep 0.01; done"
    )
    assert run(agent, "sh", "-c", script, timeout=SECOND) == 0
    report = last(daemon)
    assert report.verdict == pb.VERDICT_OK
    assert "1 process that it had left running was ended" in report.sentence
    assert report.wall_usec < 2.9e6 * SLOW, "SIGTERM was enough"


# Who ended it


@pytest.mark.waits
def test_a_main_thread_that_ended_is_no_end(daemon: DaemonProcess, agent: AgentProcess) -> None:
    code = [sys.executable, "-S", "-c", THREAD_GOES_ON]
    assert run(agent, *code, f"{0.5 * SLOW}", name="a") == 7
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 7)
    assert run(agent, *code, "1000", timeout=SECOND, name="b") == -signal.SIGTERM
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    assert any("main thread of the main process" in f.what for f in report.facts)
    assert run(agent, *code, "1000", "deaf", timeout=SECOND, name="c") == -signal.SIGKILL
    assert last(daemon).verdict == pb.VERDICT_TIMEOUT


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (pb.END_REASON_UNSPECIFIED, "its agent ended the call"),
        (pb.END_REASON_TIMEOUT, "its caller says that a timeout of its own had passed"),
        (pb.END_REASON_CANCELLED, "its caller says that it was cancelled"),
    ],
)
@pytest.mark.parametrize("kills_first", [False, True])
def test_the_callers_reason_is_told_as_its_word(
    agent: AgentProcess, reason: pb.EndReason.ValueType, words: str, kills_first: bool
) -> None:
    agent.run(HELD, argv=["sleep", "1000"], intent={})
    agent.run(f"time.sleep({0.1 * SLOW})")
    more = {}
    if kills_first:
        agent.run("tool.kill(); tool.wait()")
        more = {"wait_status": int(signal.SIGKILL)}
    report = end(agent, reason, **more)
    agent.run("tool.wait()")
    assert report.term_signal == signal.SIGKILL
    if kills_first:
        assert report.verdict == pb.VERDICT_SIGNALED
        assert "by whom is not known" in report.sentence
        assert (f"was ended afterwards: {words}" in report.sentence) is (
            reason != pb.END_REASON_UNSPECIFIED
        )
    else:
        assert report.verdict == pb.VERDICT_CANCELLED and words in report.sentence


def test_a_command_that_ended_by_itself_is_not_called_cancelled(agent: AgentProcess) -> None:
    agent.run(HELD, argv=["sh", "-c", "sleep 1000 & exit 0"], intent={})
    agent.run("tool.wait()")
    report = end(agent, pb.END_REASON_TIMEOUT)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_OK, 0)
    assert codes(report) == ["LEFTOVERS"]
    assert "timeout of its own" in report.sentence


def test_who_else_ends_a_call_is_told(daemon: DaemonProcess) -> None:
    agent = daemon.open("gamma")
    call_id = agent.run(HELD, argv=["sleep", "1000"], intent={})
    agent.run(f"time.sleep({0.1 * SLOW})")
    report = daemon.admin.EndCall(pb.EndCallRequest(call_id=call_id))
    assert report.verdict == pb.VERDICT_CANCELLED and "the operator" in report.sentence
    assert report.facts[0].source == "EndCall"
    assert report.facts[0].at_unix_usec >= report.began_unix_usec
    call_id = agent.run(HELD, argv=["sleep", "1000"], intent={})
    agent.run(f"time.sleep({0.1 * SLOW})")
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="gamma"))
    entries = [json.loads(line) for line in daemon.audit_lines()]
    ended = next(e for e in entries if e["event"] == "call_ended" and e["call"] == call_id)
    assert "its session was closed" in ended["report"]["sentence"]


def test_a_daemon_that_is_killed_in_the_time_of_sigterm_knows_it_later(
    daemon: DaemonProcess, agent: AgentProcess, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    script = f"trap 'echo >{told}; sleep 1; exit 9' TERM; while :; do sleep 0.05; done"
    agent.run(HELD, argv=["sh", "-c", script], intent={"timeout": SECOND})
    audit = "timeout passed"
    directory = daemon.call_dirs()[0]
    # The record comes first: a daemon that is killed between the two has ended nothing yet.
    wait_until("SIGTERM was sent", lambda: audit in _record(directory) and told.exists())
    daemon.kill()
    agent.run("tool.wait()")
    daemon.start()
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    assert any(audit in fact.what for fact in report.facts)


def _record(directory: Path) -> str:
    try:
        cgroup = Cgroup.open(directory)
    except FileNotFoundError:
        return ""
    try:
        return (cgroup.get_xattr() or b"").decode()
    finally:
        cgroup.close()


# Tools that leave their cgroup


@pytest.fixture
def elsewhere(daemon: DaemonProcess) -> Iterator[Path]:
    """A cgroup that is not the daemon's."""
    path = daemon.cgroup_dir.with_name(f"{daemon.cgroup_dir.name}-elsewhere")
    path.mkdir()
    try:
        yield path
    finally:
        cgroup = Cgroup.open(path)
        cgroup.kill_and_remove()
        cgroup.close()


def leave(where: Path, then: str) -> list[str]:
    """A tool that moves itself, or is moved by a child, and then goes on."""
    return ["sh", "-c", f"echo $$ > {where}/cgroup.procs; {then}"]


def test_a_tool_that_left_is_told_and_waited_for(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path
) -> None:
    time = 0.3 * SLOW
    for argv in (
        leave(elsewhere, f"sleep {time}; exit 5"),
        ["sh", "-c", f"sh -c 'echo $PPID > {elsewhere}/cgroup.procs'; sleep {time}; exit 5"],
    ):
        assert run(agent, *argv) == 5
        report = last(daemon)
        assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 5)
        assert report.wall_usec >= time * 1e6
        assert f"left the call's cgroup for /{elsewhere.name}" in report.sentence
        assert codes(report) == ["LEFT_CALL"]
        entries = [json.loads(line) for line in daemon.audit_lines()]
        entry = next(
            e for e in entries if e["event"] == "left_call" and e["call"] == report.call_id
        )
        assert (entry["to"], entry["moved_back"]) == (f"/{elsewhere.name}", False)


def test_a_tool_that_left_while_others_stayed_or_at_the_last_moment_is_told(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path
) -> None:
    if not tells_where_processes_end():
        pytest.skip("this kernel does not tell in which cgroup a process has ended")
    assert run(agent, *leave(elsewhere, "exit 3")) == 3
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 3)
    assert codes(report) == ["LEFT_CALL"], report.sentence
    stayed = ["sh", "-c", f"sleep 0.4 & echo $$ > {elsewhere}/cgroup.procs; exit 4"]
    assert run(agent, *stayed) == 4
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 4)
    assert codes(report)[0] == "LEFT_CALL"  # the sleep may be told, too, as left running
    assert f"left the call's cgroup for /{elsewhere.name}" in report.sentence


def tells_where_processes_end() -> bool:
    """Whether this kernel keeps the cgroup of a process that was reaped (Linux 6.15)."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    fd = os.pidfd_open(pid)
    try:
        os.waitpid(pid, 0)
        return pidfd_info(fd).cgroup_id is not None
    finally:
        os.close(fd)


@pytest.mark.waits
@pytest.mark.parametrize("deaf", [False, True])
def test_the_timeout_of_a_tool_that_left_is_kept(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path, deaf: bool
) -> None:
    then = "trap '' TERM; while :; do sleep 0.1; done" if deaf else "exec sleep 1000"
    status = run(agent, *leave(elsewhere, then), timeout=SECOND)
    assert status == -(signal.SIGKILL if deaf else signal.SIGTERM)
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT and "left the call's cgroup" in report.sentence
    # Its sleep, which it took along, is told of as well.
    assert codes(report)[:2] == ["TIMEOUT", "LEFT_CALL"]


def test_what_a_tool_that_left_took_along_is_ended_with_it(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path
) -> None:
    then = "sleep 1001 & (trap '' TERM; sleep 1002; :) & wait"
    assert run(agent, *leave(elsewhere, then), timeout=SECOND) == -signal.SIGTERM
    assert last(daemon).verdict == pb.VERDICT_TIMEOUT
    wait_until("all of them are gone", lambda: not (elsewhere / "cgroup.procs").read_text())


def test_a_child_that_left_is_ended_with_the_call(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path
) -> None:
    child = f"sh -c 'echo $$ > {elsewhere}/cgroup.procs; trap : TERM; while :; do sleep 1; done'"
    assert run(agent, "sh", "-c", f"{child} & wait", timeout=SECOND) == -signal.SIGTERM
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    assert set(codes(report)) == {"TIMEOUT", "LEFT_CALL"}
    # The shell, and its sleep.
    assert report.feedback[-1].numbers["processes"] == 2
    wait_until("it is gone", lambda: not (elsewhere / "cgroup.procs").read_text())


@pytest.mark.waits
def test_what_a_tool_starts_elsewhere_after_sigterm_is_ended_too(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path
) -> None:
    child = f'(trap "" TERM; exec sleep 1000) & echo $! > {elsewhere}/cgroup.procs'
    script = f"trap '{child}' TERM; while :; do sleep 0.1; done"
    assert run(agent, "sh", "-c", script, timeout=SECOND) == -signal.SIGKILL
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    assert set(codes(report)) == {"TIMEOUT", "LEFT_CALL"}
    assert report.feedback[-1].numbers["processes"] == 1
    wait_until("it is gone", lambda: not (elsewhere / "cgroup.procs").read_text())


def test_a_tool_that_left_can_be_ended(agent: AgentProcess, elsewhere: Path) -> None:
    agent.run(HELD, argv=leave(elsewhere, "exec sleep 1000"), intent={})
    wait_until("it has left", lambda: bool((elsewhere / "cgroup.procs").read_text()))
    report = end(agent)
    assert report.verdict == pb.VERDICT_CANCELLED
    assert agent.run("result = tool.wait()") == -signal.SIGKILL


@pytest.mark.parametrize("restarted", [False, True])
def test_an_earlier_commands_process_that_left_is_ended_with_the_call(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path, restarted: bool
) -> None:
    agent.run(HELD, argv=leave(elsewhere, "exec sleep 1000"), intent={})
    wait_until("it has left", lambda: bool((elsewhere / "cgroup.procs").read_text()))
    second = "result = subprocess.call([EXEC, '--call', call_id, '--', 'true'])"
    assert agent.run(second) == 0
    assert agent.run("result = tool.poll()") is None
    if restarted:
        daemon.kill()
        daemon.start()
    report = end(agent, pb.END_REASON_DONE, wait_status=0)
    assert agent.run("result = tool.wait()") == -signal.SIGKILL
    assert report.verdict == pb.VERDICT_OK and codes(report) == ["LEFT_CALL"]
    assert f"of an earlier command left the call's cgroup for /{elsewhere.name}" in report.sentence
    assert report.sentence.endswith("and was ended with the call.")


def test_the_session_of_a_tool_that_left_can_be_closed(
    daemon: DaemonProcess, elsewhere: Path
) -> None:
    agent = daemon.open("delta")
    agent.run(HELD, argv=leave(elsewhere, "exec sleep 1000"), intent={})
    wait_until("it has left", lambda: bool((elsewhere / "cgroup.procs").read_text()))
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="delta"))
    assert not (elsewhere / "cgroup.procs").read_text()


def test_a_tool_among_its_agents_processes_is_moved_back(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    leaf = daemon.cgroup_dir / "alpha" / "agent"
    assert run(agent, *leave(leaf, f"sleep {0.3 * SLOW}; exit 5")) == 5
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 5)
    assert "alpha/agent, where the call's limits do not hold, and was moved back" in report.sentence
    assert run(agent, *leave(leaf, "sleep 1000"), timeout=SECOND) == -signal.SIGTERM
    assert last(daemon).verdict == pb.VERDICT_TIMEOUT


def test_a_tool_that_leaves_again_and_again_is_let_go(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    leaf = daemon.cgroup_dir / "alpha" / "agent"
    again = f"i=0; while [ $i -lt 40 ]; do echo $$ > {leaf}/cgroup.procs; sleep 0.05; "
    assert run(agent, "sh", "-c", f"{again} i=$((i+1)); done; exit 6") == 6
    report = last(daemon)
    assert report.exit_code == 6 and "ran on without the call's limits" in report.sentence
    assert report.feedback[-1].code == pb.FEEDBACK_CODE_LEFT_CALL


def test_a_daemon_that_is_killed_finds_a_tool_that_left_again(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path, tmp_path: Path
) -> None:
    go_on = tmp_path / "go-on"
    then = f"until [ -e {go_on} ]; do sleep 0.05; done; exit 4"
    agent.run(HELD, argv=leave(elsewhere, then), intent={"timeout": "10m"})
    wait_until("it has left", lambda: bool((elsewhere / "cgroup.procs").read_text()))
    daemon.kill()
    daemon.start()
    go_on.touch()
    assert agent.run("result = tool.wait()") == 4
    report = end(agent, wait_status=4 << 8) if daemon.call_dirs() else last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 4)
    assert "left the call's cgroup" in report.sentence
