"""What usage adds up is what the kernel counted for the whole pool, less what agents used
themselves."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import Admin
from agentcgroup.types import SessionSums
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.host.zram import Zram
from tests.conftest import StartDaemon
from tests.harness import DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

MIB = 1 << 20
CALLS = 4
SPIN = "result = agent.run(['sh', '-c', script], check=True).call_id"
WORK = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; dd if=/dev/zero of={node} bs=1M count=8 "
CLOSE = 0.01
"""Usage and the pool's counters differ by no more than this part."""


@pytest.fixture
def device() -> Iterator[Zram]:
    """A block device of 16 MiB."""
    subprocess.run(["modprobe", "zram", "num_devices=0"], check=True)
    made = Zram(int(Path("/sys/class/zram-control/hot_add").read_text()))
    made.write("disksize", str(16 * MIB))
    yield made
    Path("/sys/class/zram-control/hot_remove").write_text(str(made.number))


def counted(daemon: DaemonProcess, *sessions: str) -> tuple[int, int]:
    """CPU time in usec and bytes written, of the pool less those of the agents themselves."""
    cpu_usec = written = 0
    for sign, path in (
        (1, daemon.cgroup_dir),
        *((-1, daemon.cgroup_dir / session / "agent") for session in sessions),
    ):
        cgroup = Cgroup.open(path)
        cpu_usec += sign * cgroup.read(knobs.CPU_STAT)["usage_usec"]
        stat = cgroup.read_if(knobs.IO_STAT) or {}
        written += sign * sum(device.get("wbytes", 0) for device in stat.values())
        cgroup.close()
    return cpu_usec, written


def sums(daemon: DaemonProcess) -> list[SessionSums]:
    with Admin(str(daemon.run_dir)) as admin:
        return [each.sums for each in admin.usage("session") if each.sums is not None]


def test_sums_agree_with_the_pool(start_daemon: StartDaemon, device: Zram) -> None:
    daemon = start_daemon("")
    agents = {name: daemon.open(name) for name in ("alpha", "beta")}
    script = WORK.format(node=device.node) + "oflag=direct 2> /dev/null"
    for agent in agents.values():
        for _ in range(CALLS):
            agent.run(SPIN, script=script)
    count = CALLS * len(agents)
    wait_until("all are kept", lambda: sum(each.calls for each in sums(daemon)) == count)
    cpu_usec, written = counted(daemon, *agents)
    used = sums(daemon)
    usage_usec = sum(each.cpu_usage_usec for each in used)
    usage_written = sum(each.io_write_bytes or 0 for each in used)
    print(f"CPU: {usage_usec} of {cpu_usec} usec; written: {usage_written} of {written} bytes")
    assert usage_usec == pytest.approx(cpu_usec, rel=CLOSE)
    assert usage_written == pytest.approx(written, rel=CLOSE)
    assert written == count * 8 * MIB
