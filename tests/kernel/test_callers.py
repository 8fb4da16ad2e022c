"""What a tool may do to the calls of its session from inside its own call, however it asks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import ROOT, AgentProcess, DaemonProcess, RemoteRpcError, wait_until

OWN = {
    "memory": "8M",
    "memory_max": "64M",
    "cpu_weight": "50",
    "cpu_max": "500m",
    "pids_max": "100",
    "timeout": "1h",
    "priority": "40",
    "on_pressure": "freeze",
}
"""The intent of the call that the tool is in."""


def begin(agent: AgentProcess, name: str, **intent: str) -> str:
    """Begin a call that the agent holds open; returns its id."""
    code = "result = stub.BeginCall(pb.BeginCallRequest(name=name, intent=pb.Intent(**intent))).id"
    call_id: str = agent.run(code, name=name, intent=intent)
    return call_id


def end(agent: AgentProcess, *call_ids: str) -> None:
    """End calls."""
    agent.run("for i in ids: stub.EndCall(pb.EndCallRequest(call_id=i))", ids=call_ids)


@pytest.fixture(scope="module")
def own(agent: AgentProcess) -> Iterator[str]:
    """The id of the call that the tool is in."""
    call_id = begin(agent, "own", **OWN)
    yield call_id
    end(agent, call_id)


@pytest.fixture(scope="module")
def sibling(agent: AgentProcess) -> Iterator[str]:
    """The id of another call of the session."""
    call_id = begin(agent, "sibling", **OWN)
    yield call_id
    end(agent, call_id)


@pytest.fixture(scope="module")
def tool(daemon: DaemonProcess, agent: AgentProcess, own: str) -> AgentProcess:
    """A process inside the call, with a gRPC connection that it made before it went there."""
    made = daemon.enter("alpha")
    made.run("stub.GetSession(pb.GetSessionRequest())")
    answer = made.run("result = packet('attach', 'call=' + call_id)", call_id=own)
    assert answer[0] == "OK"
    return made


def refused(tool: AgentProcess, code: str, **values: object) -> RemoteRpcError:
    """Run a request that has to be refused; returns the error."""
    with pytest.raises(RemoteRpcError) as caught:
        tool.run(code, **values)
    return caught.value


BY_PACKET = """
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect(str(RUN_DIR / "agent/attach.sock"))
    request = pb.EndCallRequest(call_id=call_id)
    sock.send(b"ACG1\\0rpc\\0EndCall\\0" + request.SerializeToString())
    word, _, raw = sock.recv(65536).partition(b"\\0")
    result = word, pb.Error.FromString(raw).code if word == b"ERR" else "", raw
