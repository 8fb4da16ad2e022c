"""Fixtures: runtimes and daemons that follow them. Only in a guest that has the runtimes
(tests.containers.__main__)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.host import Host, all_runtimes
from tests.containers.runtimes import Service, prepare_guest
from tests.harness import DaemonProcess


@pytest.fixture(scope="session", autouse=True)
def in_a_guest_with_runtimes() -> None:
    """Skip elsewhere: what these tests do to a machine's runtimes is not for any other."""
    if "AGENTCG_GUEST" not in os.environ or shutil.which("dockerd") is None:
        pytest.skip("needs a guest with container runtimes: python -m tests.containers")
    prepare_guest()


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """A short path: that of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="c", dir="/run") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def host(directory: Path) -> Iterator[Host]:
    """All runtimes, and a daemon that follows them."""
    with all_runtimes(directory) as made:
        yield made


@pytest.fixture(scope="session")
def services(host: Host) -> dict[str, Service]:
    """Docker and podman."""
    return host.services


@pytest.fixture(scope="session")
def daemon(host: Host) -> DaemonProcess:
    """The daemon."""
    return host.daemon


@pytest.fixture(params=["docker", "podman"])
def service(request: pytest.FixtureRequest, services: dict[str, Service]) -> Service:
    """Each of the runtimes."""
    return services[request.param]
