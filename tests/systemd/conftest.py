"""The service under systemd as PID 1, started once for all tests of a module."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from tests.harness import AgentProcess
from tests.systemd import service


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests where systemd is not PID 1, or this is not root."""
    if Path("/run/systemd/system").is_dir() and os.geteuid() == 0:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            reason = "systemd is not PID 1 here, or this is not root"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def installed() -> Iterator[None]:
    """The units, installed and started."""
    service.install()
    yield
    service.remove()


@pytest.fixture(scope="module")
def admin(installed: None) -> Iterator[pb_grpc.AdminStub]:
    """The operator's stub."""
    with grpc.insecure_channel(f"unix:{service.RUN}/admin/grpc.sock") as channel:
        yield pb_grpc.AdminStub(channel)


@pytest.fixture(scope="module")
def agent(admin: pb_grpc.AdminStub) -> Iterator[AgentProcess]:
    """An agent in a session of 200 MiB, holding one call with a sleeping tool."""
    spec = pb.SessionSpec(id="alpha", memory_max="200M")
    admin.OpenSession(pb.OpenSessionRequest(spec=spec))
    process = AgentProcess(service.RUN, "alpha")
    process.run(
        """
call_id = stub.BeginCall(pb.BeginCallRequest(name="tool")).id
tool = subprocess.Popen([EXEC, "--call", call_id, "--", "sleep", "100000"])
"""
    )
    yield process
    process.close()


@pytest.fixture(scope="module")
def manager(installed: None) -> Iterator[None]:
    """A user's own manager."""
    service.start_user_manager()
    yield
    service.systemctl("stop", service.MANAGER)
    subprocess.run(["userdel", "lingering"], check=True)
