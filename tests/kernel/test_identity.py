"""Identity: one session cannot end, see or attach to another's calls, whatever it sends."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import EXEC, PATIENCE, AgentProcess, DaemonProcess, RemoteRpcError, wait_until


@pytest.fixture(scope="module")
def victim(agent: AgentProcess) -> str:
    """A running call of session alpha."""
    call_id: str = agent.run(
        """
result = stub.BeginCall(pb.BeginCallRequest(name="victim")).id
tool = subprocess.Popen([EXEC, "--call", result, "--", "sleep", "1000"])
"""
    )
    return call_id


def alive(daemon: DaemonProcess, call_id: str) -> bool:
    """Whether the call is open and has a process."""
    procs = daemon.cgroup_dir / "alpha" / f"call-{call_id}" / "cgroup.procs"
    wait_until("the tool is in", lambda: bool(procs.read_text().strip()))
    return any(
        c.id == call_id and c.state == pb.CALL_STATE_RUNNING
        for c in daemon.admin.ListCalls(pb.ListCallsRequest()).calls
    )


@pytest.mark.parametrize(
    "request_code",
    [
        "stub.EndCall(pb.EndCallRequest(call_id=victim))",
        "stub.EndCall(pb.EndCallRequest(call_id=victim, detach=True, wait_status=0))",
        "stub.UpdateIntent(pb.UpdateIntentRequest(call_id=victim, intent=pb.Intent(pids_max='1')))",
        "stub.GetReport(pb.GetReportRequest(call_id=victim))",
        "stub.ListCalls(pb.ListCallsRequest(session_id='alpha'))",
    ],
)
def test_another_sessions_call_cannot_be_touched_by_grpc(
    daemon: DaemonProcess, other: AgentProcess, victim: str, request_code: str
) -> None:
    with pytest.raises(RemoteRpcError) as caught:
        other.run(request_code, victim=victim)
    assert caught.value.code == "NOT_FOUND"
    assert alive(daemon, victim)


def test_another_sessions_calls_and_reports_are_not_seen(
    daemon: DaemonProcess, agent: AgentProcess, other: AgentProcess, victim: str
) -> None:
    agent.run("agent.run(['true'])")
    seen = other.run(
        "result = [c.id for c in stub.ListCalls(pb.ListCallsRequest()).calls] + "
        "[r.session_id for r in stub.ListReports(pb.ListReportsRequest(limit=1000)).reports]"
    )
    assert victim not in seen and "alpha" not in seen
    for what in ("Calls", "Reports"):
        with pytest.raises(RemoteRpcError, match="its own session only") as caught:
            other.run(f"stub.List{what}(pb.List{what}Request(session_id='alpha'))")
        assert caught.value.code == "NOT_FOUND"
        other.run(f"stub.List{what}(pb.List{what}Request(session_id='beta'))")
    mine = agent.run("result = [c.id for c in stub.ListCalls(pb.ListCallsRequest()).calls]")
    assert victim in mine


@pytest.mark.parametrize(
    "name",
    ["{victim}", "../alpha/call-{victim}", "/alpha/call-{victim}", "{victim}\n", " {victim}", "*"],
)
def test_another_sessions_call_cannot_be_entered(
    daemon: DaemonProcess, other: AgentProcess, victim: str, name: str
) -> None:
    reply = other.run("result = packet('attach', 'call=' + name)", name=name.format(victim=victim))
    assert reply[:2] == ["ERR", "NOT_FOUND"]
    here = other.run("result = open('/proc/self/cgroup').read()")
    assert f"{daemon.pool_path}/beta/agent" in here


@pytest.mark.usefixtures("other")
def test_nobody_else_reaches_the_servers_behind_the_relay(
    daemon: DaemonProcess, victim: str
) -> None:
    """Even root inside a session, which could give its end the name of another's connection: names
    are free again in another network namespace, and paths lead to sockets across them."""
    code = """
import ctypes
names = [line.split()[-1][1:] for line in open("/proc/net/unix") if "@agentcg-" in line]
found = [line.split()[-1] for line in open("/proc/net/unix") if f"{RUN_DIR}/private/" in line]
ctypes.CDLL(None).unshare(0x40000000)  # CLONE_NEWNET
def reach(path, name):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\\0" + name)
        try:
            sock.connect(path)
        except OSError as error:
            return error.errno
    return 0
