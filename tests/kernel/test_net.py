"""What calls receive and send, on the loopback device: of each call, of its session, and of nobody
else."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from agentcgroup import Admin
from agentcgroup.types import NetUsage, Report
from agentcgroupd.bpf import net
from agentcgroupd.bpf.net import NetPrograms
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
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
        assert "the daemon has" not in state.reason, "programs and daemon are of different builds"
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


FAR = """
import socket, sys
sys.stdout.write("up\\n")
sys.stdout.flush()
sys.stdin.readline()
with socket.create_server(("10.213.7.2", 9)) as server:
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    while True:
        peer, _ = server.accept()
        with peer:
            while peer.recv(65536):
                pass
"""
NEAR = f"""
import socket
with socket.create_connection(("10.213.7.2", 9)) as client:
    client.sendall(bytes({SENT}))
    client.shutdown(socket.SHUT_WR)
    client.recv(1)  # all has arrived: what is still in a buffer at the end is held by nobody
"""


def ip(*words: str) -> None:
    """Set up a network device (iproute2)."""
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def far_host() -> Iterator[None]:
    """A server behind a pair of veth devices, in a network namespace of its own."""
    if shutil.which("ip") is None:
        pytest.skip("no ip here (Debian: iproute2)")
    argv = ["unshare", "--net", sys.executable, "-c", FAR]
    with subprocess.Popen(argv, stdin=PIPE, stdout=PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == "up\n"
        near, far, pid = f"acg{server.pid}a", f"acg{server.pid}b", str(server.pid)
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", pid)
        try:
            ip("address", "add", "10.213.7.1/30", "dev", near)
            ip("link", "set", near, "up")
            inside = ["nsenter", "--net", "--target", pid, "ip"]
            subprocess.run([*inside, "address", "add", "10.213.7.2/30", "dev", far], check=True)
            subprocess.run([*inside, "link", "set", far, "up"], check=True)
            server.stdin.write("\n")
            server.stdin.flush()
            assert server.stdout.readline() == "ready\n"
            yield
        finally:
            ip("link", "delete", near)
            server.kill()


def test_what_leaves_by_a_veth_pair_counts_once(counting: DaemonProcess, far_host: None) -> None:
    """The other end is in no session, as a container's peer on a bridge is not."""
    agent = counting.open("alpha")
    found = ran(counting, agent, sys.executable, "-c", NEAR)
    assert found is not None
    assert SENT < found.send_bytes < 1.2 * SENT
    assert 0 < found.receive_bytes < SENT / 10, "acknowledgements alone"
    held = talked(counting, agent, NEAR, net_send_max="256K")
    assert held.net is not None and held.net.refused_packets > 0
    assert held.wall_usec > 1e6, "1 MiB, of which 256 KiB go at once"


RATE = 1 << 20
BURST_S = 0.6
"""What may be sent at once is as much as the rate gives in this time (net.bpf.c)."""


def talked(daemon: DaemonProcess, agent: AgentProcess, script: str, **intent: str) -> Report:
    """Run a Python script in a call; returns its report."""
    run = "result = agent.run(argv, check=True, **intent).call_id"
    call_id: str = agent.run(run, argv=[sys.executable, "-c", script], intent=intent)
    with Admin(str(daemon.run_dir)) as admin:
        return admin.report(call_id)


def test_a_call_sends_no_faster_than_it_may(counting: DaemonProcess) -> None:
    agent, sent = counting.open("alpha"), 4 * RATE
    script = TALKS.replace(str(SENT), str(sent))
    free = talked(counting, agent, script)
    held = talked(counting, agent, script, net_send_max="1M")
    took_s = (held.wall_usec - free.wall_usec) / 1e6
    assert held.grant is not None and held.grant.net_send_bytes_per_s == RATE
    assert held.net is not None and free.net is not None
    print(f"4 MiB at 1 MiB/s took {took_s:.2f} s longer, {held.net.refused_packets} were refused")
    # What both ends send counts: acknowledgements too.
    least_s = sent / RATE - BURST_S
    assert 0.9 * least_s - free.wall_usec / 1e6 < took_s < 3 * sent / RATE
    # TCP may wait longer than it has to, and sends some twice that it takes for lost, which varies;
    # what was refused is not counted.
    assert sent < held.net.send_bytes < 2 * sent
    assert held.net.refused_packets > 0 and free.net.refused_packets == 0


FLOOD = """
import socket
there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
there.bind(("127.0.0.1", 0))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
    for _ in range(2000):
        here.sendto(bytes(8192), there.getsockname())
"""


def test_what_is_not_sent_again_is_lost_above_the_rate(counting: DaemonProcess) -> None:
    agent = counting.open("alpha")
    report = talked(counting, agent, FLOOD, net_send_max="1M")
    assert report.net is not None
    most = RATE * (BURST_S + report.wall_usec / 1e6)
    assert report.net.send_bytes < 1.1 * most
    assert report.net.send_packets + report.net.refused_packets >= 2000
    assert report.net.refused_packets > 1000


