"""Fixtures: a daemon for a whole module, and agents in sessions of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroupd.bpf.features import load
from tests.harness import AgentProcess, DaemonProcess


@pytest.fixture(scope="session")
def lifecycle_program() -> None:
    """Skip what needs the program that sees processes begin, where it does not load."""
    bpf, states = load("lifecycle")
    if bpf is None:
        pytest.skip(f"no lifecycle program here: {states[0].reason}")
    bpf.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A running daemon; what a test opens in it is removed when the module ends."""
    running = DaemonProcess(_short(tmp_path_factory))
    try:
        running.start()
        yield running
    finally:
        running.close()
        print(running.log.read_text() if running.log.exists() else "")


def _short(factory: pytest.TempPathFactory) -> Path:
    # The path of a Unix socket has at most 107 bytes.
    return factory.mktemp("d")


@pytest.fixture(scope="module")
def agent(daemon: DaemonProcess) -> AgentProcess:
    """An agent in session `alpha`."""
    return daemon.open("alpha")


@pytest.fixture(scope="module")
def other(daemon: DaemonProcess) -> AgentProcess:
    """An agent in session `beta`, who is up to no good."""
    return daemon.open("beta")
