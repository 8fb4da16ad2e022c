"""systemd as PID 1: what the tests of the units take for granted."""

from __future__ import annotations

import subprocess
from pathlib import Path


def systemctl(*arguments: str) -> str:
    """Run systemctl; return its output, even when it says no."""
    done = subprocess.run(
        ["systemctl", "--no-pager", *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def test_pid1_is_systemd() -> None:
    assert Path("/proc/1/comm").read_text() == "systemd\n"


def test_nothing_failed() -> None:
    assert systemctl("list-units", "--failed", "--plain", "--no-legend") == ""


def test_a_unit_written_now_can_be_started() -> None:
    unit = Path("/run/systemd/system/agentcg-test-self.service")
    unit.write_text(
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nDelegate=yes\n"
        "MemoryMax=64M\nExecStart=/bin/true\n"
    )
    try:
        systemctl("daemon-reload")
        systemctl("start", unit.name)
        assert systemctl("is-active", unit.name) == "active"
        assert systemctl("show", "-P", "MemoryMax", unit.name) == str(64 << 20)
    finally:
        systemctl("stop", unit.name)
        unit.unlink()
        systemctl("daemon-reload")