result = len(names), {reach(path, name) for path in found for name in names}
"""
    daemon.admin.ListSessions(pb.ListSessionsRequest())
    # The process that tries it is in another network namespace afterwards.
    known, reached = daemon.enter("beta").run(code)
    assert known, "no connection of anybody was there to be taken for"
    assert reached <= {errno.ENOENT}
    assert not [name for name in os.listdir(daemon.run_dir / "private") if ".sock" in name]
    assert alive(daemon, victim)


@pytest.mark.parametrize(
    "request_code",
    [
        "admin.ListSessions(pb.ListSessionsRequest())",
        "admin.CloseSession(pb.CloseSessionRequest(session_id='alpha'))",
        "admin.EndCall(pb.EndCallRequest(call_id=victim))",
        "admin.OpenSession(pb.OpenSessionRequest(spec=pb.SessionSpec(id='mine')))",
        "next(admin.WatchEvents(pb.WatchEventsRequest()))",
    ],
)
def test_root_inside_a_session_is_not_the_operator(
    daemon: DaemonProcess, other: AgentProcess, victim: str, request_code: str
) -> None:
    code = f"""
admin = pb_grpc.AdminStub(grpc.insecure_channel(f"unix:{{RUN_DIR}}/admin/grpc.sock"))
{request_code}
"""
    with pytest.raises(RemoteRpcError) as caught:
        other.run(code, victim=victim)
    assert caught.value.code == "PERMISSION_DENIED"
    assert alive(daemon, victim)


def test_root_inside_a_session_cannot_enter_another(
    daemon: DaemonProcess, other: AgentProcess
) -> None:
    reply = other.run("result = packet('enter', 'session=alpha', role='admin')")
    assert reply[:2] == ["ERR", "PERMISSION_DENIED"]
    reply = other.run("result = packet('enter', 'session=alpha')")
    assert reply[:2] == ["ERR", "INVALID_ARGUMENT"]


def test_a_user_without_root_is_not_the_operator(daemon: DaemonProcess) -> None:
    code = (
        "import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect({str(daemon.run_dir / 'admin/grpc.sock')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Permission" in done.stderr


def test_an_identity_is_looked_up_anew_for_each_request(
    daemon: DaemonProcess, other: AgentProcess
) -> None:
    """A connection made in a session is worth nothing once its process has left it."""
    guest = daemon.enter("beta")
    assert guest.run("result = stub.GetSession(pb.GetSessionRequest()).id") == "beta"
    outside = daemon.cgroup_dir.parent / "cgroup.procs"
    outside.write_text(str(guest.process.pid))
    with pytest.raises(RemoteRpcError) as caught:
        guest.run("stub.GetSession(pb.GetSessionRequest())")
    assert caught.value.code == "PERMISSION_DENIED"


def unfrozen_hierarchy() -> Path | None:
    """Where a cgroup v1 hierarchy that holds nobody back is mounted."""
    for line in Path("/proc/self/mounts").read_bytes().split(b"\n"):
        words = line.split(b" ")
        if len(words) > 3 and words[2] == b"cgroup" and b"freezer" in words[3].split(b","):
            return Path(os.fsdecode(words[1]))
    return None


@pytest.mark.parametrize("mark", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_a_v1_cgroups_name_makes_nobody_another(daemon: DaemonProcess, mark: str) -> None:
    """A name may hold what some readers of text take for the end of a line."""
    hierarchy = unfrozen_hierarchy()
    if hierarchy is None:
        pytest.skip("no cgroup v1 hierarchy with the freezer is mounted here")
    top = hierarchy / f"x{os.getpid()}{mark}0::"
    forged = Path(f"{top}{daemon.pool_path}/alpha/agent")
    forged.mkdir(parents=True)
    guest = daemon.enter("beta")
    try:
        (forged / "cgroup.procs").write_text(str(guest.process.pid))
        assert guest.run("result = stub.GetSession(pb.GetSessionRequest()).id") == "beta"
        fresh = "pb_grpc.AgentStub(grpc.insecure_channel(f'unix:{RUN_DIR}/agent/grpc.sock'))"
        assert guest.run(f"result = {fresh}.GetSession(pb.GetSessionRequest()).id") == "beta"
        show = "[EXEC, '--name', 't', '--', 'cat', '/proc/self/cgroup']"
        shown = guest.run(f"result = subprocess.check_output({show})")
        assert f"\n0::{daemon.pool_path}/beta/call-".encode() in shown
    finally:
        (hierarchy / "cgroup.procs").write_text(str(guest.process.pid))
        for directory in (forged, *forged.parents):
            if directory == hierarchy:
                break
            directory.rmdir()


def test_a_cgroup_whose_name_is_no_utf8_is_one_of_its_session(daemon: DaemonProcess) -> None:
    guest = daemon.enter("beta")
    assert guest.run("result = stub.GetSession(pb.GetSessionRequest()).id") == "beta"
    inner = Path(os.fsdecode(os.fsencode(daemon.cgroup_dir) + b"/beta/agent/\xff\xfe"))
    inner.mkdir()
    try:
        (inner / "cgroup.procs").write_text(str(guest.process.pid))
        connect = "grpc.insecure_channel(f'unix:{RUN_DIR}/agent/grpc.sock')"
        code = f"result = pb_grpc.AgentStub({connect}).GetSession(pb.GetSessionRequest()).id"
        assert guest.run(code) == "beta"
    finally:
        (daemon.cgroup_dir / "beta/agent/cgroup.procs").write_text(str(guest.process.pid))
        inner.rmdir()


GARBAGE = [
    b"",
    b"\0",
    b"ACG1",
    b"ACG1\0",
    b"ACG2\0begin\0name=x\0",
    b"ACG1\0begin\0name\0",
    b"ACG1\0begin\0name=x\0name=y\0",
    b"ACG1\0begin\0\xff\xfe=x\0",
    b"ACG1\0begin\0name=x\0nmae=y\0",
    b"ACG1\0attach\0",
    b"ACG1\0attach\0call=\0",
    b"ACG1\0end\0call=x\0",
    b"x" * 20_000,
    b"ACG1\0begin\0name=" + b"n" * 200 + b"\0",
    b"ACG1\0begin\0name=a\nb\0",
]


def test_garbage_on_the_attach_socket_gets_a_sentence_and_does_no_harm(
    daemon: DaemonProcess, other: AgentProcess
) -> None:
    code = """
