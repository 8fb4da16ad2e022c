"""A cgroup beside the pool, as a container runtime makes one, with a process in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.harness import DaemonProcess


@contextmanager
def container(
    daemon: DaemonProcess, code: str, memory_max: str = "max"
) -> Iterator[tuple[Cgroup, subprocess.Popen[bytes]]]:
    """Make the cgroup, and start a Python process in it that runs `code` and then waits; both are
    gone at the end."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"container-{daemon.pool_path.strip('/')}")
    cgroup = Cgroup.open(made.path)
    cgroup.write_text("memory.max", memory_max)
    argv = [sys.executable, "-S", "-c", f"{code}\nimport time\ntime.sleep(10000)"]
    inside = subprocess.Popen(argv)
    cgroup.attach(inside.pid)
    try:
        yield cgroup, inside
    finally:
        inside.kill()
        inside.wait()
        cgroup.kill_and_remove()
        cgroup.close()
        root.close()


def adopt(daemon: DaemonProcess, cgroup: Cgroup, session_id: str, **limits: Any) -> pb.Session:
    """Have the daemon make it a session."""
    spec = pb.SessionSpec(id=session_id, **limits)
    request = pb.AdoptSessionRequest(cgroup_path=f"/{cgroup.path.name}", spec=spec)
    return daemon.admin.AdoptSession(request)
