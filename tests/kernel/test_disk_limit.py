"""A call that writes without end is stopped by its own limit, and told so."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import Admin
from agentcgroup.types import Report, Verdict
from tests.conftest import StartDaemon
from tests.disks import mounted_zram
from tests.harness import AgentProcess, DaemonProcess

MIB = 1 << 20
RUN = "result = agent.run(argv, **intent).call_id"
WRITES = "dd if=/dev/zero of={path} bs=1M count=4 conv=notrunc oflag=append"
FOREVER = f"while :; do {WRITES}; done 2> /dev/null"


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon("")


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk: that of the test, or in a guest, whose /tmp lies in memory, one on a
    device of zram."""
    if os.major(tmp_path.stat().st_dev):
        yield tmp_path
        return
    with mounted_zram(tmp_path / "disk", 256 * MIB) as path:
        yield path


def ran(daemon: DaemonProcess, agent: AgentProcess, script: str, **intent: str) -> Report:
    """Run a script in a call; returns its report."""
    call_id: str = agent.run(RUN, argv=["sh", "-c", script], intent=intent)
    with Admin(str(daemon.run_dir)) as admin:
        return admin.report(call_id)


def test_one_that_writes_without_end_is_ended_at_its_limit(
    daemon: DaemonProcess, on_disk: Path
) -> None:
    agent, path = daemon.open("alpha"), on_disk / "without end"
    script = FOREVER.format(path=f"'{path}'")
    report = ran(daemon, agent, script, disk_max="40M", timeout="60s")
    size = path.stat().st_size
    print(f"40 MiB allowed, {size / MIB:.0f} MiB written in {report.wall_usec / 1e6:.2f} s")
    assert report.verdict is Verdict.STOPPED
    assert report.sentence.startswith("Stopped at its own limit of what it may write: ")
    assert "of at most 40 MiB (disk_max)" in report.sentence
    assert report.grant is not None and report.grant.disk_max_bytes == 40 * MIB
    assert report.try_next is not None
    assert dict(report.try_next.enough) == {"disk_max": "80M"}
    assert size > 40 * MIB
    kinds = [json.loads(line)["event"] for line in daemon.audit_lines()]
    assert "disk_kill" in kinds


def test_one_that_writes_less_is_left_alone(daemon: DaemonProcess, on_disk: Path) -> None:
    agent = daemon.open("alpha")
    script = f"dd if=/dev/zero of='{on_disk}/small' bs=1M count=20; sleep 1"
    report = ran(daemon, agent, script, disk_max="40M")
    assert report.verdict is Verdict.OK


def test_what_a_configuration_allows_holds_for_calls_that_say_nothing(
    start_daemon: StartDaemon, on_disk: Path
) -> None:
    daemon = start_daemon('[calls]\ndisk_max = "20M"\n')
    agent = daemon.open("alpha")
    script = FOREVER.format(path=f"'{on_disk}/default'")
    report = ran(daemon, agent, script, timeout="60s")
    assert report.verdict is Verdict.STOPPED and "20 MiB (disk_max)" in report.sentence
