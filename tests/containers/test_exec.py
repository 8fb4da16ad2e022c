"""Where a container asks for it, each command that is executed in it from outside is a call. Needs
programs in the kernel: QEMU (`--qemu`)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.containers.host import RUNTIMES, TRUE, Host, Made, sessions
from tests.harness import wait_until

EXECUTIONS = int(os.environ.get("AGENTCG_EXECUTIONS") or 4)
ASKED = {**TRUE, "agentcgroup.exec-is-call": "true"}
MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    os.environ.get("AGENTCG_GUEST") == "uml", reason="needs programs in the kernel: --qemu"
)


@pytest.fixture(params=RUNTIMES)
def made(host: Host, request: pytest.FixtureRequest) -> Iterator[Made]:
    """A container of each runtime that asks for it."""
    container = host.run(request.param, f"exec-{request.param}", ASKED)
    yield container
    host.remove(container)


@pytest.mark.timeout(3000)
def test_every_execution_is_a_call(host: Host, made: Made) -> None:
    """With a terminal and without one."""
    assert sessions(host.daemon)[made.session].exec_is_call
    command = "grep 0:: /proc/self/cgroup; sleep 1"
    for number in range(EXECUTIONS):
        tty = number % 2 == 1
        code, text = host.execute(made, "sh", "-c", command, tty=tty)
        print(f"{made.way} {number} tty={tty}: {code} {text.strip()}")
    wait_until(
        "all have ended", lambda: sessions(host.daemon)[made.session].calls_ended >= EXECUTIONS, 60
    )
    request = pb.ListReportsRequest(session_id=made.session, limit=1000)
    reports = list(host.daemon.admin.ListReports(request).reports)
    print(f"{made.way}: {[(report.name, report.observed, report.exit_code) for report in reports]}")
    assert len(reports) == EXECUTIONS
    assert all(report.observed and report.exit_code == 0 for report in reports)
    assert {pb.Verdict.Name(report.verdict) for report in reports} == {"VERDICT_OK"}
