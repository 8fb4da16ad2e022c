"""agentcg-release: what a daemon that is gone had held back is let go of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.conftest import StartDaemon
from tests.harness import SLOW, DaemonProcess, wait_until
from tests.kernel.test_place import try_to_start

RELEASE = Path(sys.executable).parent / "agentcg-release"


def release(run_dir: Path) -> tuple[int, str]:
    """Run the program: its exit status and what it said."""
    done = subprocess.run(
        [RELEASE, "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=30 * SLOW,
        env={},
        check=False,
    )
    return done.returncode, done.stderr


def frozen(directory: Path) -> bool:
    return (directory / "cgroup.freeze").read_text() == "1\n"


def set_frozen(directory: Path, value: bool = True) -> None:
    (directory / "cgroup.freeze").write_text("1" if value else "0")


def held_call(daemon: DaemonProcess, session: str, **intent: str) -> Path:
    """A call with a sleeping tool in it, in a new session; returns its cgroup."""
    agent = daemon.open(session)
    call_id = agent.run(
        """
request = pb.BeginCallRequest(name="tool", intent=pb.Intent(**intent))
result = stub.BeginCall(request).id
tool = subprocess.Popen([EXEC, "--call", result, "--", "sleep", "100000"])
""",
        intent=intent,
    )
    directory = daemon.cgroup_dir / session / f"call-{call_id}"
    wait_until("the tool is in", lambda: bool((directory / "cgroup.procs").read_text()))
    return directory


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon whose guard sets no mark on the pool, which would be one more brake to lift."""
    return start_daemon("[guard]\nenabled = false\n")


@pytest.fixture
def adoptable() -> Iterator[Path]:
    """A cgroup beside the pool with a sleeping process."""
    directory = cgroup2_mount() / f"agentcg-test-adopt-{os.getpid()}"
    directory.mkdir()
    process = subprocess.Popen(["sleep", "100000"])
    (directory / "cgroup.procs").write_text(str(process.pid))
    yield directory
    process.kill()
    process.wait()
    cgroup = Cgroup.open(directory)
    cgroup.kill_and_remove()
    cgroup.close()


def test_nothing_stays_frozen_when_no_daemon_can_start(
    daemon: DaemonProcess, adoptable: Path
) -> None:
    call = held_call(daemon, "alpha")
    path = f"/{adoptable.name}"
    daemon.admin.AdoptSession(
        pb.AdoptSessionRequest(cgroup_path=path, spec=pb.SessionSpec(id="box"))
    )
    inside = daemon.enter("box")
    box_call = inside.run(
        "result = stub.BeginCall(pb.BeginCallRequest(name='x')).id\n"
        "tool = subprocess.Popen([EXEC, '--call', result, '--', 'sleep', '100000'])"
    )
    box = adoptable / f"call-{box_call}"
    wait_until("the tool is in", lambda: bool((box / "cgroup.procs").read_text()))
    daemon.kill()
    good = daemon.config.read_text()
    held = (call, box, daemon.cgroup_dir / "alpha/agent")
    for directory in held:
        set_frozen(directory)
    daemon.config.write_text(good.replace("cgroup =", "cgruop ="))
    assert try_to_start(daemon.config)[0] == 78
    assert all(map(frozen, held))
    assert release(daemon.run_dir) == (0, "agentcg-release: thawed 3 cgroups, lifted 0 brakes\n")
    assert not any(map(frozen, held))
    assert release(daemon.run_dir) == (0, "agentcg-release: thawed 0 cgroups, lifted 0 brakes\n")
    daemon.config.write_text(good)
    daemon.start()
    assert len(daemon.admin.ListCalls(pb.ListCallsRequest()).calls) == 2


def test_beside_a_running_daemon_nothing_is_done(daemon: DaemonProcess) -> None:
    call = held_call(daemon, "alpha")
    set_frozen(call)
    status, said = release(daemon.run_dir)
    assert (status, said) == (0, "agentcg-release: a daemon is running: nothing is released\n")
    assert frozen(call)
    set_frozen(call, False)


def test_what_the_daemon_has_not_frozen_stays_as_it_is(daemon: DaemonProcess) -> None:
    """An agent's own cgroups, whatever their names, and a session that its runtime has paused."""
    held_call(daemon, "alpha")
    session = daemon.cgroup_dir / "alpha"
    daemon.kill()
    odd = [
        session / "call-ffffffffffff",
        session / "agent/call-own",
        session / "\r\x1b]0;x\x07",
        daemon.cgroup_dir / "call-beside",
    ]
    for directory in odd:
        directory.mkdir()
        set_frozen(directory)
    set_frozen(session)
    assert release(daemon.run_dir) == (0, "agentcg-release: thawed 0 cgroups, lifted 0 brakes\n")
    assert all(map(frozen, odd)) and frozen(session)
    set_frozen(session, False)
    for directory in odd:
        set_frozen(directory, False)
        directory.rmdir()