"""


@pytest.mark.parametrize("which", ["sibling", "own"])
def test_a_tool_ends_neither_its_own_call_nor_one_beside_it(
    agent: AgentProcess, tool: AgentProcess, own: str, sibling: str, which: str
) -> None:
    call_id = {"own": own, "sibling": sibling}[which]
    for detach in (False, True):
        request = "stub.EndCall(pb.EndCallRequest(call_id=call_id, detach=detach))"
        error = refused(tool, request, call_id=call_id, detach=detach)
        assert error.code == "PERMISSION_DENIED"
        assert own in error.details and call_id in error.details
        assert error.error.allowed == f"a call that was begun in call {own}"
    word, code, _ = tool.run(BY_PACKET, call_id=call_id)
    assert (word, code) == (b"ERR", "PERMISSION_DENIED")
    open_ids = agent.run("result = [c.id for c in stub.ListCalls(pb.ListCallsRequest()).calls]")
    assert {own, sibling} <= set(open_ids)


def test_a_tool_cannot_enter_a_call_beside_its_own(
    daemon: DaemonProcess, tool: AgentProcess, own: str, sibling: str
) -> None:
    answer = tool.run("result = packet('attach', 'call=' + call_id)", call_id=sibling)
    assert answer[:2] == ["ERR", "PERMISSION_DENIED"]
    assert own in answer[2]
    assert f"call-{own}" in tool.run("result = open('/proc/self/cgroup').read()")
    assert tool.run("result = packet('attach', 'call=' + call_id)", call_id=own)[0] == "OK"


RAISED = {
    "memory": "16M",
    "memory_max": "65M",
    "cpu_weight": "51",
    "cpu_max": "501m",
    "pids_max": "101",
    "timeout": "2h",
    "priority": "41",
    "on_pressure": "throttle",
    "hint": "memory:high",
    "gpu": "1%",
    "gpu_memory": "1G",
}


UPDATE = """
request = pb.UpdateIntentRequest(call_id=call_id, intent=pb.Intent(**intent))
grant = stub.UpdateIntent(request).grant
result = {f.name: value for f, value in grant.ListFields() if isinstance(value, (int, str))}
"""


@pytest.mark.parametrize("field", RAISED)
def test_a_tool_raises_nothing_of_its_own_call(
    agent: AgentProcess, tool: AgentProcess, own: str, field: str
) -> None:
    error = refused(tool, UPDATE, call_id=own, intent={field: RAISED[field]})
    assert error.code == "PERMISSION_DENIED"
    assert error.error.field == field and error.error.value and error.error.allowed
    calls = agent.run(
        "result = [c.grant.SerializeToString() for c in stub.ListCalls(pb.ListCallsRequest()).calls"
        " if c.id == call_id]",
        call_id=own,
    )
    (grant,) = map(pb.Grant.FromString, calls)
    assert (grant.memory_max_bytes, grant.pids_max, grant.priority) == (64 << 20, 100, 40)
    assert (grant.timeout_usec, grant.cpu_weight) == (3_600_000_000, 50)


def test_a_tool_cannot_change_a_call_beside_its_own(
    tool: AgentProcess, own: str, sibling: str
) -> None:
    error = refused(tool, UPDATE, call_id=sibling, intent={"pids_max": "1"})
    assert error.code == "PERMISSION_DENIED" and own in error.details


def test_a_tool_may_lower_what_its_call_has(daemon: DaemonProcess, agent: AgentProcess) -> None:
    call_id = begin(agent, "lower", **OWN)
    guest = daemon.enter("alpha")
    guest.run("packet('attach', 'call=' + call_id)", call_id=call_id)
    less = {"memory_max": "32M", "pids_max": "50", "timeout": "30m", "on_pressure": "kill"}
    grant = guest.run(UPDATE, call_id=call_id, intent=less)
    assert grant["memory_max_bytes"] == 32 << 20 and grant["pids_max"] == 50
    assert grant["timeout_usec"] == 1_800_000_000 and grant["on_pressure"] == "kill"
    # A lower priority would stand for a higher weight than the call had asked for.
    assert guest.run(UPDATE, call_id=call_id, intent={"priority": "39"})["cpu_weight"] == 50
    assert refused(guest, UPDATE, call_id=call_id, intent={"pids_max": "51"})
    # The agent may give it back.
    assert agent.run(UPDATE, call_id=call_id, intent={"pids_max": "51"})["pids_max"] == 51
    end(agent, call_id)


def test_a_tool_sees_its_session_and_its_own_call_only(
    agent: AgentProcess, tool: AgentProcess, own: str, sibling: str
) -> None:
    agent.run("agent.run(['true'])")
    listed = "result = [c.id for c in stub.ListCalls(pb.ListCallsRequest()).calls]"
    assert tool.run(listed) == [own]
    assert {own, sibling} <= set(agent.run(listed))
    assert tool.run("result = stub.GetSession(pb.GetSessionRequest()).id") == "alpha"
    assert tool.run("result = len(stub.ListReports(pb.ListReportsRequest(limit=9)).reports)") == 0
    newest = agent.run("result = stub.GetReport(pb.GetReportRequest()).call_id")
    for call_id in (newest, ""):
        request = "stub.GetReport(pb.GetReportRequest(call_id=call_id))"
        assert refused(tool, request, call_id=call_id).code == "NOT_FOUND"
    # EndCall answers with the report of a call that has ended, to whoever may read that.
    request = "stub.EndCall(pb.EndCallRequest(call_id=call_id))"
    assert refused(tool, request, call_id=newest).code == "NOT_FOUND"


def test_a_cgroup_of_the_tools_own_is_a_place_in_its_call(
    daemon: DaemonProcess, agent: AgentProcess, own: str, sibling: str
) -> None:
    """Even one that has the name of another call, or of the agent's leaf."""
    guest = daemon.enter("alpha")
    guest.run("packet('attach', 'call=' + call_id)", call_id=own)
    for name in ("mine", "agent", f"call-{sibling}"):
        inner = daemon.cgroup_dir / f"alpha/call-{own}" / name
        inner.mkdir()
        (inner / "cgroup.procs").write_text(str(guest.process.pid))
        for call_id in (own, sibling):
            request = "stub.EndCall(pb.EndCallRequest(call_id=call_id))"
            assert refused(guest, request, call_id=call_id).code == "PERMISSION_DENIED"
        (inner.parent / "cgroup.procs").write_text(str(guest.process.pid))
        inner.rmdir()
    guest.close()


