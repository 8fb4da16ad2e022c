"""A call is told what it waited for, by this kernel's pressure stall information."""

from __future__ import annotations

import os

import pytest

from agentcgroup import Admin
from agentcgroup.types import Report
from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess

pytestmark = pytest.mark.psi

RUN = "result = agent.run(argv, check=True).call_id"
SPIN = "(timeout {seconds} sh -c 'while :; do :; done'; true)"


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon("")


def ran(daemon: DaemonProcess, agent: AgentProcess, script: str) -> Report:
    """Run a script in a call; returns its report."""
    call_id: str = agent.run(RUN, argv=["sh", "-c", script])
    with Admin(str(daemon.run_dir)) as admin:
        return admin.report(call_id)


def test_many_that_spin_wait_for_cpus_and_one_that_sleeps_for_nothing(
    daemon: DaemonProcess,
) -> None:
    agent = daemon.open("alpha")
    spins = " & ".join([SPIN.format(seconds=3)] * 4 * len(os.sched_getaffinity(0)))
    report = ran(daemon, agent, f"{spins} & wait")
    if report.delays is None:
        pytest.skip("this kernel tells no pressure of cgroups")
    assert report.delays.cpu_usec > report.wall_usec / 2
    assert "for a CPU" in report.sentence
    asleep = ran(daemon, agent, "sleep 2")
    assert asleep.delays is not None
    assert asleep.delays.io_usec < asleep.wall_usec / 4 and "it waited" not in asleep.sentence
