"""Daemons of a test's own, with a configuration of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.harness import DaemonProcess

StartDaemon = Callable[[str], DaemonProcess]


@pytest.fixture
def start_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """Starts a daemon with this text as its configuration; it is ended with the test."""
    running: list[DaemonProcess] = []

    def start(config: str) -> DaemonProcess:
        daemon = DaemonProcess(tmp_path_factory.mktemp("d"), config)
        running.append(daemon)
        daemon.start()
        return daemon

    try:
        yield start
    finally:
        for daemon in running:
            daemon.close()
            print(daemon.log.read_text())
