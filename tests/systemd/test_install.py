"""`agentcg install` from a wheel in a virtual environment, under systemd as PID 1."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.cli.install_files import UNITS
from tools.wheel_venv import VENV

pytestmark = [
    pytest.mark.skipif(
        not Path("/run/systemd/system").is_dir() or os.geteuid() != 0,
        reason="systemd is not PID 1 here, or this is not root",
    ),
    pytest.mark.skipif(
        not (VENV / "bin/agentcg").exists(),
        reason="the wheel is not installed in build/wheel-venv: python -m tools.wheel_venv",
    ),
]

DROP_IN = Path("/etc/systemd/system/agentcgroupd.service.d/test.conf")
SLICE = Path("/sys/fs/cgroup/agentcg.slice")
LEFT = (
    *(Path("/etc/systemd/system") / unit for unit in UNITS),
    *map(Path, ("/etc/agentcgroup", "/etc/tmpfiles.d/agentcgroup.conf")),
    *map(Path, ("/run/agentcgroup", "/var/log/agentcgroup", "/var/lib/agentcgroup")),
    *(Path("/usr/local/bin") / name for name in ("agentcg", "agentcg-exec", "agentcgroupd")),
    SLICE,
)


def run(*arguments: str, program: str = str(VENV / "bin/agentcg")) -> tuple[int, str, str]:
    """Run agentcg; returns its exit status and what it wrote."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def show(key: str, unit: str = "agentcgroupd.service") -> str:
    """Return a property of a unit."""
    argv = ["systemctl", "show", "--value", "--property", key, unit]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def slow_machine() -> Iterator[None]:
    """More time to start than the unit gives: an emulated CPU needs it."""
    DROP_IN.parent.mkdir(parents=True)
    DROP_IN.write_text("[Service]\nTimeoutStartSec=300\nWatchdogSec=0\n")
    yield
    DROP_IN.unlink()
    DROP_IN.parent.rmdir()
    subprocess.run(["systemctl", "daemon-reload"], check=True)


def installed() -> dict[str, Any]:
    """Install, and return what was said."""
    code, out, err = run("install", "--json")
    assert code == 0, err
    value: dict[str, Any] = json.loads(out)
    return value


@pytest.mark.timeout(600)
def test_it_starts_and_goes_without_a_trace() -> None:
    said = installed()
    assert said["started"] and {file["found"] for file in said["files"]} == {"new"}
    assert show("ActiveState") == "active"
    assert show("UnitFileState") == "enabled"
    assert f"path={VENV}/bin/agentcgroupd" in show("ExecStart")
    first = show("MainPID")

    # Once more: nothing is changed, and nothing restarted.
    said = installed()
    assert {file["found"] for file in said["files"]} == {"same"}
    assert show("MainPID") == first

    # An operator finds the command, and the daemon has every controller.
    code, out, err = run("status", "--json", program="/usr/local/bin/agentcg")
    assert code == 0, err
    assert json.loads(out)["pool"]["cgroup_path"].startswith("/agentcg.slice/")

    # An open session is not ended by mistake.
    assert run("session", "open", "busy")[0] == 0
    code, _, err = run("uninstall")
    assert (code, "busy" in err) == (4, True), err
    assert show("ActiveState") == "active"
    assert run("session", "close", "busy")[0] == 0

    code, _, err = run("uninstall")
    assert code == 0, err
    assert [str(path) for path in LEFT if path.exists() or path.is_symlink()] == []
    # A slice needs no file to be known.
    assert {show("LoadState", unit) for unit in UNITS if unit != "agentcg.slice"} == {"not-found"}
    assert {show("ActiveState", unit) for unit in UNITS} == {"inactive"}
    assert run("uninstall")[0] == 0
