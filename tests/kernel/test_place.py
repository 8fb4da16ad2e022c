"""Pools and run directories: whose they may be, and daemons whose place is gone."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.state.records import RECORD_VERSION
from tests.conftest import StartDaemon
from tests.harness import SLOW, DaemonProcess, wait_until

pytestmark = pytest.mark.full_speed


def try_to_start(config: Path) -> tuple[int, str]:
    """Start a daemon that is expected to refuse: its exit status and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "agentcgroupd", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60 * SLOW,
        check=False,
    )
    return done.returncode, done.stderr


def test_without_a_cgroup2_mount_one_sentence(daemon: DaemonProcess) -> None:
    """In a mount namespace from which it is gone."""
    hide = 'umount -a -l -t cgroup2 && exec "$@"'
    argv = [sys.executable, "-m", "agentcgroupd", "--config", str(daemon.config)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide, "sh", *argv],
        capture_output=True,
        text=True,
        timeout=60 * SLOW,
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("no cgroup2 file system is mounted; see `agentcg doctor`\n")


def another_config(daemon: DaemonProcess, run_dir: Path) -> Path:
    """The configuration of a daemon with another run directory."""
    path = daemon.directory / "other.toml"
    path.write_text(daemon.config.read_text().replace(str(daemon.run_dir), str(run_dir)))
    return path


