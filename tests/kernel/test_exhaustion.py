"""What the daemon needs of the kernel is used up: it lives, says so, and goes on afterwards."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests import http2
from tests.conftest import StartDaemon
from tests.harness import PATIENCE, AgentProcess, DaemonProcess, RemoteRpcError, wait_until

pytestmark = pytest.mark.full_speed

WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")
RUN = "result = subprocess.run([EXEC, '--name', 't', '--', 'sh', '-c', 'exit 3']).returncode"


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Iterator[DaemonProcess]:
    """A daemon that must have no surprise in its log."""
    running = start_daemon("")
    yield running
    running.close()
    assert "Traceback" not in running.log.read_text()


@pytest.fixture
def no_watches() -> Iterator[None]:
    """No inotify watch can be had."""
    before = WATCHES.read_text()
    WATCHES.write_text("0")
    try:
        yield
    finally:
        WATCHES.write_text(before)


def limit_files(daemon: DaemonProcess, most: int) -> None:
    """Leave the daemon this many descriptors altogether."""
    assert daemon.process is not None
    _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (most, hard))


def files_of(daemon: DaemonProcess) -> int:
    """How many descriptors the daemon has."""
    assert daemon.process is not None
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def served(agent: AgentProcess) -> bool:
    """Whether a tool runs in a call."""
    return bool(agent.run(RUN) == 3)


def test_descriptors(daemon: DaemonProcess) -> None:
    agent = daemon.open("alpha")
    assert served(agent)
    limit_files(daemon, files_of(daemon) + 4)
    agent.run(
        """
socks = []
for number in range(60):
    name, kind = [("attach", socket.SOCK_SEQPACKET), ("grpc", socket.SOCK_STREAM)][number % 2]
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.setblocking(False)
    try:
        sock.connect(str(RUN_DIR / f"agent/{name}.sock"))
    except BlockingIOError:
        pass
    socks.append(sock)
"""
    )
    # An SDK that finds the daemon like this runs nothing without limits.
    answer = agent.run(
        """
import warnings
warnings.simplefilter("error")
try:
    agent.run(["true"])
    result = "it ran"
except agentcgroup.AgentcgError as error:
    result = type(error).__name__
except agentcgroup.AgentcgWarning as warning:
    result = str(warning)  # that its report is lost
