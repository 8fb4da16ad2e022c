"""Calls whose processes are kept from ending, or from running, by what tools and agents do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import cgroup2_mount
from tests.conftest import StartDaemon
from tests.harness import SLOW, AgentProcess, DaemonProcess, wait_until
from tests.kernel.test_endings import last

START = """
argv = [EXEC, "--name", "tool", "--timeout", timeout, "--", "sh", "-c", script]
tool = subprocess.Popen(argv)
result = tool.pid
"""
TRACE = """
import ctypes
PTRACE_SEIZE, PTRACE_O_TRACEEXIT = 0x4206, 0x40
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = [ctypes.c_long] * 4
if ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACEEXIT):
    raise OSError(ctypes.get_errno(), "ptrace")
"""
OWN = "own=$(sed -n s/^0:://p /proc/self/cgroup);"
SECOND = f"{1000 * SLOW:.0f}ms"


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon that lets a tool have little time to end by itself."""
    return start_daemon("[calls]\nterm_grace = '200ms'\n")


@pytest.fixture
def agent(daemon: DaemonProcess) -> AgentProcess:
    """An agent."""
    return daemon.open("alpha")


@pytest.fixture
def tracer() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test starts; they are ended with it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(agent: AgentProcess, script: str, timeout: str = "1000s") -> int:
    """Start a tool in a call; returns its pid once it runs."""
    pid: int = agent.run(START, script=script, timeout=timeout)
    wait_until("it runs", lambda: b"/call-" in of(pid, "cgroup"))
    wait_until("and is the tool", lambda: b"agentcg-exec" not in of(pid, "cmdline"))
    return pid


def of(pid: int, name: str) -> bytes:
    """What a file of /proc says of a process."""
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] in b"ZX"
    except FileNotFoundError:
        return True


@pytest.mark.waits
def test_a_tool_that_its_agent_keeps_at_its_exit_ends_with_that(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """The kernel drops signals to a process that exits, so only its tracer can move it."""
    pid = start(agent, "exec sleep 1000", SECOND)
    agent.run(TRACE, pid=pid)
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    assert any("kept at its exit by its tracer" in fact.what for fact in report.facts)
    wait_until("the agent is gone", lambda: is_gone(agent.process.pid))
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"))


@pytest.mark.waits
def test_a_tracer_of_the_host_is_named_and_left_alone(
    daemon: DaemonProcess, agent: AgentProcess, tracer: list[subprocess.Popen[str]]
) -> None:
    pid = start(agent, "exec sleep 1000")
    code = f"pid = {pid}\n{TRACE}\nprint('ok', flush=True)\nimport time; time.sleep(1000)"
    tracer.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
    assert tracer[0].stdout is not None and tracer[0].stdout.readline() == "ok\n"
    (call,) = daemon.admin.ListCalls(pb.ListCallsRequest()).calls
    ending = daemon.admin.EndCall.future(pb.EndCallRequest(call_id=call.id))
    wait_until("it is told who keeps it", lambda: ending.done(), 30)
    said = str(ending.exception())
    assert f"process {pid} is kept by its tracer, process {tracer[0].pid} (python" in said
    assert tracer[0].poll() is None
    tracer[0].kill()
    report = last(daemon)
    assert report.verdict == pb.VERDICT_CANCELLED and "the operator" in report.sentence


def test_a_tool_that_freezes_itself_does_not_put_off_its_timeout(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{OWN} echo 1 > {cgroup2_mount()}$own/cgroup.freeze; sleep 1000"
    start(agent, script, SECOND)
    began = time.monotonic()
    # The kernel marks one that takes no signal as dying at once, frozen or not.
    assert agent.run("result = tool.wait()") == -signal.SIGTERM
    assert time.monotonic() - began < 10 * SLOW
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    told = [f.sentence for f in report.feedback if f.code == pb.FEEDBACK_CODE_FROZEN]
    # The daemon had not paused it, and does not say so.
    assert report.frozen_usec == 0
    assert all("by others than agentcgroup" in sentence for sentence in told)


def test_a_tool_that_is_frozen_with_its_session_keeps_its_time(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    if not (daemon.cgroup_dir / "alpha/cgroup.stat.local").exists():
        pytest.skip("this kernel has no cgroup.stat.local")
    start(agent, "sleep 1000", f"{2000 * SLOW:.0f}ms")
    freeze = daemon.cgroup_dir / "alpha/cgroup.freeze"
    freeze.write_text("1")
    time.sleep(3 * SLOW)
    assert len(daemon.call_dirs()) == 1
    freeze.write_text("0")
    # The shell may be told of the end of its command before it is ended itself.
    assert agent.run("result = tool.wait()") in (-signal.SIGTERM, 128 + signal.SIGTERM)
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT and report.wall_usec > 4e6 * SLOW


THREADED = """
import os, signal, sys, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.mkdir(sys.argv[1] + "/t")
open(sys.argv[1] + "/t/cgroup.type", "w").write("threaded")
def away():
    open(sys.argv[1] + "/t/cgroup.threads", "w").write(str(threading.get_native_id()))
    print("away", flush=True)
    time.sleep(1000)
threading.Thread(target=away).start()
time.sleep(1000)
"""


def test_a_tool_with_a_thread_in_a_threaded_cgroup_ends(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """Where processes cannot be listed: reading cgroup.procs there is EOPNOTSUPP."""
    inside = f'{OWN} exec {sys.executable} -S -c "$CODE" {cgroup2_mount()}$own'
    agent.run("os.environ['CODE'] = program", program=THREADED)
    pid = start(agent, inside)
    wait_until("a thread is away", lambda: bool(list(daemon.cgroup_dir.glob("*/call-*/t"))))
    (call,) = daemon.admin.ListCalls(pb.ListCallsRequest()).calls
    report = daemon.admin.EndCall(pb.EndCallRequest(call_id=call.id))
    assert report.verdict == pb.VERDICT_CANCELLED
    assert is_gone(pid) and not daemon.call_dirs()


VFORK = """
import ctypes, os
# The child of vfork(2) holds up its parent, which cannot be signalled to a handler meanwhile.
if ctypes.CDLL(None).vfork() == 0:
    while True:
        pass
"""


def test_a_tool_that_waits_for_its_vforked_child_ends(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    agent.run("os.environ['CODE'] = program", program=VFORK)
    pid = start(agent, f'exec {sys.executable} -S -c "$CODE"', SECOND)
    assert agent.run("result = tool.wait()") in (-signal.SIGKILL, -signal.SIGTERM)
    assert last(daemon).verdict == pb.VERDICT_TIMEOUT
    assert is_gone(pid) and os.path.exists(daemon.run_dir)
