"""A daemon that is killed before each single change it makes, from the opening of a session to the
giving back of a container's cgroup: the next daemon finds all of it, and nothing is left over."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agentcgroup import audit
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.harness import PATIENCE, AgentProcess, DaemonProcess, RemoteRpcError, wait_until
from tests.kernel.test_release import RELEASE

pytestmark = pytest.mark.full_speed

STEPS_MOST = 400
STRIDE = 1 if os.environ.get("AGENTCG_EVERY_STEP") else 4
"""Every fourth step is tried unless all are asked for, which takes some minutes."""
RPC_S = 10 * PATIENCE
LOST = (grpc.RpcError, RemoteRpcError, EOFError, OSError, AssertionError)
"""What a caller sees of a daemon that is killed."""

CALL = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="tool"), timeout=limit).id
tool = subprocess.Popen([EXEC, "--call", call_id, "--", "sh", "-c", "sleep 0.1; exit 3"],
                        stderr=subprocess.DEVNULL)
tool.wait()
report = stub.EndCall(pb.EndCallRequest(call_id=call_id), timeout=limit)
second = subprocess.Popen([EXEC, "--name", "short", "--", "true"], stderr=subprocess.DEVNULL)
second.wait()
result = str(report.verdict)
"""


class Killed(DaemonProcess):
    """A daemon that is killed before its n-th change, and a container that it may adopt."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "[boundaries]\nenabled = false\n[bpf]\nenabled = false\n")
        self.module = "tests.killed_daemon"
        self.kill_at = directory / "kill_at"
        self.environment = {"AGENTCG_TEST_KILL_AT": str(self.kill_at)}
        self.box = cgroup2_mount() / f"agentcg-test-box-{os.getpid()}"
        self.box.mkdir()
        self.inmate = subprocess.Popen(["sleep", "100000"])
        (self.box / "cgroup.procs").write_text(str(self.inmate.pid))

    def restart(self) -> None:
        """Start the next daemon, and speak with it over a new connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        (self.run_dir / "admin/attach.sock").unlink(missing_ok=True)
        self.start()

    def live(self) -> None:
        """Do a bit of everything. Raises one of LOST as soon as the daemon is gone."""
        admin = self.admin
        spec = pb.SessionSpec(id="alpha")
        admin.OpenSession(pb.OpenSessionRequest(spec=spec), timeout=RPC_S)
        agent = AgentProcess(self.run_dir, "alpha")
        try:
            agent.run(CALL, limit=RPC_S)
        finally:
            agent.close()
        spec = pb.SessionSpec(id="box")
        path = f"/{self.box.name}"
        admin.AdoptSession(pb.AdoptSessionRequest(cgroup_path=path, spec=spec), timeout=RPC_S)
        for name in ("alpha", "box"):
            admin.CloseSession(pb.CloseSessionRequest(session_id=name), timeout=RPC_S)

    def close(self) -> None:
        """End everything."""
        self.kill_at.unlink(missing_ok=True)
        super().close()
        self.inmate.kill()
        self.inmate.wait()
        box = Cgroup.open(self.box)
        box.kill_and_remove()
        box.close()


@pytest.fixture
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    daemon = Killed(tmp_path_factory.mktemp("d"))
    daemon.start()
    yield daemon
    daemon.close()


def release(daemon: Killed) -> None:
    """What systemd does after every end of the daemon: nothing stays frozen or braked."""
    done = subprocess.run([RELEASE, "--run-dir", str(daemon.run_dir)], capture_output=True)
    assert done.returncode == 0, done.stderr
    for top in (daemon.cgroup_dir, daemon.box):
        for file in top.rglob("cgroup.freeze"):
            with contextlib.suppress(FileNotFoundError, OSError):
                assert file.read_text() == "0\n", file
        for file in top.glob("call-*/memory.high"):
            assert file.read_text() == "max\n", file


def nothing_is_unknown(daemon: Killed) -> bool:
    """Whether each cgroup is a session or a call of the daemon's."""
    sessions = {s.id for s in daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions}
    calls = {c.id for c in daemon.admin.ListCalls(pb.ListCallsRequest()).calls}
    places = [path for path in daemon.cgroup_dir.iterdir() if path.is_dir()]
    found = {f"call-{call}" for call in calls}
    return {p.name for p in places} == sessions - {"box"} and all(
        path.name in found for top in (*places, daemon.box) for path in top.glob("call-*")
    )


def as_it_was(daemon: Killed) -> bool:
    """Whether the container is as it was before it was adopted, and the pool is empty."""
    box = Cgroup.open(daemon.box)
    try:
        mine = [name for name in box.list_xattrs() if "agentcgroup" in name]
        return (
            box.procs() == (daemon.inmate.pid,)
            and list(box.children()) == []
            and mine == []
            and (daemon.box / "cgroup.subtree_control").read_text().strip() == ""
            and not [path for path in daemon.cgroup_dir.iterdir() if path.is_dir()]
        )
    finally:
        box.close()


def clean_up(daemon: Killed) -> None:
    """Close what is open, as an operator would."""
    for session in daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions:
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id=session.id), timeout=RPC_S)


def killed_at(daemon: Killed, step: int) -> bool:
    """Have the daemon live until it is killed before this step, and let go of what it had held
    back; False if it makes fewer steps."""
    daemon.kill_at.write_text(str(step))
    said: list[str] = []

    def live() -> None:
        try:
            daemon.live()
        except LOST as error:
            said.append(repr(error))

    thread = threading.Thread(target=live)
    thread.start()
    assert daemon.process is not None
    while thread.is_alive() and daemon.process.poll() is None:
        time.sleep(0.002)
    if not thread.is_alive() and not said:
        return False
    assert daemon.process.wait(RPC_S) == -9, (
        f"step {step}: {said}\n{daemon.log.read_text()[-3000:]}"
    )
    daemon.kill_at.unlink()
    release(daemon)
    thread.join()
    return True


@pytest.mark.timeout(600)
def test_a_daemon_killed_before_any_step_leaves_nothing_behind(killed: Killed) -> None:
    for step in range(1, STEPS_MOST, STRIDE):
        if not killed_at(killed, step):
            break
        killed.restart()
        wait_until(f"step {step}: all is known", lambda: nothing_is_unknown(killed))
        clean_up(killed)
        wait_until(f"step {step}: all is as it was", lambda: as_it_was(killed))
    else:
        pytest.fail("it makes more changes than it should")
    print(f"killed before steps 1 to {step - STRIDE}, in steps of {STRIDE}", file=sys.stderr)
    assert step > 30
    found = audit.verify(audit.files_of(killed.audit_path))
    assert found.good, found.problems
