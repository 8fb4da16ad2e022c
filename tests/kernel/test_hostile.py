"""Odd moments and odd names: each of these once took a call, a session or the daemon with it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import SLOW, DaemonProcess, RemoteRpcError, wait_until


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Iterator[DaemonProcess]:
    """A daemon whose calls do not idle for long; what it did not expect, even at its end, fails the
    test."""
    running = start_daemon("[calls]\nidle_timeout = '12s'\n")
    yield running
    running.close()
    assert "Traceback" not in running.log.read_text()


def test_a_name_that_is_no_text(daemon: DaemonProcess) -> None:
    agent = daemon.open("alpha")
    code = "result = subprocess.call([EXEC, b'--name', b'bad\\xff', '--', 'true', b'\\xfe'])"
    assert agent.run(code) == 0
    wait_until("it has ended", lambda: not daemon.call_dirs())
    report = daemon.admin.GetReport(pb.GetReportRequest())
    assert (report.name, list(report.argv)) == ("bad\ufffd", ["true", "\ufffd"])
    daemon.kill()
    daemon.start()


def test_ends_at_the_same_time(daemon: DaemonProcess) -> None:
    agent = daemon.open("alpha")
    code = """
from concurrent.futures import ThreadPoolExecutor
def one(number):
    call_id = stub.BeginCall(pb.BeginCallRequest(name="x")).id
    tool = subprocess.Popen([EXEC, "--call", call_id, "--", "sleep", "1000"], stderr=-3)
    time.sleep(0.002 * (number % 7))
    with ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(stub.EndCall, pb.EndCallRequest(call_id=call_id)) for _ in range(3)]
    tool.wait()
    return {e.result().call_id for e in ends} == {call_id}
result = [one(number) for number in range(rounds)]
"""
    assert all(agent.run(code, rounds=int(30 / SLOW) + 5))
    assert not daemon.call_dirs()


@pytest.mark.waits
def test_a_held_call_that_idles_is_ended(daemon: DaemonProcess) -> None:
    agent = daemon.open("alpha")
    call_id = agent.run(
        "result = stub.BeginCall(pb.BeginCallRequest(name='x')).id\n"
        "subprocess.call([EXEC, '--call', result, '--', 'true'])"
    )
    started = time.monotonic()
    wait_until("it is ended", lambda: not daemon.call_dirs(), 25)
    assert time.monotonic() - started > 8
    report = daemon.admin.GetReport(pb.GetReportRequest(call_id=call_id))
    assert report.verdict == pb.VERDICT_OK


def test_a_session_whose_cgroup_someone_removed(daemon: DaemonProcess) -> None:
    spec = pb.SessionSpec(id="gone")
    daemon.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
    directory = daemon.cgroup_dir / "gone"
    (directory / "agent").rmdir()
    directory.rmdir()
    daemon.open("alpha")
    listed = [s.id for s in daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions]
    assert listed == ["alpha"]
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="gone"))
    daemon.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
    assert directory.exists()


def test_an_ending_call_cannot_be_prolonged(daemon: DaemonProcess) -> None:
    agent = daemon.open("alpha")
    code = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="x", intent=pb.Intent(timeout=timeout))).id
script = "trap '' TERM; while :; do sleep 0.1; done"
tool = subprocess.Popen([EXEC, "--call", call_id, "--", "sh", "-c", script])
refused = 0
while tool.poll() is None:
    try:
        update = pb.UpdateIntentRequest(call_id=call_id, intent=pb.Intent(timeout=timeout))
        stub.UpdateIntent(update)
    except grpc.RpcError as error:
        refused += error.code() is grpc.StatusCode.FAILED_PRECONDITION
    time.sleep(0.1)
result = (tool.returncode, refused > 0)
"""
    assert agent.run(code, timeout=f"{0.5 * SLOW:.1f}") == (-9, True)


def test_a_flood_of_silent_connections(daemon: DaemonProcess) -> None:
    """From an agent, with few descriptors left to the daemon: it stays, and others are served."""
    if shutil.which("prlimit") is None:
        pytest.skip("prlimit is not installed")
    assert daemon.process is not None
    subprocess.run(["prlimit", f"--pid={daemon.process.pid}", "--nofile=200"], check=True)
    agent = daemon.open("alpha")
    agent.run(
        """
socks = []
for _ in range(400):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    try:
        sock.connect(str(RUN_DIR / "agent/attach.sock"))
    except BlockingIOError:
        pass
    socks.append(sock)
time.sleep(1)
for sock in socks:
    sock.close()
"""
    )
    wait_until(
        "it serves again",
        lambda: agent.run("result = subprocess.call([EXEC, '--name', 't', '--', 'true'])") == 0,
    )
    assert daemon.process.poll() is None
    assert len(Path(daemon.log).read_text()) < 100_000


def test_a_held_call_with_a_closed_session(daemon: DaemonProcess) -> None:
    agent = daemon.open("alpha")
    agent.run("call_id = stub.BeginCall(pb.BeginCallRequest(name='x')).id")
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"))
    with pytest.raises((RemoteRpcError, EOFError, BrokenPipeError)):
        agent.run("stub.EndCall(pb.EndCallRequest(call_id=call_id))")
    assert not (daemon.cgroup_dir / "alpha").exists()


def test_who_hung_up_before_its_turn_is_not_moved(daemon: DaemonProcess) -> None:
    """By then the caller may be doing something else, outside of any call."""
    assert daemon.process is not None
    agent = daemon.open("impatient")
    before = agent.run("result = open('/proc/self/cgroup').read()")
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        agent.run(
            """
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect(str(RUN_DIR / "agent/attach.sock"))
    sock.send(b"ACG1\\0begin\\0name=x\\0")
"""
        )
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert agent.run("result = subprocess.call([EXEC, '--', 'true'])") == 0
    assert agent.run("result = open('/proc/self/cgroup').read()") == before