def test_a_connection_serves_only_the_process_that_opened_it(
    agent: AgentProcess, sibling: str
) -> None:
    """A tool that inherits a connection of its agent's does not speak for it."""
    code = """
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(str(RUN_DIR / "agent/attach.sock"))
request = pb.EndCallRequest(call_id=call_id).SerializeToString()
pid = os.fork()
if pid == 0:
    sock.send(b"ACG1\\0rpc\\0EndCall\\0" + request)
    os._exit(0)
os.waitpid(pid, 0)
word, _, raw = sock.recv(65536).partition(b"\\0")
sock.close()
result = word, pb.Error.FromString(raw).sentence
"""
    word, sentence = agent.run(code, call_id=sibling)
    assert word == b"ERR" and "each process has to open its own" in sentence
    open_ids = agent.run("result = [c.id for c in stub.ListCalls(pb.ListCallsRequest()).calls]")
    assert sibling in open_ids


def test_tools_may_be_trusted(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("[calls]\ntools_may = 'manage'\n")
    agent = daemon.open("alpha")
    own, sibling = begin(agent, "own", **OWN), begin(agent, "sibling")
    guest = daemon.enter("alpha")
    guest.run("packet('attach', 'call=' + call_id)", call_id=own)
    assert guest.run(UPDATE, call_id=own, intent={"pids_max": "101"})["pids_max"] == 101
    end(guest, sibling)
    assert guest.run("result = [c.id for c in stub.ListCalls(pb.ListCallsRequest()).calls]") == [
        own
    ]


@pytest.mark.programs
def test_a_shell_that_was_only_observed_is_the_agents_hand(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("[boundaries]\nrules = [{ program = ['sh'], shell_command = true }]\n")
    agent = daemon.open("alpha")
    victim = begin(agent, "victim")
    worker = f"{sys.executable} -c 'import tests.agent_worker as w; w.main()'"
    code = """
import pickle
shell = subprocess.Popen(["sh", "-c", worker + "; true"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, cwd=root, env={**os.environ, "PYTHONPATH": root})
"""
    agent.run(code, worker=worker, root=str(ROOT))
    ask = """
pickle.dump((asked, values), shell.stdin)
shell.stdin.flush()
result = pickle.load(shell.stdout)
"""

    def run(asked: str, **values: object) -> tuple[bool, Any]:
        answer: tuple[bool, Any] = agent.run(ask, asked=asked, values=values)
        return answer

    where = "result = open('/proc/self/cgroup').read()"
    wait_until("the shell is in a call", lambda: "/alpha/call-" in run(where)[1])
    calls = agent.run("result = [(c.id, c.observed) for c in agent.calls()]")
    (observed,) = [call_id for call_id, was_observed in calls if was_observed]
    grow = {"call_id": observed, "intent": {"pids_max": "100000"}}
    ok, error = run(UPDATE, **grow)
    assert not ok and error.code == "PERMISSION_DENIED"
    request = "result = stub.EndCall(pb.EndCallRequest(call_id=call_id)).verdict"
    assert run(request, call_id=victim) == (True, pb.VERDICT_ABANDONED)
    agent.run("shell.kill(); shell.wait()")