def test_calls_inside_calls(daemon: DaemonProcess) -> None:
    call = held_call(daemon, "alpha")
    daemon.kill()
    record = Cgroup.open(call).get_xattr()
    assert record is not None
    inner = call
    for number in range(3):
        inner = inner / f"call-00000000000{number}"
        inner.mkdir()
        Cgroup.open(inner).set_xattr(record)
        set_frozen(inner)
    assert release(daemon.run_dir)[1].startswith("agentcg-release: thawed 3 cgroups")
    assert not frozen(inner)


def test_depth_and_number_do_not_hold_others_back(daemon: DaemonProcess) -> None:
    """A session full of cgroups that look like calls, one nested a thousand deep."""
    victim = held_call(daemon, "zulu")
    flooded = held_call(daemon, "alpha")
    daemon.kill()
    for knob in ("cgroup.max.depth", "cgroup.max.descendants"):
        (flooded.parent / knob).write_text("max")  # as a daemon of before that had no such limits
    fd = os.open(flooded, os.O_DIRECTORY)
    for _ in range(1000):
        os.mkdir("call-x", dir_fd=fd)
        deeper = os.open("call-x", os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    for number in range(2000):
        (flooded.parent / f"call-{number:012x}").mkdir()
    set_frozen(victim)
    set_frozen(flooded)
    started = time.monotonic()
    status, said = release(daemon.run_dir)
    assert (status, said) == (0, "agentcg-release: thawed 2 cgroups, lifted 0 brakes\n")
    assert time.monotonic() - started < 9 * SLOW
    assert not frozen(victim) and not frozen(flooded)


@pytest.mark.parametrize(
    "record",
    [
        b"{",
        b'{"v":1,"kind":"call',
        b'{"kind":"session","grant":{"memory_high_bytes":1}}',
        b"[" * 60000,
        b'{"a":' * 10000,
        b'{"kind":}',
        b'"call"',
        b'{"name":"\\',
        b'{"name":"\\"kind\\":\\"call\\"","kind":"pool"}',
        b"\0\0",
    ],
)
def test_records_that_are_none(daemon: DaemonProcess, record: bytes) -> None:
    call = held_call(daemon, "alpha")
    daemon.kill()
    kept = Cgroup.open(call).get_xattr()
    assert kept is not None
    broken = daemon.cgroup_dir / "alpha/call-000000000000"
    broken.mkdir()
    Cgroup.open(broken).set_xattr(record)
    set_frozen(call)
    set_frozen(broken)
    assert release(daemon.run_dir) == (0, "agentcg-release: thawed 1 cgroups, lifted 0 brakes\n")
    assert frozen(broken) and not frozen(call)
    set_frozen(broken, False)


def test_a_run_directory_without_a_word(tmp_path: Path) -> None:
    assert release(tmp_path) == (0, f"agentcg-release: no daemon has run in {tmp_path}\n")
    file = tmp_path / "private/pool"
    file.parent.mkdir()
    for text in ("", "x\ny\n", "/sys/fs/cgroup\n"):
        file.write_text(text)
        assert release(tmp_path) == (1, f"agentcg-release: {file} is damaged\n")
    file.write_text(f"{tmp_path}\n/private\n")
    assert release(tmp_path)[0] == 1
    file.write_text(f"{cgroup2_mount()}\n/agentcg-nowhere\n")
    assert release(tmp_path) == (0, "agentcg-release: the pool is gone: nothing is held back\n")
    os.chown(file, 65534, 65534)
    assert release(tmp_path) == (1, f"agentcg-release: {file} is somebody else's\n")


@pytest.mark.controllers
def test_brakes_are_lifted_as_granted(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("[pool]\nmemory_high = '700M'\n")
    call = held_call(daemon, "alpha", memory="64M", memory_max="100M")
    free = held_call(daemon, "beta")
    record = json.loads(Cgroup.open(call).get_xattr() or b"")
    granted = record["grant"]["memory_high_bytes"]
    daemon.kill()
    pool, session = daemon.cgroup_dir, daemon.cgroup_dir / "alpha"
    before = (session / "cpu.weight").read_text()
    (call / "memory.high").write_text("20M")
    (free / "memory.high").write_text("20M")
    (pool / "memory.high").write_text("300M")
    (session / "cpu.weight").write_text("7")
    assert release(daemon.run_dir) == (0, "agentcg-release: thawed 0 cgroups, lifted 4 brakes\n")
    assert (call / "memory.high").read_text().strip() == str(granted or "max")
    assert (free / "memory.high").read_text() == "max\n"
    assert (pool / "memory.high").read_text() == f"{700 << 20}\n"
    assert (session / "cpu.weight").read_text() == before
