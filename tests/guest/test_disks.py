"""A call that fills a file system is paused, goes on when there is room again, and is ended when
nobody makes any; the important session's call is not the first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import Admin
from agentcgroup.types import CallState, Verdict
from tests.conftest import StartDaemon
from tests.disks import mounted_zram
from tests.harness import EXEC, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

MIB = 1 << 20
CONFIG = """
[guard]
disk_free = "40%"
disk_grace = "{grace}"
"""
FILLS = "i=0; while :; do dd if=/dev/zero of={path}/$i bs=1M count=2; i=$((i+1)); sleep 0.1; done"
START = """
import os
tool = subprocess.Popen([EXEC, "--name", name, "--priority", priority, "--", "sh", "-c", script],
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_zram(tmp_path / "disk", 256 * MIB) as path:
        yield path


def fill(daemon: DaemonProcess, session: str, disk: Path, priority: str = "normal") -> Path:
    """Begin a call that fills the disk, in a session of its own; returns where it writes."""
    where = disk / session
    where.mkdir()
    agent = daemon.open(session, priority=priority)
    agent.run(START, name=session, priority=priority, script=FILLS.format(path=where), EXEC=EXEC)
    return where


def paused(admin: Admin) -> dict[str, str]:
    """Calls that are paused, by their names, and why."""
    return {c.name: c.paused_why or "" for c in admin.calls() if c.state is CallState.FROZEN}


def test_it_goes_on_when_there_is_room(start_daemon: StartDaemon, disk: Path) -> None:
    daemon = start_daemon(CONFIG.format(grace="10m"))
    where = fill(daemon, "fills", disk)
    with Admin(str(daemon.run_dir)) as admin:
        wait_until("it is paused", lambda: "fills" in paused(admin))
        why = paused(admin)["fills"]
        print(why)
        assert f"left of the file system at {disk}" in why
        free = disk_free(disk)
        assert 0 < free < 0.4
        for file in where.iterdir():
            file.unlink()
        wait_until("it goes on", lambda: not paused(admin))
        wait_until("and is paused again", lambda: "fills" in paused(admin))
        (call,) = admin.calls()
        report = admin.end_call(call.id)
    assert report.frozen_usec > 0
    assert any(
        "a file system that it wrote to was nearly full" in f.sentence for f in report.feedback
    )


def disk_free(disk: Path) -> float:
    """Part of a file system that is free."""
    room = os.statvfs(disk)
    return room.f_bavail / room.f_blocks


def test_it_is_ended_when_nobody_makes_room(start_daemon: StartDaemon, disk: Path) -> None:
    daemon = start_daemon(CONFIG.format(grace="1s"))
    fill(daemon, "fills", disk)
    with Admin(str(daemon.run_dir)) as admin:
        wait_until("it is ended", lambda: bool(admin.reports()))
        (report,) = admin.reports()
        print(report.sentence)
        assert report.verdict is Verdict.STOPPED
        assert report.sentence.startswith("Stopped: a file system was nearly full: ")
        story = admin.story(report.call_id)
    assert {"disk_hold", "disk_kill"} <= {step.what for step in story.steps}
    assert disk_free(disk) > 0.2


def test_the_important_call_is_not_the_first(start_daemon: StartDaemon, disk: Path) -> None:
    daemon = start_daemon(CONFIG.format(grace="10m"))
    fill(daemon, "important", disk, priority="important")
    fill(daemon, "batch", disk, priority="batch")
    with Admin(str(daemon.run_dir)) as admin:
        wait_until("one is paused", lambda: bool(paused(admin)))
        assert set(paused(admin)) == {"batch"}