def contents(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


@pytest.fixture
def running(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with an open session."""
    daemon = start_daemon("")
    daemon.open("alpha")
    return daemon


def test_two_daemons_do_not_share_a_pool(running: DaemonProcess, tmp_path: Path) -> None:
    assert running.process is not None
    pid = running.process.pid
    marks = running.cgroup_dir / "alpha"
    other = tmp_path / "far/away"
    status, said = try_to_start(another_config(running, other))
    assert status == 78
    assert said.count("\n") == 1 and f"another daemon is running on it, with pid {pid};" in said
    assert marks.exists() and not other.parent.exists()
    assert Cgroup.open(running.cgroup_dir).get_xattr() is not None
    assert f'"run_dir": "{running.run_dir}"'.encode() in (
        Cgroup.open(running.cgroup_dir).get_xattr() or b""
    )
    listed = running.admin.ListSessions(pb.ListSessionsRequest()).sessions
    assert [session.id for session in listed] == ["alpha"]


def test_a_lock_by_a_mere_reader_keeps_no_daemon_from_starting(
    running: DaemonProcess,
) -> None:
    """What any process may open and lock is not what the daemons go by."""
    running.stop()
    script = f"""
import fcntl, os, sys
os.setuid(65534)
locked = []
for name in [".", *os.listdir({str(running.cgroup_dir)!r})]:
    try:
        fd = os.open(os.path.join({str(running.cgroup_dir)!r}, name), os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked.append(fd)
    except OSError:
        pass
print(len(locked), flush=True)
sys.stdin.read()
"""
    nobody = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nobody.stdin is not None and nobody.stdout is not None
    try:
        assert int(nobody.stdout.readline()) > 3
        running.start()
    finally:
        nobody.communicate()


def test_a_refused_start_leaves_nothing(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    (daemon.run_dir / "admin/attach.sock").mkdir(parents=True)
    before = contents(daemon.run_dir)
    status, said = try_to_start(daemon.config)
    assert (status, daemon.cgroup_dir.exists()) == (78, False)
    (line,) = said.splitlines()[-1:]
    assert "admin/attach.sock is a directory, where a socket belongs; remove it" in line
    assert "Traceback" not in said and "never awaited" not in said
    assert contents(daemon.run_dir) == before


@pytest.mark.parametrize("name", ["agent/grpc.sock", "private/agent.sock"])
def test_what_is_no_socket_is_left_alone_and_named(tmp_path: Path, name: str) -> None:
    daemon = DaemonProcess(tmp_path)
    path = daemon.run_dir / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    status, said = try_to_start(daemon.config)
    assert status == 78
    assert f"{path} is a file that is no socket, where a socket belongs" in said
    assert "Traceback" not in said and "never awaited" not in said
    assert path.read_text() == "precious"
    assert not daemon.cgroup_dir.exists()


def test_a_directory_that_others_could_change_is_refused(tmp_path: Path) -> None:
    """What else is refused is in tests/unit/host/test_run_dir.py."""
    daemon = DaemonProcess(tmp_path)
    run = tmp_path / "other"
    run.mkdir()
    run.chmod(0o777)
    status, said = try_to_start(another_config(daemon, run))
    assert status == 78
    assert f"server.run_dir: '{run}' cannot be used: {run} has mode 0777" in said
    assert said.count("\n") == 1
    assert not daemon.cgroup_dir.exists()


def test_a_pool_that_was_removed_ends_the_daemon_once(running: DaemonProcess) -> None:
    assert running.process is not None
    for agent in running.agents:  # before the daemon is stopped, which they ask as they end
        agent.close()
    running.process.send_signal(signal.SIGSTOP)
    pool = Cgroup.open(running.cgroup_dir)
    pool.kill_and_remove(20)
    running.process.send_signal(signal.SIGCONT)
    spec = pb.SessionSpec(id="beta")
    with pytest.raises(grpc.RpcError) as refused:
        running.admin.OpenSession(pb.OpenSessionRequest(spec=spec), timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert running.process.wait(20 * SLOW) == 1
    said = running.log.read_text()
    assert said.count("was removed, and with it all sessions") == 1
    assert said.count("ERROR") <= 2, said
    running.start()
    running.open("beta")


def test_records_of_another_version_are_not_lost(running: DaemonProcess) -> None:
    """A newer daemon has been here: this one touches nothing, and says what to do."""
    running.stop()
    pool = Cgroup.open(running.cgroup_dir)
    raw = pool.get_xattr()
    assert raw is not None
    version, newer = f'"v": {RECORD_VERSION}'.encode(), f'"v": {RECORD_VERSION + 1}'.encode()
    pool.set_xattr(raw.replace(version, newer))
    before = pool.get_xattr()
    status, said = try_to_start(running.config)
    assert status == 78
    assert f"has records of version {RECORD_VERSION + 1}" in said and said.count("\n") == 1
    assert pool.get_xattr() == before and (running.cgroup_dir / "alpha/agent").exists()
    pool.set_xattr(raw)
    running.start()


def test_a_session_of_another_version_is_left_alone(running: DaemonProcess) -> None:
    running.stop()
    spare = running.cgroup_dir / "spare"
    spare.mkdir()
    cgroup = Cgroup.open(spare)
    record = f'{{"v":{RECORD_VERSION + 1},"kind":"session","id":"spare"}}'.encode()
    cgroup.set_xattr(record)
    call = Cgroup.open(running.cgroup_dir / "alpha").make_child("call-0123456789ab")
    call.set_xattr(record.replace(b"session", b"call"))
    running.start()
    wait_until("it is told", lambda: "left alone" in running.log.read_text())
    time.sleep(0.1)
    assert cgroup.get_xattr() == record
    assert call.exists()
    assert running.admin.GetPool(pb.GetPoolRequest()).leftovers_removed == 0


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages, all of them used."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=64,mode=755", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    try:
        with contextlib.suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_below_the_run_directory(tmp_path: Path, full_disk: Path) -> None:
    """A start is refused in words and leaves nothing; a running daemon does not need the room."""
    daemon = DaemonProcess(tmp_path)
    daemon.config = another_config(daemon, full_disk / "run")
    daemon.run_dir = full_disk / "run"
    status, said = try_to_start(daemon.config)
    assert status in (1, 78)
    assert "No space left on device" in said and said.count("\n") == 1
    assert not daemon.cgroup_dir.exists() and contents(full_disk) == [full_disk / "full"]
    (full_disk / "full").unlink()
    try:
        daemon.start()
        with contextlib.suppress(OSError), (full_disk / "full").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        assert (
            daemon.open("alpha").run("result = agent.run(['sh', '-c', 'exit 4']).returncode") == 4
        )
        daemon.stop()
        assert daemon.process is not None and daemon.process.wait() == 0
    finally:
        daemon.close()