"""
    )
    assert "runs without resource control" not in answer, answer
    wait_until("it is said", lambda: "no connection can be accepted" in daemon.log.read_text(), 20)
    time.sleep(12 / PATIENCE)  # past a sweep or not, it must be there
    assert daemon.process is not None and daemon.process.poll() is None
    limit_files(daemon, 4096)
    agent.run("[sock.close() for sock in socks]")
    wait_until("it serves again", lambda: served(agent), 60)
    assert len(daemon.log.read_text()) < 50_000


def test_no_descriptor_at_all(daemon: DaemonProcess) -> None:
    """What the daemon does all the time needs none."""
    agent = daemon.open("alpha")
    assert served(agent)
    limit_files(daemon, files_of(daemon) - 1)
    time.sleep(3)
    assert daemon.process is not None and daemon.process.poll() is None
    limit_files(daemon, 4096)
    wait_until("it serves again", lambda: served(agent), 60)


def test_inotify_watches(daemon: DaemonProcess, no_watches: None) -> None:
    """Calls get their limits and their end is noticed; watches are taken up when there are some."""
    agent = daemon.open("alpha")
    for _ in range(3):
        assert served(agent)
    wait_until("they have ended", lambda: not daemon.call_dirs(), 5)
    report = daemon.admin.GetReport(pb.GetReportRequest())
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 3)
    assert daemon.log.read_text().count("no inotify watch is left") <= 3
    agent.run("tool = subprocess.Popen([EXEC, '--name', 'long', '--', 'sleep', '1000'])")
    wait_until("it runs", lambda: bool(daemon.call_dirs()), 5)
    WATCHES.write_text("100000")
    told = "watched by inotify again"
    wait_until("it is watched again", lambda: told in daemon.log.read_text(), 10)
    agent.run("tool.kill(); tool.wait()")
    wait_until("its end is noticed", lambda: not daemon.call_dirs(), 5)


def test_inotify_instances(start_daemon: StartDaemon) -> None:
    """A daemon starts although root has no inotify descriptor left."""
    instances = Path("/proc/sys/fs/inotify/max_user_instances")
    before = instances.read_text()
    instances.write_text("0")
    try:
        daemon = start_daemon("")
        agent = daemon.open("alpha")
        assert served(agent)
        wait_until("it has ended", lambda: not daemon.call_dirs(), 5)
    finally:
        instances.write_text(before)
    agent.run("tool = subprocess.Popen([EXEC, '--name', 'long', '--', 'sleep', '1000'])")
    told = "watched by inotify again"
    wait_until("it is watched again", lambda: told in daemon.log.read_text(), 10)
    agent.run("tool.kill(); tool.wait()")
    wait_until("its end is noticed", lambda: not daemon.call_dirs(), 5)


def test_a_peer_writes_nothing_to_the_daemons_output(tmp_path: Path) -> None:
    """The text of a GOAWAY is a peer's own: it neither forges a line of the log nor reaches a
    terminal."""
    directory = tmp_path / "d"
    directory.mkdir()
    daemon = DaemonProcess(directory)
    log = (directory / "log").open("wb")
    # As installed: grpc reads its variables when it is loaded, and a fork has loaded it already.
    process = subprocess.Popen(
        [sys.executable, "-m", "agentcgroupd", "--config", str(daemon.config)],
        stdout=log,
        stderr=log,
    )
    try:
        path = daemon.run_dir / "admin/grpc.sock"
        wait_until("it is ready", (daemon.run_dir / "admin/attach.sock").exists, 20)
        forged = b"x\n2026-01-01 00:00:00,000 INFO ready: \x1b[31mforged"
        for _ in range(3):
            sock = http2.connect(path)
            time.sleep(0.2)
            sock.sendall(http2.frame(http2.GOAWAY, 0, 0, b"\0\0\0\0\0\0\0\x0b" + forged))
            time.sleep(0.3)
            sock.close()
    finally:
        process.terminate()
        process.wait(20)
        log.close()
        daemon.close()
    written = (directory / "log").read_bytes()
    assert b"ready: pool" in written
    assert b"\x1b" not in written and b"forged" not in written


def test_cgroups_of_a_session_are_counted_and_may_not_lie_too_deep(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon("[sessions]\ncgroups_max = 40\ncalls_max = 4\ncgroup_depth_max = 5\n")
    agent = daemon.open("alpha")
    inner = daemon.cgroup_dir / "alpha/agent"
    with pytest.raises(BlockingIOError):
        for _ in range(10):
            inner = inner / "x"
            inner.mkdir()
    assert len(inner.relative_to(daemon.cgroup_dir / "alpha").parts) == 6
    with pytest.raises(BlockingIOError):
        for number in range(200):
            (daemon.cgroup_dir / f"alpha/agent/n{number}").mkdir()
    with pytest.raises(RemoteRpcError) as caught:
        agent.run("stub.BeginCall(pb.BeginCallRequest(name='x'))")
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert "cgroup.max.descendants" in caught.value.details


def test_the_metrics_port_serves_few_at_a_time(start_daemon: StartDaemon) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    daemon = start_daemon("")
    daemon.stop()
    text = daemon.config.read_text().replace("''", f"'127.0.0.1:{port}'", 1)
    daemon.config.write_text(text)
    daemon.start()
    assert daemon.process is not None
    before = len(os.listdir(f"/proc/{daemon.process.pid}/task"))
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for sock in idle[:50]:
        sock.send(b"GET /met")
    try:
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"agentcg_refused" in answer.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
            assert answer.read() == b"ok\n"
        assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) <= before + 2
        wait_until("idle ones are let go", lambda: files_of(daemon) < 150, 10)
    finally:
        for sock in idle:
            sock.close()


def test_threads_are_there_before_they_are_needed(daemon: DaemonProcess) -> None:
    """Where no further thread can be started, a session can be closed all the same."""
    assert daemon.process is not None
    agent = daemon.open("alpha")
    before = set(os.listdir(f"/proc/{daemon.process.pid}/task"))
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"))
    names = [
        Path(f"/proc/{daemon.process.pid}/task/{task}/comm").read_text().strip()
        for task in set(os.listdir(f"/proc/{daemon.process.pid}/task")) - before
    ]
    assert "blocking" not in " ".join(names)
    del agent


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_a_daemon_in_a_cgroup_namespace_of_its_own(tmp_path: Path) -> None:
    """With the host's mount, as in podman: it enters the host's namespace and works; where it may
    not, it says why it does not start."""
    directory = tmp_path / "d"
    directory.mkdir()
    daemon = DaemonProcess(directory)
    own = daemon.cgroup_dir.parent / f"{daemon.pool_path.strip('/')}-elsewhere"
    own.mkdir()
    log = (directory / "log").open("wb")
    script = (
        f"echo $$ > {own}/cgroup.procs; "
        f"exec unshare -C {sys.executable} -m agentcgroupd --config {daemon.config}"
    )
    process = subprocess.Popen(["sh", "-c", script], stdout=log, stderr=log)
    try:
        if not may_enter_host_namespace():
            assert process.wait(20 * PATIENCE) == 78
            assert "above this process's cgroup namespace" in (directory / "log").read_text()
            return
        wait_until("it is ready", (daemon.run_dir / "admin/attach.sock").exists, 20)
        agent = daemon.open("alpha")
        assert served(agent)
        shown = agent.run(
            "result = subprocess.check_output([EXEC, '--', 'cat', '/proc/self/cgroup'])"
        )
        assert re.search(rf"^0::{daemon.pool_path}/alpha/call-".encode(), shown, re.M)
    finally:
        process.terminate()
        process.wait(20)
        log.close()
        daemon.close()
        own.rmdir()
    assert "entered the host's cgroup namespace" in (directory / "log").read_text()


def may_enter_host_namespace() -> bool:
    """Whether this process may look at the namespaces of process 1."""
    try:
        os.readlink("/proc/1/ns/cgroup")
    except PermissionError:
        return False
    return True
