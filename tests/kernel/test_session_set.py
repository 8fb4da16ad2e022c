"""Limits of an open session are changed, and a session ends with the process that asked for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import Admin, errors
from agentcgroupd.cgroup.tree import cgroup2_mount
from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess, wait_until

RUN = "import sys; from agentcgroup.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def admin(daemon: DaemonProcess) -> Iterator[Admin]:
    with Admin(str(daemon.run_dir)) as client:
        yield client


def _entries(daemon: DaemonProcess, kind: str) -> list[dict[str, object]]:
    entries = map(json.loads, daemon.audit_lines())
    return [entry for entry in entries if entry["event"] == kind]


def test_limits_are_changed_and_what_is_not_named_stays(
    daemon: DaemonProcess, admin: Admin
) -> None:
    admin.open_session("set", pids_max=100, calls_max=4, priority=50)
    changed = admin.update_session("set", pids_max=60, priority="important")
    assert (changed.pids_max, changed.priority, changed.calls_max) == (60, 80, 4)
    assert changed.cpu_weight > 100, "the weight follows the priority"
    assert admin.update_session("set", cpu_weight=77).cpu_weight == 77
    assert admin.update_session("set", priority="batch").cpu_weight == 77, "it was named"
    entry = _entries(daemon, "session_changed")[0]
    assert entry["session"] == "set"
    assert isinstance(entry["limits"], dict) and entry["limits"]["pids_max"] == [100, 60]
    admin.close_session("set")


def test_a_change_outlives_a_restart(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("")
    with Admin(str(daemon.run_dir)) as admin:
        admin.open_session("kept", pids_max=100)
        admin.update_session("kept", pids_max=60, cpu_max="500m")
        daemon.kill()
        daemon.start()
        (session,) = admin.sessions()
    assert (session.pids_max, session.cpu_max_millicores) == (60, 500)


@pytest.mark.parametrize(
    ("limits", "field", "word"),
    [
        ({}, "spec", "it names none"),
        ({"memory_max": "lots"}, "memory_max", "lots"),
        ({"memory_max": "20M"}, "memory_max", "at least memory_low (30 MiB)"),
        ({"memory_low": "90M"}, "memory_low", "at most memory_max (60 MiB)"),
        ({"pids_max": "none"}, "pids_max", "whole number"),
        ({"priority": "urgent"}, "priority", "important (80)"),
        ({"gpu": "10%"}, "gpu", "when it is opened"),
    ],
)
def test_what_makes_no_sense_changes_nothing(
    admin: Admin, limits: dict[str, str], field: str, word: str
) -> None:
    before = admin.open_session("same", memory_low="30M", memory_max="60M", pids_max=50)
    with pytest.raises(errors.InvalidIntent) as caught:
        admin.update_session("same", **limits)
    assert caught.value.field == field and word in str(caught.value)
    (after,) = (session for session in admin.sessions() if session.id == "same")
    assert (after.memory_low_bytes, after.memory_max_bytes) == (30 << 20, 60 << 20)
    assert after.pids_max == before.pids_max
    changed = admin.update_session("same", memory_low="none", memory_max="20M")
    assert (changed.memory_low_bytes, changed.memory_max_bytes) == (None, 20 << 20)
    admin.close_session("same")


def test_nobody_inside_a_session_may(daemon: DaemonProcess, agent: AgentProcess) -> None:
    code = (
        "from agentcgroup import Admin\n"
        "try:\n    Admin(run_dir).update_session('alpha', pids_max=100000)\n"
        "except Exception as error:\n    result = str(error)"
    )
    sentence = agent.run(code, run_dir=str(daemon.run_dir))
    assert "session alpha may not act as the operator" in sentence


def test_a_session_that_is_not_open_is_named(admin: Admin) -> None:
    with pytest.raises(errors.NotFound, match="'nobody'"):
        admin.update_session("nobody", pids_max=5)


@pytest.mark.controllers
def test_the_kernel_gets_the_new_limits(daemon: DaemonProcess, admin: Admin) -> None:
    admin.open_session("files", memory_max="100M", pids_max=100)
    directory = daemon.cgroup_dir / "files"
    admin.update_session("files", memory_max="80M", memory_high="70M", cpu_max=1.5, pids_max=60)
    assert (directory / "memory.max").read_text() == f"{80 << 20}\n"
    assert (directory / "memory.high").read_text() == f"{70 << 20}\n"
    assert (directory / "cpu.max").read_text().startswith("150000 ")
    assert (directory / "pids.max").read_text() == "60\n"
    admin.update_session("files", memory_max="none", memory_high="none", cpu_max="none")
    assert (directory / "memory.max").read_text() == "max\n"
    assert (directory / "cpu.max").read_text().startswith("max ")
    admin.close_session("files")


@pytest.mark.controllers
def test_less_than_the_session_holds_is_refused(daemon: DaemonProcess, admin: Admin) -> None:
    holder = daemon.open("holder", memory_max="300M")
    holder.run("held = bytearray(b'x' * (80 << 20)); kept.append(held)", kept=[])
    with pytest.raises(errors.InvalidIntent, match="would kill processes of the session"):
        admin.update_session("holder", memory_max="40M")
    assert holder.run("result = 1") == 1
    assert admin.update_session("holder", memory_max="200M").memory_max_bytes == 200 << 20
    admin.close_session("holder")


# Sessions that end with a process


def _session_run(daemon: DaemonProcess, *argv: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    command = [sys.executable, "-c", RUN, "session", "run", *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE)


def _names(admin: Admin) -> list[str]:
    return [session.id for session in admin.sessions()]


def test_a_session_ends_with_session_run_that_is_killed(
    daemon: DaemonProcess, admin: Admin
) -> None:
    process = _session_run(daemon, "owned", "sh", "-c", "echo there; exec sleep 1000")
    assert process.stdout is not None and process.stdout.readline() == b"there\n"
    (session,) = (s for s in admin.sessions() if s.id == "owned")
    assert session.owner_pid == process.pid
    process.kill()
    process.wait()
    wait_until("the session is closed", lambda: "owned" not in _names(admin))
    assert not (daemon.cgroup_dir / "owned").exists()
    process.stdout.close()
    again = _session_run(daemon, "owned", "true")
    assert again.wait() == 0, "the name is free"
    again.communicate()


def test_a_session_that_is_kept_does_not(daemon: DaemonProcess, admin: Admin) -> None:
    process = _session_run(daemon, "kept", "--keep", "true")
    process.communicate()
    assert process.returncode == 0 and "kept" in _names(admin)
    admin.close_session("kept")


def test_its_owner_is_known_after_a_restart(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("")
    script = "echo there; exec sleep 1000"
    dies, lives = (_session_run(daemon, name, "sh", "-c", script) for name in ("dies", "lives"))
    for process in (dies, lives):
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
    with Admin(str(daemon.run_dir)) as admin:
        daemon.kill()
        dies.kill()
        dies.wait()
        daemon.start()
        wait_until("the orphan is closed", lambda: _names(admin) == ["lives"])
        lives.kill()
        lives.wait()
        wait_until("the other one as well", lambda: not _names(admin))
    for process in (dies, lives):
        assert process.stdout is not None
        process.stdout.close()


def test_what_ends_by_itself_is_closed_once(daemon: DaemonProcess, admin: Admin) -> None:
    process = _session_run(daemon, "once", "sh", "-c", "exit 3")
    process.communicate()
    assert process.returncode == 3
    assert "once" not in _names(admin)
    closed = [e for e in _entries(daemon, "session_closed") if e["session"] == "once"]
    assert [entry["why"] for entry in closed] == ["its command ended"]


def test_a_signal_for_session_run_reaches_the_command(daemon: DaemonProcess, admin: Admin) -> None:
    process = _session_run(daemon, "term", "sh", "-c", "trap 'exit 7' TERM; echo; sleep 99 & wait")
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 7
    process.stdout.close()
    assert "term" not in _names(admin)


def test_the_command_is_of_another_user(daemon: DaemonProcess, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    script = "id -u; id -g; id -G; echo $HOME; grep ^0:: /proc/self/cgroup"
    process = _session_run(daemon, "user", "--user", "nobody", "sh", "-c", script)
    out = process.communicate()[0].decode().split("\n")
    assert process.returncode == 0
    assert out[:3] == ["65534", "65534", "65534"]
    assert out[4].endswith("/user/agent")
    process = _session_run(daemon, "user", "--user", "12345:54321", "sh", "-c", script)
    assert process.communicate()[0].split()[:3] == [b"12345", b"54321", b"54321"]
    for wrong in ("no-such-user", "nobody:no-such-group", "12345"):
        refused = _session_run(daemon, "user", f"--user={wrong}", "true")
        refused.communicate()
        assert refused.returncode == 125


def test_why_a_cgroup_cannot_be_adopted_is_said_of_what_was_typed(
    daemon: DaemonProcess, admin: Admin
) -> None:
    admin.open_session("taken")
    pool = f"/{daemon.cgroup_dir.relative_to(cgroup2_mount())}"
    own = Path("/proc/self/cgroup").read_text().split("0::")[1].split("\n")[0]
    for argv, said in (
        ([f"{pool}/taken"], "CGROUP: '{path}' cannot be used: it belongs to session taken;"),
        ([pool], "CGROUP: '{path}' cannot be used: it is in the pool;"),
        (["/"], "CGROUP: '/' cannot be used: the pool is in it;"),
        (["--pid", str(os.getpid())], f"--pid: cgroup '{own}' cannot be used: the pool is in it;"),
    ):
        if "--pid" in argv and own != "/":
            continue  # where this process is in a cgroup of its own, it could be adopted
        done = subprocess.run(
            [sys.executable, "-c", RUN, "session", "adopt", "new", *argv],
            env={**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 4, done.stderr
        assert said.format(path=argv[0]) in done.stderr, done.stderr
    admin.close_session("taken")
