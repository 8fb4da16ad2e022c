"""Requests in packets: who asks is known as over gRPC, and what is too long goes there."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from agentcgroup import Admin, errors, packets
from agentcgroup.flow import Rpc
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import AgentProcess, DaemonProcess


@pytest.fixture
def admin(daemon: DaemonProcess) -> Iterator[Admin]:
    with Admin(str(daemon.run_dir)) as client:
        yield client


def _ask(path: str, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(path)
        sock.send(data)
        return sock.recv(1 << 20)


def test_the_operator_asks_without_grpc(
    daemon: DaemonProcess, agent: AgentProcess, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(admin.connection), "stub", None)
    assert "alpha" in [session.id for session in admin.sessions()]
    assert admin.pool().sessions_open >= 1
    opened = admin.open_session("by-packet", pids_max=100)
    assert opened.pids_max == 100
    with pytest.raises(errors.AlreadyExists, match="open already"):
        admin.open_session("by-packet")
    with pytest.raises(errors.InvalidIntent) as caught:
        admin.open_session("worse", memory_max="lots")
    assert (caught.value.field, caught.value.value) == ("memory_max", "lots")
    assert admin.close_session("by-packet") == 0


def test_an_agent_asks_for_its_own_session(agent: AgentProcess, other: AgentProcess) -> None:
    for process, name in ((agent, "alpha"), (other, "beta")):
        found = process.run("result = (agent.session().id, agent.budget().calls_max)")
        assert found[0] == name and found[1] > 0
    refused = (
        "try:\n    agent.report('nobody')\nexcept Exception as error:\n    result = str(error)"
    )
    assert "no report of a call 'nobody'" in agent.run(refused)


def test_the_operators_socket_is_not_for_a_session(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code = (
        "from agentcgroup import Admin\n"
        "try:\n    Admin(run_dir).sessions()\n"
        "except Exception as error:\n    result = (type(error).__name__, str(error))"
    )
    kind, sentence = agent.run(code, run_dir=str(daemon.run_dir))
    assert kind == "PermissionDenied" and "session alpha may not act as the operator" in sentence


def test_what_is_too_long_for_a_packet_goes_over_grpc(
    daemon: DaemonProcess, agent: AgentProcess, admin: Admin
) -> None:
    begin = "calls = [agent.tool_call('t', argv=['x' * 4096]).begin() for _ in range(40)]"
    agent.run(begin + "\nkept.extend(calls)\nresult = None", kept=[])
    path = f"{daemon.run_dir}/admin/attach.sock"
    data = packets.packet_for(Rpc("ListCalls", pb.ListCallsRequest()))
    assert data is not None
    assert _ask(path, data) == b"LONG\0"
    assert len(admin.calls("alpha")) == 40
    for call in admin.calls("alpha"):
        admin.end_call(call.id)


def test_a_stream_or_an_unknown_method_is_refused(daemon: DaemonProcess) -> None:
    path = f"{daemon.run_dir}/admin/attach.sock"
    for method in (b"WatchEvents", b"GetSession", b"__init__", b"answer", b""):
        reply = _ask(path, b"ACG1\0rpc\0" + method + b"\0")
        assert reply.startswith(b"ERR\0")
        error = pb.Error.FromString(reply[4:])
        assert (error.code, error.field) == ("INVALID_ARGUMENT", "method")
