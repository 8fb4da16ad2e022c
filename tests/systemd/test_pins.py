"""Programs that outlive a killed daemon, under the unit as it is shipped, which may write to little
of bpffs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from agentcgroupd.bpf import pins
from agentcgroupd.bpf.libbpf import libbpf
from tests.harness import AgentProcess, wait_until
from tests.systemd.service import (
    DAEMON,
    MANAGER,
    POOL,
    SYSTEMD_RUN_USER,
    journal,
    show,
    systemctl,
    wait_for_another,
)

pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("installed")]

RUN = """
result = subprocess.run([EXEC, "--name", "scoped", "--", "bash", "-c", script]).returncode
"""
PLACE = pins.MOUNT / pins.DIRECTORY


def links() -> set[str]:
    """Names of the links that are pinned for the pool of the service."""
    directory = PLACE / str((POOL / "pool").stat().st_ino)
    return {path.name for path in directory.glob("link_*")}


def map_ids() -> dict[str, int]:
    """What the kernel calls the maps that are pinned, by the names of their pins."""
    directory = PLACE / str((POOL / "pool").stat().st_ino)
    found = {}
    for path in directory.glob("map_*"):
        fd = libbpf().check(f"opening {path}", "bpf_obj_get", str(path).encode())
        found[path.name] = pins.map_info(fd).id
        os.close(fd)
    return found


def test_what_a_users_manager_takes_out_of_a_call_is_told_with_who_did_it(
    agent: AgentProcess, admin: pb_grpc.AdminStub, manager: None
) -> None:
    """A scope of a job in the background, which goes on after its call has ended."""
    scope = " ".join([*SYSTEMD_RUN_USER, "--scope", "sleep", "1000"])
    script = f"{scope} & until grep -q run-r /proc/$!/cgroup; do sleep 1; done; exit 5"
    assert agent.run(RUN, script=script) == 5
    request = pb.ListReportsRequest(session_id="alpha", limit=50)
    wait_until("it is reported", lambda: bool(admin.ListReports(request).reports), 60)
    sentence = admin.ListReports(request).reports[0].sentence
    assert "was moved by systemd (1) to " in sentence, sentence
    assert f"/{MANAGER}/app.slice/run-r" in sentence, sentence
    # What is installed goes below only if no session is open.
    admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"))


def test_they_are_pinned_taken_over_and_gone_with_the_service(admin: pb_grpc.AdminStub) -> None:
    admin.GetPool(pb.GetPoolRequest(), wait_for_ready=True, timeout=300)
    first = show("MainPID")
    maps, of_first = map_ids(), links()
    assert len(maps) == len(pins.MAPS)
    assert of_first and all(name.endswith(f"_{first}") for name in of_first)
    assert "end with this process" not in journal()

    os.kill(int(first), signal.SIGKILL)
    assert links() == of_first
    wait_for_another(first)
    second = show("MainPID")
    assert map_ids() == maps
    assert links() == {name.replace(f"_{first}", f"_{second}") for name in of_first}
    said = journal()
    assert "end with this process" not in said and "another size" not in said

    systemctl("stop", DAEMON)
    assert list(PLACE.iterdir()) == []

    argv = [str(Path(sys.executable).parent / "agentcg"), "uninstall"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not PLACE.exists()
