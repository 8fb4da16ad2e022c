"""A daemon whose own cgroup may have no further process or thread (TasksMax of its unit)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.conftest import StartDaemon
from tests.harness import DaemonProcess

pytestmark = pytest.mark.controllers
RUN = "result = subprocess.call([EXEC, '--', 'sh', '-c', 'exit 3'])"
SDK_RUN = "result = agent.run(['sh', '-c', 'exit 4']).returncode"


@pytest.fixture
def full(start_daemon: StartDaemon) -> Iterator[tuple[DaemonProcess, Path]]:
    """A daemon in a cgroup of its own that has as many threads as it may."""
    daemon = start_daemon('[pool]\nmemory_max = "300M"\n')
    root = Cgroup.open(cgroup2_mount())
    root.enable(("pids",))
    own = root.make_child(f"agentcg-test-daemon-{os.getpid()}")
    assert daemon.process is not None
    own.attach(daemon.process.pid)
    threads = (own.path / "pids.current").read_text()
    (own.path / "pids.max").write_text(threads)
    try:
        yield daemon, own.path
    finally:
        daemon.close()
        own.remove()


def refused(own: Path) -> int:
    """How often a process or thread was refused to the daemon."""
    return int((own / "pids.events").read_text().split()[1])


def test_the_limit_holds(full: tuple[DaemonProcess, Path]) -> None:
    """Whoever is in the daemon's cgroup cannot fork."""
    _, own = full
    done = subprocess.run(["sh", "-c", f"echo $$ >{own}/cgroup.procs; sleep 0; true"], check=False)
    assert done.returncode != 0 and refused(own) > 0


def test_sessions_and_calls_come_and_go(full: tuple[DaemonProcess, Path]) -> None:
    daemon, own = full
    agent = daemon.open("alpha")
    for _ in range(20):
        assert agent.run(RUN) == 3 and agent.run(SDK_RUN) == 4
    # A call whose processes have to be killed, and a session that is closed around one.
    assert agent.run("result = subprocess.call([EXEC, '--timeout', '0.2s', '--', 'sleep', '60'])")
    agent.run("left = subprocess.Popen([EXEC, '--', 'sleep', '600'])")
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"), timeout=30)
    assert not daemon.call_dirs()
    again = daemon.open("beta")
    assert again.run(RUN) == 3
    daemon.admin.GetPool(pb.GetPoolRequest(), timeout=10)
    said = daemon.log.read_text()
    assert "Traceback" not in said
    # Once there is room again nothing is left of it.
    (own / "pids.max").write_text("max")
    assert again.run(RUN) == 3


def test_it_stops_all_the_same(full: tuple[DaemonProcess, Path]) -> None:
    daemon, _ = full
    agent = daemon.open("alpha")
    agent.run("left = subprocess.Popen([EXEC, '--', 'sleep', '600'])")
    daemon.stop()
    assert daemon.process is not None and daemon.process.poll() == 0
    said = daemon.log.read_text()
    assert "Traceback" not in said and "an alarm ends this process" in said
    assert agent.run("result = left.poll()") is None
