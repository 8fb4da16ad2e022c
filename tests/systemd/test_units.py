"""The units of systemd/ as an operator would install them, under systemd as PID 1."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from tests.harness import SLOW, AgentProcess, wait_until
from tests.systemd.service import (
    CONFIG,
    DAEMON,
    DROP_INS,
    ETC,
    POLL_S,
    POOL,
    RUN,
    UNITS,
    calls,
    journal,
    show,
    systemctl,
    wait_for_another,
)

pytestmark = pytest.mark.usefixtures("installed")

EXPOSURE_MOST = 4.0
RESTARTS = int(os.environ.get("AGENTCG_RESTARTS") or 5)


def test_units_verify() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(ETC / unit) for unit in UNITS)],
        capture_output=True,
        text=True,
    )
    ours = [line for line in done.stderr.splitlines() if "agentcg" in line]
    assert (done.returncode, ours) == (0, [])


def test_it_is_up_in_a_leaf_of_its_own_with_every_controller(admin: pb_grpc.AdminStub) -> None:
    assert show("ActiveState") == "active"
    assert show("Type") == "notify"
    assert show("StatusText").startswith("pool /agentcg.slice/")
    for unit in (DAEMON, "agentcg-pool.service"):
        assert show("Delegate", unit) == "yes"
    main = show("MainPID")
    own = Path(f"/proc/{main}/cgroup").read_text().strip()
    assert own == "0::/agentcg.slice/agentcgroupd.service"
    pool = admin.GetPool(pb.GetPoolRequest())
    assert pool.cgroup_path == "/agentcg.slice/agentcg-pool.service/pool"
    assert {"memory", "cpu", "pids"} <= set(pool.controllers)
    assert not pool.not_enforced
    assert (POOL / "cgroup.procs").read_text() == ""
    assert (POOL / "supervisor/cgroup.procs").read_text().split() == [
        show("MainPID", "agentcg-pool.service")
    ]


def test_history_is_kept_with_the_rights_that_it_has(admin: pb_grpc.AdminStub) -> None:
    """Within the unit's file systems and system calls."""
    admin.OpenSession(pb.OpenSessionRequest(spec=pb.SessionSpec(id="short")))
    admin.CloseSession(pb.CloseSessionRequest(session_id="short"))
    found = admin.ListPastSessions(pb.ListPastSessionsRequest(session_id="short")).sessions
    assert [past.closed_why for past in found] == ["the operator closed it"]
    file = Path("/var/lib/agentcgroup/history.db")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_sessions_and_calls_outlive_a_restart(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    before = calls(admin)
    assert len(before) == 1
    first = show("MainPID")
    systemctl("restart", DAEMON)
    assert show("MainPID") != first
    assert calls(admin) == before
    assert agent.run("result = tool.poll()") is None
    assert agent.run(
        "result = stub.GetSession(pb.GetSessionRequest(), wait_for_ready=True).id"
    ) == ("alpha")


def test_systemd_starts_a_killed_daemon_again(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    before = calls(admin)
    first = int(show("MainPID"))
    os.kill(first, signal.SIGKILL)
    wait_for_another(str(first))
    assert calls(admin) == before
    assert agent.run("result = tool.poll()") is None


def test_the_watchdog_ends_a_daemon_that_hangs(admin: pb_grpc.AdminStub) -> None:
    first = int(show("MainPID"))
    os.kill(first, signal.SIGSTOP)
    wait_for_another(str(first))
    assert len(calls(admin)) == 1


def test_a_stop_leaves_the_agents_at_work_and_a_start_finds_them(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    before = calls(admin)
    systemctl("stop", DAEMON)
    assert show("ActiveState", "agentcg-pool.service") == "active"
    assert agent.run("result = tool.poll()") is None
    systemctl("start", DAEMON)
    assert calls(admin) == before


def test_an_unusable_configuration_is_said_once_and_not_tried_again(
    admin: pb_grpc.AdminStub,
) -> None:
    good = CONFIG.read_text()
    systemctl("stop", DAEMON)
    CONFIG.write_text(good.replace("cgroup =", "cgruop ="))
    try:
        done = subprocess.run(["systemctl", "start", DAEMON], capture_output=True)
        assert done.returncode != 0
        assert show("ExecMainStatus") == "78"
        wait_until(
            "systemd gives up",
            lambda: show("ActiveState") == "failed",
            every_s=POLL_S,
        )
        assert show("NRestarts") in ("0", "1", "2")
        log = journal()
        assert "pool.cgruop: no such key; did you mean 'cgroup'?" in log
    finally:
        CONFIG.write_text(good)
        systemctl("reset-failed", DAEMON)
        systemctl("start", DAEMON)


@pytest.mark.parametrize("unit", [DAEMON, "agentcg-pool.service"])
def test_what_it_may_do_is_little(unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(ETC / unit)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Overall exposure level for .*: (\d+\.\d+)", done.stdout)
    assert found is not None and float(found[1]) <= EXPOSURE_MOST, done.stdout


def test_nothing_of_the_host_can_be_written(admin: pb_grpc.AdminStub) -> None:
    """What the daemon may write to: the tree of cgroups, its sockets, log and history alone."""
    main = show("MainPID")
    script = """
for path in /etc /usr /var /var/lib /home /root /boot /opt /sys/kernel /proc/sys/kernel; do
    if [ -e $path ] && touch $path/agentcg-test 2>/dev/null; then echo $path; fi
done
touch /run/agentcgroup/private/test /var/log/agentcgroup/test /var/lib/agentcgroup/test
mkdir /sys/fs/cgroup/agentcg.slice/agentcg-pool.service/pool/test
rmdir /sys/fs/cgroup/agentcg.slice/agentcg-pool.service/pool/test
"""
    done = subprocess.run(
        ["nsenter", f"--target={main}", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    status = Path(f"/proc/{main}/status").read_text()
    assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status


def test_a_restart_refuses_nobody(admin: pb_grpc.AdminStub, agent: AgentProcess) -> None:
    """systemd keeps the sockets: who connects meanwhile waits, and is answered."""
    stop = threading.Event()
    came: Counter[str] = Counter()

    def connect(kind: int, name: str) -> None:
        while not stop.is_set():
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.settimeout(60 * SLOW)
                try:
                    sock.connect(str(RUN / name))
                    came["connected"] += 1
                except OSError as error:
                    came[f"{name}: {error}"] += 1
            time.sleep(0.05)

    threads = [
        threading.Thread(target=connect, args=(socket.SOCK_STREAM, "agent/grpc.sock")),
        threading.Thread(target=connect, args=(socket.SOCK_SEQPACKET, "agent/attach.sock")),
        threading.Thread(target=connect, args=(socket.SOCK_STREAM, "admin/grpc.sock")),
    ]
    for thread in threads:
        thread.start()
    pids = set()
    try:
        for _ in range(RESTARTS):
            systemctl("reset-failed", DAEMON)
            systemctl("restart", DAEMON)
            pids.add(show("MainPID"))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(pids) == RESTARTS
    assert set(came) == {"connected"} and came["connected"] > 10 * RESTARTS, came
    assert agent.run("result = tool.poll()") is None


def test_a_killed_daemon_that_cannot_start_leaves_nothing_frozen(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    (call_id,) = calls(admin)
    freeze = POOL / f"pool/alpha/call-{call_id}/cgroup.freeze"
    good = CONFIG.read_text()
    CONFIG.write_text(good.replace("cgroup =", "cgruop ="))
    try:
        freeze.write_text("1")
        os.kill(int(show("MainPID")), signal.SIGKILL)
        wait_until("it goes on", lambda: freeze.read_text() == "0\n", every_s=POLL_S)
        wait_until(
            "systemd gives up",
            lambda: show("ActiveState") == "failed",
            every_s=POLL_S,
        )
    finally:
        CONFIG.write_text(good)
        systemctl("reset-failed", DAEMON)
        systemctl("start", DAEMON)
    assert calls(admin) == [call_id]


def test_when_it_was_started_too_often_nothing_stays_frozen(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    """A program in its place fails at once, until systemd gives up."""
    (call_id,) = calls(admin)
    freeze = POOL / f"pool/alpha/call-{call_id}/cgroup.freeze"
    drop_in = DROP_INS / "broken.conf"
    drop_in.write_text(
        "[Unit]\nStartLimitIntervalSec=600\nStartLimitBurst=3\n"
        "[Service]\nRestartSec=100ms\nExecStart=\nExecStart=/bin/false\n"
    )
    systemctl("daemon-reload")
    try:
        freeze.write_text("1")
        os.kill(int(show("MainPID")), signal.SIGKILL)
        wait_until("it goes on", lambda: freeze.read_text() == "0\n", every_s=POLL_S)
        wait_until("systemd gives up", lambda: show("ActiveState") == "failed", every_s=POLL_S)
        assert "Start request repeated too quickly" in journal()
        assert freeze.read_text() == "0\n"
    finally:
        drop_in.unlink()
        systemctl("daemon-reload")
        systemctl("reset-failed", *UNITS)
        systemctl("start", DAEMON)
    assert calls(admin) == [call_id]


def test_entries_of_the_journal_name_the_session(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    (call_id,) = calls(admin)
    systemctl("stop", DAEMON)
    (POOL / f"pool/alpha/call-{call_id}/cgroup.freeze").write_text("1")
    systemctl("start", DAEMON)
    done = subprocess.run(
        ["journalctl", "--no-pager", "-o", "json", "AGENTCG_SESSION=alpha"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    thawed = [entry for entry in found if entry["MESSAGE"].startswith("thaw call")]
    assert thawed and thawed[-1]["AGENTCG_CALL"] == call_id and thawed[-1]["PRIORITY"] == "6"
