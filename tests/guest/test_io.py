"""Block devices: what a call reads and writes is counted by device, and held to its limit. The
device is one of zram without swap on it, the only kind that both guests have."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import Admin
from agentcgroup.types import Report
from agentcgroupd.host.zram import Zram
from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess

pytestmark = pytest.mark.controllers

KIB, MIB = 1 << 10, 1 << 20
RUN = "result = agent.run(argv, **intent).call_id"


@pytest.fixture(scope="module")
def daemon(start_module_daemon: StartDaemon) -> DaemonProcess:
    """A daemon that leaves swap alone."""
    return start_module_daemon('[pool]\nmemory_max = "256M"\n[guard]\nenabled = false\n')


@pytest.fixture(scope="module")
def agent(daemon: DaemonProcess) -> AgentProcess:
    """An agent whose calls copy."""
    return daemon.open("alpha")


@pytest.fixture
def device() -> Iterator[Zram]:
    """A block device of 32 MiB."""
    subprocess.run(["modprobe", "zram", "num_devices=0"], check=True)
    made = Zram(int(Path("/sys/class/zram-control/hot_add").read_text()))
    made.write("disksize", str(32 * MIB))
    yield made
    Path("/sys/class/zram-control/hot_remove").write_text(str(made.number))


def copied(
    daemon: DaemonProcess, agent: AgentProcess, size: int, where: str, **intent: str
) -> tuple[Report, float]:
    """Copy so many bytes with direct I/O in a call; returns its report and how long it took."""
    argv = ["dd", *where.split(), f"bs={64 * KIB}", f"count={size // (64 * KIB)}"]
    started = time.monotonic()
    call_id = agent.run(RUN, argv=argv, intent=intent)
    took = time.monotonic() - started
    with Admin(str(daemon.run_dir)) as admin:
        return admin.report(call_id), took


def test_writes_are_counted_by_device_and_held_to_the_limit(
    daemon: DaemonProcess, agent: AgentProcess, device: Zram
) -> None:
    write = f"if=/dev/zero of={device.node} oflag=direct"
    report, free_s = copied(daemon, agent, 4 * MIB, write)
    (counted,) = report.devices
    assert counted.device == device.node.name
    assert (counted.write_bytes, counted.writes) == (4 * MIB, 64)
    assert (report.io_write_bytes, counted.read_bytes) == (4 * MIB, 0)
    report, held_s = copied(daemon, agent, 4 * MIB, write, io_write_max="1M")
    assert report.grant is not None
    assert report.grant.settings["io_write_max"] == str(MIB)
    assert "io.max" not in report.grant.not_enforced
    print(f"4 MiB written in {free_s:.2f} s, at 1 MiB/s in {held_s:.2f} s")
    assert held_s > max(3.0, 2 * free_s), (free_s, held_s)


def test_reads_are_held_to_their_own_limit(
    daemon: DaemonProcess, agent: AgentProcess, device: Zram
) -> None:
    read = f"if={device.node} of=/dev/null iflag=direct"
    copied(daemon, agent, 4 * MIB, f"if=/dev/urandom of={device.node} oflag=direct")
    _, free_s = copied(daemon, agent, 4 * MIB, read, io_write_max="1M")
    report, held_s = copied(daemon, agent, 4 * MIB, read, io_read_max="1M")
    assert report.devices[0].read_bytes == 4 * MIB
    print(f"4 MiB read in {free_s:.2f} s, at 1 MiB/s in {held_s:.2f} s")
    assert held_s > max(3.0, 2 * free_s), (free_s, held_s)
