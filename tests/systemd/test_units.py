"""The units of systemd/ as an operator would install them, under systemd as PID 1."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from tests.harness import ROOT, SLOW, AgentProcess, wait_until

pytestmark = pytest.mark.skipif(
    not Path("/run/systemd/system").is_dir() or os.geteuid() != 0,
    reason="systemd is not PID 1 here, or this is not root",
)

UNITS = (
    "agentcg.slice",
    "agentcg-pool.service",
    "agentcgroupd.service",
    "agentcgroupd-agent.socket",
    "agentcgroupd-admin.socket",
)
EXPOSURE_MOST = 4.0
RESTARTS = int(os.environ.get("AGENTCG_RESTARTS") or (3 if SLOW != 1.0 else 20))
"""An emulated CPU takes half a minute for each; tests/kernel/test_service.py has twenty as well."""
ETC = Path("/etc/systemd/system")
RUN = Path("/run/agentcgroup")
POOL = Path("/sys/fs/cgroup/agentcg.slice/agentcg-pool.service")
POLL_S = 0.1 * SLOW
"""systemctl by itself takes an emulated CPU longer than that."""


def systemctl(*arguments: str) -> str:
    """Run systemctl; AssertionError with what it said if it fails."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True)
    said = f"{arguments}: {done.stdout}{done.stderr}"
    if done.returncode and arguments[0] in ("start", "restart"):
        said += subprocess.run(
            ["journalctl", "-n", "30", "--no-pager"], capture_output=True, text=True
        ).stdout
    assert done.returncode == 0, said
    return done.stdout.strip()


IN_EMULATION = pytest.mark.skipif(
    not os.environ.get("AGENTCG_SYSTEMD_UNITS"),
    reason="set AGENTCG_SYSTEMD_UNITS=1: restarts take too long on an emulated CPU",
)


def show(unit: str, key: str) -> str:
    """Return a property of a unit."""
    return systemctl("show", "--value", "--property", key, unit)


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """The units and the configuration as they are shipped, the programs from this checkout."""
    for unit in UNITS:
        (ETC / unit).write_text((ROOT / "systemd" / unit).read_text())
    shutil.copy(ROOT / "systemd/agentcgroup.tmpfiles.conf", "/etc/tmpfiles.d/agentcgroup.conf")
    subprocess.run(["systemd-tmpfiles", "--create", "agentcgroup.conf"], check=True)
    Path("/etc/agentcgroup").mkdir(exist_ok=True)
    shipped = (ROOT / "systemd/agentcgroupd.toml").read_text()
    Path("/etc/agentcgroup/agentcgroupd.toml").write_text(shipped)
    drop_in = ETC / "agentcgroupd.service.d"
    drop_in.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    (drop_in / "test.conf").write_text(
        f"[Service]\nEnvironment=PATH={path}\nWatchdogSec=20\nTimeoutStartSec=300\n"
    )
    systemctl("daemon-reload")
    systemctl("start", "agentcgroupd.service")
    yield
    systemctl("stop", *(unit for unit in UNITS if not unit.endswith(".slice")))


@pytest.fixture(scope="module")
def admin() -> pb_grpc.AdminStub:
    """The operator's stub."""
    return pb_grpc.AdminStub(grpc.insecure_channel(f"unix:{RUN}/admin/grpc.sock"))


@pytest.fixture(scope="module")
def agent(admin: pb_grpc.AdminStub) -> Iterator[AgentProcess]:
    """An agent in a session of 200 MiB, holding one call with a sleeping tool."""
    spec = pb.SessionSpec(id="alpha", memory_max="200M")
    admin.OpenSession(pb.OpenSessionRequest(spec=spec))
    process = AgentProcess(RUN, "alpha")
    process.run(
        """
call_id = stub.BeginCall(pb.BeginCallRequest(name="tool")).id
tool = subprocess.Popen([EXEC, "--call", call_id, "--", "sleep", "100000"])
"""
    )
    yield process
    process.close()


