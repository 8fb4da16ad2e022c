"""Fixtures: runtimes and daemons that follow them. Only in a guest that has the runtimes
(tests.containers.__main__)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.runtimes import Service, dockerd, podman, prepare_guest, running
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
def services(directory: Path) -> Iterator[dict[str, Service]]:
    """Docker and podman."""
    with running(dockerd(directory)) as docker, running(podman(directory)) as pods:
        yield {"docker": docker, "podman": pods}


@pytest.fixture(scope="session")
def daemon(directory: Path, services: dict[str, Service]) -> Iterator[DaemonProcess]:
    """A daemon that follows both."""
    home = directory / "d"
    home.mkdir()
    sockets = "\n".join(f'{name} = "{each.socket}"' for name, each in services.items())
    made = DaemonProcess(home, f"[containers]\n{sockets}\n")
    made.start()
    yield made
    made.close()
    print(made.log.read_text()[-6000:])


@pytest.fixture(params=["docker", "podman"])
def service(request: pytest.FixtureRequest, services: dict[str, Service]) -> Service:
    """Each of the runtimes."""
    return services[request.param]
