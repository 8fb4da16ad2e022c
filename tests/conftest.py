"""Markers, the switch that turns every skip into a failure, and daemons of a test's own.

controllers   needs cgroup v2 with memory, cpu and pids; skipped elsewhere
full_speed    counts on real time or on thousands of processes: not for an emulated machine
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.guest.where import decide
from tests.harness import DaemonProcess

NO_SKIP = bool(os.environ.get("AGENTCG_NO_SKIP"))

StartDaemon = Callable[[str], DaemonProcess]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers: an undeclared one is an error."""
    for marker in (
        "controllers: needs cgroup v2 with the memory, cpu and pids controllers, and root",
        "full_speed: too slow, or without meaning, on an emulated machine",
    ):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    where = decide()
    for item in items:
        if item.get_closest_marker("controllers") and where.kind != "native":
            item.add_marker(pytest.mark.skip(reason=where.reason))
        if item.get_closest_marker("full_speed") and "AGENTCG_EMULATED" in os.environ:
            item.add_marker(pytest.mark.skip(reason="this machine is emulated"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With AGENTCG_NO_SKIP=1 a skipped test has failed."""
    report = yield
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"AGENTCG_NO_SKIP: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself."""
    report = yield
    if NO_SKIP and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"AGENTCG_NO_SKIP: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> str:
    """A skip's longrepr is (path, line, reason)."""
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


@contextmanager
def _daemons(factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    with ExitStack() as running:

        def start(config: str) -> DaemonProcess:
            # A short name: the path of a Unix socket has at most 107 bytes.
            daemon = DaemonProcess(factory.mktemp("d"), config)
            running.callback(lambda: print(daemon.log.read_text()))
            running.callback(daemon.close)
            daemon.start()
            return daemon

        yield start


@pytest.fixture
def start_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """Starts a daemon with this text as its configuration; it is ended with the test."""
    with _daemons(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def start_module_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """The same for all tests of a module; it is ended with the last of them."""
    with _daemons(tmp_path_factory) as start:
        yield start