replies = []
for data in garbage:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(RUN_DIR / "agent/attach.sock"))
        if data:
            sock.send(data)
        else:
            sock.shutdown(socket.SHUT_WR)
        replies.append(sock.recv(65536))
result = replies
"""
    before = daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun
    replies = other.run(code, garbage=GARBAGE)
    assert replies[0] == b""
    for data, reply in zip(GARBAGE[1:], replies[1:], strict=True):
        words = reply.split(b"\0")
        assert words[:2] == [b"ERR", b"INVALID_ARGUMENT"], (data[:50], reply)
        assert len(words[2]) > 10
    assert daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun == before


@pytest.mark.waits
def test_silent_connections_are_closed_and_do_not_block_others(
    daemon: DaemonProcess, other: AgentProcess
) -> None:
    socks, started = [], time.monotonic()
    for _ in range(200):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(daemon.run_dir / "agent/attach.sock"))
        socks.append(sock)
    assert other.run("result = subprocess.call([EXEC, '--name', 't', '--', 'true'])") == 0
    assert socks[0].recv(10) == b""
    assert time.monotonic() - started > 1
    for sock in socks:
        sock.close()


def test_garbage_on_the_grpc_socket_does_no_harm(
    daemon: DaemonProcess, other: AgentProcess
) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(daemon.run_dir / "agent/grpc.sock"))
            sock.sendall(os.urandom(10_000))
    assert other.run("result = stub.GetSession(pb.GetSessionRequest()).id") == "beta"


def test_one_session_cannot_take_all_connections(
    daemon: DaemonProcess, other: AgentProcess
) -> None:
    code = """
socks = []
for _ in range(300):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(RUN_DIR / "agent/grpc.sock"))
    sock.setblocking(False)
    socks.append(sock)
def is_closed(sock):
    try:
        while sock.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
closed, deadline = set(), time.monotonic() + wait
while len(closed) < most and time.monotonic() < deadline:
    time.sleep(0.1)
    closed.update(sock for sock in socks if sock not in closed and is_closed(sock))
result = len(closed)
for sock in socks:
    sock.close()
"""
    most = 300 - 256
    assert other.run(code, most=most, wait=5 * PATIENCE) >= most
    assert (
        daemon.open("gamma").run("result = stub.GetSession(pb.GetSessionRequest()).id") == "gamma"
    )


def test_a_stranger_is_refused_at_every_door(daemon: DaemonProcess, victim: str) -> None:
    env = {**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    done = subprocess.run([EXEC, "--call", victim, "--", "true"], env=env, capture_output=True)
    assert done.returncode == 125 and b"no session" in done.stderr
    assert alive(daemon, victim)
