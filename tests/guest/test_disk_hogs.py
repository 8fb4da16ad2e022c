"""An important call that writes to a disk beside ten others that do so without end.

For a guest whose disk is slow by construction, which emulation does not make slower: that of
`python -m tests.guest.vm --memory=2048 --disk 1024:50 -- .venv/bin/pytest` and this file. With
AGENTCG_DISK_WORK=1280 it takes half a minute alone, as in bench/measurements.md.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.guest.disk import find_disk
from tests.harness import AgentProcess, DaemonProcess

pytestmark = [pytest.mark.controllers, pytest.mark.full_kernel]

HOGS, AREA_MIB = 10, 64
"""Each hog writes to an area of its own, and the important one to another."""
WORK_MIB = int(os.environ.get("AGENTCG_DISK_WORK", "640"))
MOST = 1.8
"""The aim is 1.1, of 30 s of work. What is lost is the time until the hogs are held, which an
emulated CPU beside other work makes three times as long; if nobody held them it would be 10."""
RUN = "result = agent.run(argv, **intent).call_id"
HOG = "while :; do dd if=/dev/zero of={disk} bs=1M count={area} seek={at} oflag=direct; done"


@pytest.fixture(scope="module")
def disk() -> Path:
    """The guest's own disk."""
    return find_disk()


def wrote_s(agent: AgentProcess, disk: Path) -> float:
    """Write in a call as fast as the disk takes it; returns the seconds that took."""
    areas = WORK_MIB // AREA_MIB
    once = f"dd if=/dev/zero of={disk} bs=1M count={AREA_MIB} oflag=direct 2> /dev/null"
    started = time.monotonic()
    agent.run(RUN, argv=["sh", "-c", f"for i in $(seq {areas}); do {once}; done"], intent={})
    return time.monotonic() - started


@pytest.mark.timeout(500)
def test_it_takes_little_longer_than_alone(start_daemon: StartDaemon, disk: Path) -> None:
    daemon: DaemonProcess = start_daemon("")
    important = daemon.open("vip", priority="important")
    alone_s = wrote_s(important, disk)
    hogs = [daemon.open(f"hog{number}") for number in range(HOGS)]
    for number, hog in enumerate(hogs, 1):
        script = HOG.format(disk=disk, area=AREA_MIB, at=number * AREA_MIB)
        code = "call = agent.tool_call('hog'); call.begin(); call.popen(argv, stderr=-3)"
        hog.run(code, argv=["sh", "-c", script])
    time.sleep(3)
    began_s = time.time()
    beside_s = wrote_s(important, disk)
    print(f"{alone_s:.1f} s alone, {beside_s:.1f} beside {HOGS} hogs: {beside_s / alone_s:.3f}")
    for line in daemon.audit_path.read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] in ("io_max", "io_weight"):
            print(f"{entry['at_unix_usec'] / 1e6 - began_s:.1f} s: {entry['call']}: {entry['why']}")
    assert beside_s / alone_s <= MOST
