"""The service as an operator would install it, from this checkout, and what systemd says of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from tests.harness import PATIENCE, ROOT, SLOW, wait_until

UNITS = (
    "agentcg.slice",
    "agentcg-pool.service",
    "agentcgroupd.service",
    "agentcgroupd-agent.socket",
    "agentcgroupd-admin.socket",
)
DAEMON = "agentcgroupd.service"
ETC = Path("/etc/systemd/system")
DROP_INS = ETC / f"{DAEMON}.d"
TMPFILES = Path("/etc/tmpfiles.d/agentcgroup.conf")
CONFIG = Path("/etc/agentcgroup/agentcgroupd.toml")
RUN = Path("/run/agentcgroup")
POOL = Path("/sys/fs/cgroup/agentcg.slice/agentcg-pool.service")
POLL_S = 0.1 * SLOW
"""systemctl by itself takes an emulated CPU longer than that."""
WATCHDOG_S = 6 if SLOW == 1.0 else 60
"""The daemon asks itself every half of that."""
USER = 4321
MANAGER = f"user@{USER}.service"
RUNTIME_DIR = Path(f"/run/user/{USER}")
SYSTEMD_RUN_USER = (
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
    *("env", f"XDG_RUNTIME_DIR={RUNTIME_DIR}", "systemd-run", "--user", "--quiet"),
)
"""Asks the user's own manager, as that user."""


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


def show(key: str, unit: str = DAEMON) -> str:
    """Return a property of a unit."""
    return systemctl("show", "--value", "--property", key, unit)


def install() -> None:
    """Put the units and the configuration in place as they are shipped, and start the daemon with
    the programs of this checkout."""
    for unit in UNITS:
        (ETC / unit).write_text((ROOT / "systemd" / unit).read_text())
    shutil.copy(ROOT / "systemd/agentcgroup.tmpfiles.conf", TMPFILES)
    subprocess.run(["systemd-tmpfiles", "--create", "agentcgroup.conf"], check=True)
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text((ROOT / "systemd/agentcgroupd.toml").read_text())
    DROP_INS.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    (DROP_INS / "test.conf").write_text(
        f"[Service]\nEnvironment=PATH={path}\nWatchdogSec={WATCHDOG_S}\nTimeoutStartSec=300\n"
    )
    systemctl("daemon-reload")
    systemctl("start", DAEMON)


def remove() -> None:
    """Stop all units, the sockets among them, and what runs in the pool; remove their files."""
    there = [unit for unit in UNITS if not unit.endswith(".slice") and (ETC / unit).exists()]
    if there:  # a test may have removed them
        systemctl("stop", *there)
    for unit in UNITS:
        (ETC / unit).unlink(missing_ok=True)
    TMPFILES.unlink(missing_ok=True)
    CONFIG.unlink(missing_ok=True)
    shutil.rmtree(DROP_INS)
    systemctl("daemon-reload")


def wait_for_another(first: str) -> None:
    """Wait until systemd has started another daemon than the one of that pid."""
    wait_until(
        "it runs again",
        lambda: show("MainPID") not in ("0", first) and show("ActiveState") == "active",
        timeout_s=20,
        every_s=POLL_S,
    )


def calls(admin: pb_grpc.AdminStub) -> list[str]:
    """Ids of the open calls, once the daemon answers."""
    reply = admin.ListCalls(pb.ListCallsRequest(), wait_for_ready=True, timeout=10 * PATIENCE)
    return [call.id for call in reply.calls]


def journal(*arguments: str) -> str:
    """What the daemon has logged."""
    return subprocess.run(
        ["journalctl", "-u", DAEMON, "--no-pager", *arguments], capture_output=True, text=True
    ).stdout


def start_user_manager() -> None:
    """Start the manager of a user who is logged in, or lingers."""
    subprocess.run(["useradd", f"--uid={USER}", "--no-create-home", "lingering"], check=True)
    RUNTIME_DIR.mkdir(parents=True, exist_ok=True)
    os.chown(RUNTIME_DIR, USER, USER)
    RUNTIME_DIR.chmod(0o700)
    systemctl("start", MANAGER)
