"""Calls for one command: they end with it, and who began them is told over the same connection."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import AgentProcess, DaemonProcess, wait_until

BEGIN = """
import socket
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(f"{run_dir}/agent/attach.sock")
request = pb.BeginCallRequest(name="one", argv=["one"], one_command=True)
sock.send(b"ACG1\\0rpc\\0BeginCall\\0" + request.SerializeToString())
raw = sock.recv(1 << 20)
assert raw[:3] == b"OK\\0", raw
call_id = pb.Call.FromString(raw[3:]).id
tool = subprocess.Popen([EXEC, f"--call={call_id}", "--", "sh", "-c", script])
"""
REPORT = """
sock.settimeout(60)
raw = sock.recv(1 << 20)
result = raw[3:], sock.recv(1)
sock.close()
tool.wait()
"""
END = """
request = pb.EndCallRequest(call_id=call_id, wait_status=tool.wait() << 8)
sock.send(b"ACG1\\0rpc\\0EndCall\\0" + request.SerializeToString())
"""


def begin(daemon: DaemonProcess, agent: AgentProcess, script: str) -> None:
    agent.run(BEGIN, run_dir=str(daemon.run_dir), script=script)


def is_entered(daemon: DaemonProcess) -> bool:
    return any((call / "cgroup.procs").read_text() for call in daemon.call_dirs())


def report(agent: AgentProcess, code: str = "") -> pb.Report:
    raw, rest = agent.run(code + REPORT)
    assert rest == b""  # the connection ends behind it
    return pb.Report.FromString(raw)


def test_the_report_comes_when_the_command_has_ended(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    begin(daemon, agent, "exit 0")
    found = report(agent)
    assert (found.verdict, found.exit_code) == (pb.VERDICT_OK, 0)
    assert found.evidence == pb.EVIDENCE_KERNEL
    # What follows the answer is done a moment later.
    wait_until("its cgroup is gone", lambda: not daemon.call_dirs())
    wait_until("it is written down", lambda: found.call_id in daemon.audit_path.read_text())
    events = [json.loads(line) for line in daemon.audit_lines() if found.call_id in line]
    assert [entry["event"] for entry in events] == ["call_begun", "call_ended"]
    assert agent.run("result = agent.report().call_id") == found.call_id


@pytest.mark.parametrize("status", [1, 3])
def test_another_status_is_told_by_who_waited_for_it(
    daemon: DaemonProcess, agent: AgentProcess, status: int
) -> None:
    begin(daemon, agent, f"exit {status}")
    agent.run("tool.wait()")
    assert len(daemon.call_dirs()) == 1
    found = report(agent, END)
    assert (found.verdict, found.exit_code) == (pb.VERDICT_FAILED, status)
    wait_until("its cgroup is gone", lambda: not daemon.call_dirs())


def test_what_is_left_running_is_ended_by_who_says_so(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    begin(daemon, agent, "sleep 1000 & exit 0")
    agent.run("tool.wait()")
    assert len(daemon.call_dirs()) == 1
    assert report(agent, END).verdict == pb.VERDICT_OK
    wait_until("its cgroup is gone", lambda: not daemon.call_dirs())


def test_a_call_whose_connection_ends_goes_on_while_its_command_runs(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    begin(daemon, agent, "sleep 1000")
    wait_until("the tool is in its call", lambda: is_entered(daemon))
    agent.run("sock.close()")
    assert len(agent.run("result = [call.id for call in agent.calls()]")) == 1
    assert agent.run("result = agent.end_call(call_id).verdict") == "cancelled"


def test_a_call_that_nobody_waits_for_ends_with_its_command(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    begin(daemon, agent, "exec sleep 1000")
    wait_until("the tool is in its call", lambda: is_entered(daemon))
    agent.run("sock.close(); tool.kill(); tool.wait()")
    wait_until("its cgroup is gone", lambda: not daemon.call_dirs())
    assert agent.run("result = agent.report(call_id).term_signal") == signal.SIGKILL


def test_a_call_that_nobody_enters_goes_with_its_connection(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    agent.run(BEGIN.partition("tool =")[0], run_dir=str(daemon.run_dir), script="")
    assert len(daemon.call_dirs()) == 1
    agent.run("sock.close()")
    wait_until("its cgroup is gone", lambda: not daemon.call_dirs())


def test_the_connection_is_no_way_for_others(daemon: DaemonProcess, agent: AgentProcess) -> None:
    begin(daemon, agent, "sleep 1000")
    wait_until("the tool is in its call", lambda: is_entered(daemon))
    code = """
request = b"ACG1\\0rpc\\0EndCall\\0" + pb.EndCallRequest(call_id=call_id).SerializeToString()
child = os.fork()
if not child:
    sock.send(request)
    os._exit(0)
os.waitpid(child, 0)
raw = sock.recv(1 << 20)
result = raw[:4], pb.Error.FromString(raw[4:]).code
"""
    found: Any = agent.run(code)
    assert found == (b"ERR\0", "PERMISSION_DENIED")
    assert agent.run("result = agent.end_call(call_id).verdict") == "cancelled"


def test_refused_while_the_launcher_waits(daemon: DaemonProcess, agent: AgentProcess) -> None:
    code = """
try:
    agent.run(["sh", "-c", "echo ran"], capture_output=True, memory="lots")
except Exception as error:
    result = type(error).__name__, str(error)
"""
    children = "result = open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read()"
    before = agent.run(children)
    kind, sentence = agent.run(code)
    assert kind == "InvalidIntent" and "memory" in sentence
    assert agent.run(children) == before


def test_what_cannot_be_executed_is_told_as_ever(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code = """
try:
    agent.run(["no-such-program-here"])
except FileNotFoundError as error:
    result = error.filename
"""
    assert agent.run(code) == "no-such-program-here"
    wait_until("its cgroup is gone", lambda: not daemon.call_dirs())


ASYNC = """
import asyncio
from agentcgroup import AsyncAgent

async def main():
    async with AsyncAgent() as asker:
        ran = [asker.run(["sh", "-c", f"echo {n}; exit {n}"], capture_output=True, text=True)
               for n in range(4)]
        done = await asyncio.gather(*ran)
        told = [(d.stdout.strip(), d.returncode, d.report.exit_code) for d in done]
        failed = []
        for argv, intent in ((["no-such-program-here"], {}), (["true"], {"memory": "lots"})):
            try:
                await asker.run(argv, **intent)
            except Exception as error:
                failed.append(type(error).__name__)
        try:
            await asyncio.wait_for(asker.run(["sleep", "1000"]), 1)
        except asyncio.TimeoutError:
            failed.append("timeout")
        return told, failed, (await asker.report()).verdict

result = asyncio.run(main())
"""


def test_asyncio_has_the_same(daemon: DaemonProcess, agent: AgentProcess) -> None:
    told, failed, verdict = agent.run(ASYNC)
    assert told == [(str(n), n, n) for n in range(4)]
    assert failed == ["FileNotFoundError", "InvalidIntent", "timeout"]
    assert verdict == "cancelled"
    wait_until("all have ended", lambda: not daemon.call_dirs())
