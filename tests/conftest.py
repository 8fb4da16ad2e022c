"""Markers, the switch that turns every skip into a failure, and daemons of a test's own.

docs/testing.md says which markers send a test where.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.guest.where import decide
from tests.harness import DaemonProcess

NO_SKIP = bool(os.environ.get("AGENTCG_NO_SKIP"))

MARKERS = {
    "controllers": "needs cgroup v2 with the memory, cpu and pids controllers, and root",
    "programs": "needs a kernel that takes BPF programs",
    "psi": "needs a kernel with pressure stall information",
    "full_kernel": "needs something else that user-mode Linux lacks, such as zstd for zram",
    "with_programs": "shows something else on a kernel that takes BPF programs: runs there too",
    "full_speed": "too slow in a guest, or shows nothing there that it does not show here",
    "waits": "waits nearly all of its time, so that much else can run beside it; not in a guest",
}
NOT_IN_UML = ("programs", "psi", "full_kernel")
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

StartDaemon = Callable[[str], DaemonProcess]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers (an undeclared one is an error), and take signals as usual.

    A shell that starts this in the background has it ignore SIGINT and SIGQUIT, and nohup SIGHUP;
    the processes that tests start would inherit that.
    """
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            usual = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    where = decide()
    in_uml = os.environ.get("AGENTCG_GUEST") == "uml"
    for item in items:
        lacking = [name for name in NOT_IN_UML if item.get_closest_marker(name)] if in_uml else []
        if lacking:
            reason = f"user-mode Linux is not enough: {MARKERS[lacking[0]]}"
            item.add_marker(pytest.mark.skip(reason=reason))
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
