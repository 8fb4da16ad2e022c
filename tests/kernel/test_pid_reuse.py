"""A caller that ends while it waits: a later process of its pid is not taken for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.gpu_fakes import write_state
from tests.harness import IN_GUEST, DaemonProcess, wait_until

pytestmark = pytest.mark.skipif(
    not IN_GUEST, reason="pids are given out again that other programs of this machine may mean"
)
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
CONFIG = """[gpu]
share = "turns"
gate = false
sample = "50ms"
period = "100ms"
watch_launches = "off"
"""
WAIT_AND_END = """
holder = stub.BeginCall(pb.BeginCallRequest(name="holder", intent=pb.Intent(gpu="100%"))).id
read, write = os.pipe()
caller = os.fork()
if not caller:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(str(RUN_DIR / "agent/attach.sock"))
    if not os.fork():
        # Holds the connection open: that its caller is gone does not show there.
        while data := sock.recv(16384):
            os.write(write, data)
        os._exit(0)
    sock.send(b"ACG1\\0begin\\0name=late\\0gpu=100%\\0wait=10m\\0")
    time.sleep(0.5)
    os._exit(0)
os.waitpid(caller, 0)
result = caller, holder
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon with a GPU that is not there, for which calls queue."""
    state = tmp_path / "gpus.json"
    write_state(state, devices=1, memory_gib=81)
    running = DaemonProcess(tmp_path, CONFIG)
    running.module, running.environment = "tests.gpu_daemon", {"AGENTCG_TEST_GPUS": str(state)}
    running.start()
    try:
        yield running
    finally:
        running.close()


def process_with_pid(pid: int) -> bool:
    """Whether a process that sleeps could be made with this pid, which is free."""
    for _ in range(200):
        try:
            LAST_PID.write_text(str(pid - 1))
        except OSError:
            return False
        made = os.fork()
        if not made:
            if os.getpid() == pid:
                time.sleep(100)
            os._exit(0)
        if made == pid:
            return True
        os.waitpid(made, 0)
    return False


def cgroup_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line for line in lines if line.startswith("0::"))


def test_a_later_process_of_its_pid_stays_where_it_is(daemon: DaemonProcess) -> None:
    agent = daemon.open("hostile")
    caller, holder = agent.run(WAIT_AND_END)
    wait_until("it is known to have ended", lambda: not Path(f"/proc/{caller}").exists())
    if not process_with_pid(caller):
        pytest.skip("the pid cannot be had again here")
    try:
        before = cgroup_of(caller)
        agent.run("stub.EndCall(pb.EndCallRequest(call_id=holder))", holder=holder)
        # Who asks next is let in: nothing of the caller that ended is in the queue.
        intent = "pb.Intent(gpu='100%')"
        code = f"result = stub.BeginCall(pb.BeginCallRequest(name='next', intent={intent})).id"
        assert agent.run(code)
        assert cgroup_of(caller) == before
        names = [c.name for c in daemon.admin.ListCalls(pb.ListCallsRequest()).calls]
        assert names == ["next"]
    finally:
        os.kill(caller, signal.SIGKILL)
        os.waitpid(caller, 0)