def calls(admin: pb_grpc.AdminStub) -> list[str]:
    """Ids of the open calls, once the daemon answers."""
    reply = admin.ListCalls(pb.ListCallsRequest(), wait_for_ready=True, timeout=60)
    return [call.id for call in reply.calls]


def test_units_verify() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(ETC / unit) for unit in UNITS)],
        capture_output=True,
        text=True,
    )
    ours = [line for line in done.stderr.splitlines() if "agentcg" in line]
    assert (done.returncode, ours) == (0, [])


def test_it_is_up_in_a_leaf_of_its_own_with_every_controller(admin: pb_grpc.AdminStub) -> None:
    assert show("agentcgroupd.service", "ActiveState") == "active"
    assert show("agentcgroupd.service", "Type") == "notify"
    assert show("agentcgroupd.service", "StatusText").startswith("pool /agentcg.slice/")
    for unit in ("agentcgroupd.service", "agentcg-pool.service"):
        assert show(unit, "Delegate") == "yes"
    main = show("agentcgroupd.service", "MainPID")
    own = Path(f"/proc/{main}/cgroup").read_text().strip()
    assert own == "0::/agentcg.slice/agentcgroupd.service"
    pool = admin.GetPool(pb.GetPoolRequest())
    assert pool.cgroup_path == "/agentcg.slice/agentcg-pool.service/pool"
    assert {"memory", "cpu", "pids"} <= set(pool.controllers)
    assert not pool.not_enforced
    assert (POOL / "cgroup.procs").read_text() == ""
    assert (POOL / "supervisor/cgroup.procs").read_text().split() == [
        show("agentcg-pool.service", "MainPID")
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


@IN_EMULATION
def test_sessions_and_calls_outlive_a_restart(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    before = calls(admin)
    assert len(before) == 1
    first = show("agentcgroupd.service", "MainPID")
    systemctl("restart", "agentcgroupd.service")
    assert show("agentcgroupd.service", "MainPID") != first
    assert calls(admin) == before
    assert agent.run("result = tool.poll()") is None
    assert agent.run(
        "result = stub.GetSession(pb.GetSessionRequest(), wait_for_ready=True).id"
    ) == ("alpha")


@IN_EMULATION
def test_systemd_starts_a_killed_daemon_again(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    before = calls(admin)
    first = int(show("agentcgroupd.service", "MainPID"))
    os.kill(first, signal.SIGKILL)
    wait_until(
        "it runs again",
        lambda: (
            show("agentcgroupd.service", "MainPID") not in ("0", str(first))
            and show("agentcgroupd.service", "ActiveState") == "active"
        ),
        every_s=POLL_S,
    )
    assert calls(admin) == before
    assert agent.run("result = tool.poll()") is None


@IN_EMULATION
def test_the_watchdog_ends_a_daemon_that_hangs(admin: pb_grpc.AdminStub) -> None:
    first = int(show("agentcgroupd.service", "MainPID"))
    os.kill(first, signal.SIGSTOP)
    wait_until(
        "it runs again",
        lambda: (
            show("agentcgroupd.service", "MainPID") not in ("0", str(first))
            and show("agentcgroupd.service", "ActiveState") == "active"
        ),
        every_s=POLL_S,
    )
    assert len(calls(admin)) == 1


@IN_EMULATION
def test_a_stop_leaves_the_agents_at_work_and_a_start_finds_them(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    before = calls(admin)
    systemctl("stop", "agentcgroupd.service")
    assert show("agentcg-pool.service", "ActiveState") == "active"
    assert agent.run("result = tool.poll()") is None
    systemctl("start", "agentcgroupd.service")
    assert calls(admin) == before


@IN_EMULATION
def test_an_unusable_configuration_is_said_once_and_not_tried_again(
    admin: pb_grpc.AdminStub,
) -> None:
    path = Path("/etc/agentcgroup/agentcgroupd.toml")
    good = path.read_text()
    systemctl("stop", "agentcgroupd.service")
    path.write_text(good.replace("cgroup =", "cgruop ="))
    try:
        done = subprocess.run(["systemctl", "start", "agentcgroupd.service"], capture_output=True)
        assert done.returncode != 0
        assert show("agentcgroupd.service", "ExecMainStatus") == "78"
        wait_until(
            "systemd gives up",
            lambda: show("agentcgroupd.service", "ActiveState") == "failed",
            every_s=POLL_S,
        )
        assert show("agentcgroupd.service", "NRestarts") in ("0", "1", "2")
        log = systemctl_log()
        assert "pool.cgruop: no such key; did you mean 'cgroup'?" in log
    finally:
        path.write_text(good)
        systemctl("reset-failed", "agentcgroupd.service")
        systemctl("start", "agentcgroupd.service")


@IN_EMULATION
@pytest.mark.parametrize("unit", ["agentcgroupd.service", "agentcg-pool.service"])
def test_what_it_may_do_is_little(unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(ETC / unit)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Overall exposure level for .*: (\d+\.\d+)", done.stdout)
    assert found is not None and float(found[1]) <= EXPOSURE_MOST, done.stdout


@IN_EMULATION
def test_nothing_of_the_host_can_be_written(admin: pb_grpc.AdminStub) -> None:
    """What the daemon may write to: the tree of cgroups, its sockets, log and history alone."""
    main = show("agentcgroupd.service", "MainPID")
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


@IN_EMULATION
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
            systemctl("reset-failed", "agentcgroupd.service")
            systemctl("restart", "agentcgroupd.service")
            pids.add(show("agentcgroupd.service", "MainPID"))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(pids) == RESTARTS
    assert set(came) == {"connected"} and came["connected"] > 10 * RESTARTS, came
    assert agent.run("result = tool.poll()") is None


@IN_EMULATION
def test_a_killed_daemon_that_cannot_start_leaves_nothing_frozen(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    (call_id,) = calls(admin)
    freeze = POOL / f"pool/alpha/call-{call_id}/cgroup.freeze"
    path = Path("/etc/agentcgroup/agentcgroupd.toml")
    good = path.read_text()
    path.write_text(good.replace("cgroup =", "cgruop ="))
    try:
        freeze.write_text("1")
        os.kill(int(show("agentcgroupd.service", "MainPID")), signal.SIGKILL)
        wait_until("it goes on", lambda: freeze.read_text() == "0\n", every_s=POLL_S)
        wait_until(
            "systemd gives up",
            lambda: show("agentcgroupd.service", "ActiveState") == "failed",
            every_s=POLL_S,
        )
    finally:
        path.write_text(good)
        systemctl("reset-failed", "agentcgroupd.service")
        systemctl("start", "agentcgroupd.service")
    assert calls(admin) == [call_id]


@IN_EMULATION
def test_entries_of_the_journal_name_the_session(
    admin: pb_grpc.AdminStub, agent: AgentProcess
) -> None:
    (call_id,) = calls(admin)
    systemctl("stop", "agentcgroupd.service")
    (POOL / f"pool/alpha/call-{call_id}/cgroup.freeze").write_text("1")
    systemctl("start", "agentcgroupd.service")
    done = subprocess.run(
        ["journalctl", "--no-pager", "-o", "json", "AGENTCG_SESSION=alpha"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    thawed = [entry for entry in found if entry["MESSAGE"].startswith("thaw call")]
    assert thawed and thawed[-1]["AGENTCG_CALL"] == call_id and thawed[-1]["PRIORITY"] == "6"


def systemctl_log() -> str:
    """What the daemon has logged."""
    done = subprocess.run(
        ["journalctl", "-u", "agentcgroupd.service", "--no-pager"], capture_output=True, text=True
    )
    return done.stdout
