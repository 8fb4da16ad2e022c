"""What is said at the end of a start, and what of the start a terminal shows."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from agentcgroupd.telemetry.started import started

POOL, RUN = Path("/sys/fs/cgroup/agentcg"), Path("/run/agentcgroup")


def test_a_host_with_everything() -> None:
    features = [("process lifecycle", True), ("deny growth", True)]
    lines = started(POOL, 12 << 30, 4000, ("memory", "cpu", "pids", "io"), features, RUN)
    assert lines == (
        "all sessions together have 12 GiB of memory and 4 CPUs; limits of each call: memory, "
        "CPU, processes, I/O",
        "programs in the kernel: 2 of 2 features",
        "ready: pool /sys/fs/cgroup/agentcg, sockets in /run/agentcgroup; next: agentcg session "
        "run NAME -- COMMAND",
    )


def test_what_is_not_enforced_is_named() -> None:
    features = [("process lifecycle", True), ("deny growth", False)]
    first, second, _ = started(POOL, 1 << 30, 1500, ("memory", "pids"), features, RUN)
    assert "1.5 CPUs; limits of each call: memory, processes, not CPU, I/O; `agentcg" in first
    assert second.startswith("programs in the kernel: 1 of 2 features, not deny growth; `agentcg")
    first, _, _ = started(POOL, None, 1000, (), features, RUN)
    assert "memory without a limit" in first and "none is enforced" in first


_SCRIPT = """
import logging, sys
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.telemetry.logs import set_up
set_up(len(sys.argv) > 1)
logging.warning("a detail", extra=DETAIL)
logging.info("a summary")
"""


def said(*arguments: str, terminal: bool) -> str:
    """What the script writes to standard error."""
    argv = [sys.executable, "-c", _SCRIPT, *arguments]
    if not terminal:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stderr
    outer, inner = pty.openpty()
    subprocess.run(argv, stderr=inner, check=True)
    os.close(inner)
    with os.fdopen(outer, "rb") as stream:
        return stream.read1(4096).decode()


def test_details_of_the_start_are_for_the_log() -> None:
    assert "a detail" in said(terminal=False)
    assert "a detail" in said("verbose", terminal=True)
    shown = said(terminal=True)
    assert "a summary" in shown and "a detail" not in shown