@pytest.fixture
def box() -> Iterator[Cgroup]:
    """A cgroup outside of the pool, as a runtime makes one for a container."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    yield made
    made.kill_and_remove()
    root.close()


def links(daemon: DaemonProcess) -> list[int]:
    """The cgroups that programs of the daemon are attached to, one for each link."""
    assert daemon.process is not None
    found = []
    for path in Path(f"/proc/{daemon.process.pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            lines = path.read_text().split("\n")
            fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if fields.get("link_type") == "cgroup":
                found.append(int(fields["cgroup_id"]))
    return found


def test_a_container_is_counted_and_held_too(counting: DaemonProcess, box: Cgroup) -> None:
    """The cgroup of a container lies outside of the pool, where its runtime wants it."""
    pools = links(counting)
    with Admin(str(counting.run_dir)) as admin:
        admin.adopt_session("box", f"/{box.path.name}")
        agent = counting.enter("box")
        found = ran(counting, agent, sys.executable, "-c", TALKS)
        assert found is not None and SENT < found.send_bytes < 1.2 * SENT
        assert of_session(counting, "box").send_bytes >= found.send_bytes
        held = talked(counting, agent, FLOOD, net_send_max="1M")
        assert held.net is not None and held.net.refused_packets > 1000
        assert sorted(links(counting)) == sorted([*pools, box.id, box.id])
        counting.stop()
        counting.start()
        again = ran(counting, agent, sys.executable, "-c", TALKS)
        assert again is not None and SENT < again.send_bytes < 1.2 * SENT
        admin.close_session("box")
    assert set(links(counting)).isdisjoint({box.id})


def test_the_rate_of_the_outer_call_holds_for_one_inside(counting: DaemonProcess) -> None:
    agent = counting.open("alpha")
    inner = f"agentcgroup.Agent().run([sys.executable, '-c', {FLOOD!r}], net_send_max='8M')"
    outer = talked(counting, agent, f"import sys, agentcgroup; {inner}", net_send_max="1M")
    assert outer.net is not None and outer.net.refused_packets > 1000
    assert outer.net.send_bytes < 1.1 * RATE * (BURST_S + outer.wall_usec / 1e6)
    with Admin(str(counting.run_dir)) as admin:
        (report,) = [each for each in admin.reports() if each.parent_call_id]
    assert report.grant is not None and report.grant.net_send_bytes_per_s == 8 * RATE


def test_an_open_call_can_be_given_another_rate(counting: DaemonProcess) -> None:
    agent = counting.open("alpha")
    code = (
        "with agent.tool_call('t') as call:\n"
        "    call.update(net_send_max='1M')\n"
        "    call.run(argv, check=True)\n"
        "result = call.report.net.refused_packets, call.report.net.send_packets"
    )
    refused, sent = agent.run(code, argv=[sys.executable, "-c", FLOOD])
    assert refused > 1000 and refused + sent >= 2000


@pytest.mark.waits
def test_a_call_that_was_found_again_is_held_to_its_rate(counting: DaemonProcess) -> None:
    agent = counting.open("alpha")
    begin = "call = agent.tool_call('t', net_send_max='64K'); call.begin(); call.run(['true'])"
    begin += "; result = call.id"
    call_id = agent.run(begin)
    counting.stop()
    counting.start()
    code = "import time\nt = time.monotonic()\ncall.run(argv)\nresult = time.monotonic() - t"
    script = TALKS.replace(str(SENT), str(512 << 10))
    took_s = agent.run(code, argv=[sys.executable, "-c", script])
    assert took_s > 3, "256 KiB can be sent at once by a new account, four times the rate"
    with Admin(str(counting.run_dir)) as admin:
        assert admin.end_call(call_id).net is None


@pytest.mark.waits
def test_a_call_that_was_found_again_can_be_given_a_rate(counting: DaemonProcess) -> None:
    agent = counting.open("alpha")
    agent.run("call = agent.tool_call('t'); call.begin(); call.run(['true'])")
    counting.stop()
    counting.start()
    code = (
        "import time\ncall.update(net_send_max='64K')\nt = time.monotonic()\n"
        "call.run(argv)\nresult = time.monotonic() - t"
    )
    script = TALKS.replace(str(SENT), str(512 << 10))
    assert agent.run(code, argv=[sys.executable, "-c", script]) > 3


def test_a_higher_rate_counts_at_once(programs: None) -> None:
    """What was sent too early is so many bytes, not so many seconds."""
    loaded, _ = net.load()
    assert isinstance(loaded, NetPrograms)
    loaded.follow(7, 64 << 10)  # type: ignore[arg-type]
    entry = loaded.of(7)  # type: ignore[arg-type]
    assert entry is not None
    entry.paid_until_ns = time.monotonic_ns() + 4_000_000_000
    loaded._traffic[7] = entry
    loaded.limit(7, 640 << 10)  # type: ignore[arg-type]
    entry = loaded.of(7)  # type: ignore[arg-type]
    assert entry is not None and entry.send_bytes_per_s == 640 << 10
    assert 0.3e9 < entry.paid_until_ns - time.monotonic_ns() < 0.41e9
    loaded.close()


def test_where_nothing_holds_it_the_grant_says_so(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("[bpf]\nenabled = false\n")
    report = talked(daemon, daemon.open("alpha"), "pass", net_send_max="1M")
    assert report.grant is not None and "net_send_max" in report.grant.not_enforced


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
