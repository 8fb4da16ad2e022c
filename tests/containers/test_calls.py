"""Calls in containers of each runtime: their limits hold, and their reports say how they ended."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.containers.host import RUNTIMES, TRUE, Host, Made, sessions
from tests.harness import wait_until

CALLS = int(os.environ.get("AGENTCG_CONTAINER_CALLS") or 15)
MIB = 1 << 20
LIMIT = 128 * MIB


@pytest.fixture(params=RUNTIMES)
def made(host: Host, request: pytest.FixtureRequest) -> Iterator[Made]:
    """A container of each runtime."""
    container = host.run(request.param, f"calls-{request.param}", TRUE, LIMIT)
    yield container
    host.remove(container)


HOG = "dd if=/dev/zero of=/dev/null bs=24M count=1"
FORKS = "for i in 1 2 3 4 5 6 7 8; do sleep 0.3 & done; wait"
OOM_TOLD = {"docker": "OOMKilled", "podman": "", "nri": "OOMKilled", "cri": "OOMKilled"}
"""What a runtime tells of the container, which has not been killed (docs/containers.md)."""
CASES: tuple[tuple[tuple[str, ...], int | None, str], ...] = (
    (("--name", "fine", "--", "true"), 0, "VERDICT_OK"),
    (("--name", "status", "--", "sh", "-c", "exit 3"), 3, "VERDICT_FAILED"),
    (("--name", "memory", "--memory-max", "12M", "--", "sh", "-c", HOG), 137, "VERDICT_OOM_CALL"),
    (("--name", "time", "--timeout", "0.5", "--", "sleep", "1000"), None, "VERDICT_TIMEOUT"),
    (("--name", "pids", "--pids-max", "4", "--", "sh", "-c", FORKS), 2, "VERDICT_FAILED"),
)


@pytest.mark.timeout(1800)
def test_limits_hold_and_reports_are_right(host: Host, made: Made) -> None:
    session = sessions(host.daemon)[made.session]
    assert session.memory_max_bytes == LIMIT
    told = Counter[tuple[str, str]]()
    wrong = []
    for number in range(CALLS):
        asked, status, verdict = CASES[number % len(CASES)]
        tty = number // len(CASES) % 2 == 1
        code, text = host.execute(made, "agentcg-exec", *asked, tty=tty)
        if status is not None and code != status:
            wrong.append((asked, tty, code, text))
        told[asked[1], verdict] += 1
    wait_until(
        "all have ended", lambda: sessions(host.daemon)[made.session].calls_ended == CALLS, 60
    )
    request = pb.ListReportsRequest(session_id=made.session, limit=CALLS)
    reports = list(host.daemon.admin.ListReports(request).reports)
    found = Counter((report.name, pb.Verdict.Name(report.verdict)) for report in reports)
    print(f"{made.way}: {CALLS} calls, {dict(found)}")
    assert wrong == []
    assert found == told
    for report in reports:
        if report.name == "memory":
            assert report.grant.memory_max_bytes == 12 * MIB
            assert report.oom_kills >= 1
        if report.name == "pids":
            assert report.grant.pids_max == 4 and report.pids_max_events >= 1
            assert report.pids_peak <= 4
        if report.name == "status":
            assert report.exit_code == 3
    assert host.runs(made), "a call was killed, and its container with it"


def test_whoever_says_nothing_is_the_agent(host: Host, made: Made) -> None:
    for tty in (False, True):
        for what, status in (("::/agent$", 0), ("::/call-", 1)):
            code, _ = host.execute(made, "grep", "-q", what, "/proc/self/cgroup", tty=tty)
            assert code == status, (what, tty)


def test_what_its_runtime_tells_of_a_call_that_was_killed(host: Host, made: Made) -> None:
    asked, _, _ = CASES[2]
    for _ in range(2):
        host.execute(made, "agentcg-exec", *asked)
    assert host.runs(made)
    print(f"{made.way}: {host.told_of_memory(made)}")
    assert host.told_of_memory(made) == OOM_TOLD[made.way]
