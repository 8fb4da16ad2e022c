"""What calls receive and send, on the loopback device: of each call, of its session, and of nobody
else."""

from __future__ import annotations

import sys

import pytest

from agentcgroup import Admin
from agentcgroup.types import NetUsage
from agentcgroupd.bpf import net
from agentcgroupd.bpf.net import NetPrograms
from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess

pytestmark = pytest.mark.programs

SENT = 1 << 20
TALKS = f"""
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
def answer():
    peer, _ = server.accept()
    with peer:
        left = {SENT}
        while left:
            left -= len(peer.recv(65536))
        peer.sendall(b"done")
thread = threading.Thread(target=answer)
thread.start()
with socket.create_connection(server.getsockname()) as client:
    client.sendall(bytes({SENT}))
    assert client.recv(4) == b"done"
thread.join()
"""
RUN = "result = agent.run(argv, check=True).call_id"


@pytest.fixture(scope="module")
def programs() -> None:
    """The programs are taken by this kernel."""
    loaded, (state,) = net.load()
    if loaded is None:
        pytest.skip(f"not on this kernel: {state.reason}")
    loaded.close()


@pytest.fixture
def counting(start_daemon: StartDaemon, programs: None) -> DaemonProcess:
    """A daemon that counts."""
    return start_daemon("")


def ran(daemon: DaemonProcess, agent: AgentProcess, *argv: str) -> NetUsage | None:
    """Run a command in a call; what its report says."""
    call_id: str = agent.run(RUN, argv=list(argv))
    with Admin(str(daemon.run_dir)) as admin:
        return admin.report(call_id).net


def of_session(daemon: DaemonProcess, name: str) -> NetUsage:
    with Admin(str(daemon.run_dir)) as admin:
        (session,) = [each for each in admin.sessions() if each.id == name]
    assert session.usage is not None and session.usage.net is not None
    return session.usage.net


def test_a_call_is_told_what_its_sockets_did(counting: DaemonProcess) -> None:
    agent, other = counting.open("alpha"), counting.open("beta")
    found = ran(counting, agent, sys.executable, "-c", TALKS)
    assert found is not None
    # Both ends are in the call: what one sends, the other receives, headers included.
    assert SENT < found.send_bytes < 1.2 * SENT
    # Some packets of handshakes are sent by the kernel for no socket yet, or none any more.
    assert abs(found.send_bytes - found.receive_bytes) < SENT / 100
    assert found.receive_packets > 10 and found.send_packets > 10
    assert of_session(counting, "alpha").send_bytes == found.send_bytes
    assert of_session(counting, "beta").send_bytes == 0
    silent = ran(counting, other, "true")
    assert silent == NetUsage(0, 0, 0, 0)


def test_calls_inside_a_call_are_a_part_of_it(counting: DaemonProcess) -> None:
    agent = counting.open("alpha")
    run = f"agentcgroup.Agent().run([sys.executable, '-c', {TALKS!r}], check=True)"
    code = f"import sys, agentcgroup; {run}"
    outer = ran(counting, agent, sys.executable, "-c", code)
    assert outer is not None and outer.send_bytes > SENT
    with Admin(str(counting.run_dir)) as admin:
        (inner,) = [each for each in admin.reports() if each.parent_call_id]
    assert inner.net is not None and SENT < inner.net.send_bytes <= outer.send_bytes


def test_a_call_that_was_found_again_is_told_nothing(counting: DaemonProcess) -> None:
    """What was sent before the restart is not known any more, so the rest would be too little."""
    agent = counting.open("alpha")
    begin = "call = agent.tool_call('t'); call.begin(); call.run(['true']); result = call.id"
    call_id = agent.run(begin)
    counting.stop()
    counting.start()
    with Admin(str(counting.run_dir)) as admin:
        assert admin.end_call(call_id).net is None
    assert of_session(counting, "alpha").send_bytes == 0


def test_without_the_programs_nothing_is_claimed(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("[bpf]\nenabled = false\n")
    agent = daemon.open("alpha")
    assert ran(daemon, agent, sys.executable, "-c", TALKS) is None


def test_entries_go_with_what_they_are_for(programs: None) -> None:
    loaded, _ = net.load()
    assert isinstance(loaded, NetPrograms)
    loaded.follow(7)  # type: ignore[arg-type]
    assert loaded.of(7) is not None  # type: ignore[arg-type]
    loaded.forget(7)  # type: ignore[arg-type]
    assert loaded.of(7) is None  # type: ignore[arg-type]
    loaded.close()
