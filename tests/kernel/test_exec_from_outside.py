"""Programs that are executed in a session from outside it, as a container's runtime does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import EXEC, DaemonProcess, wait_until

pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("lifecycle_program")]

ALL_RULES = "[boundaries]\nenabled = true\n"


@pytest.fixture(scope="module")
def daemon(start_module_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with the rules that hold without configuration."""
    return start_module_daemon(ALL_RULES)


@pytest.fixture(params=["yes", "no", ""])
def answer(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[str]:
    """Whether the open session says that an exec from outside is a call; empty: nothing."""
    spec = pb.SessionSpec(id="box", exec_is_call=request.param)
    session = daemon.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
    assert session.exec_is_call is (request.param == "yes")
    yield str(request.param)
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="box"))


def execute(daemon: DaemonProcess, *argv: str, **env: str) -> str:
    """Execute a program in the session as a runtime does that moves a process there first."""
    leaf = daemon.cgroup_dir / "box/agent/cgroup.procs"
    enter = f'echo $$ > {leaf}; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", enter, "sh", *argv],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def reports(daemon: DaemonProcess) -> list[pb.Report]:
    """Reports of the session, oldest first, when all calls have ended."""
    wait_until("all calls have ended", lambda: not daemon.call_dirs())
    request = pb.ListReportsRequest(session_id="box", limit=100)
    return list(reversed(daemon.admin.ListReports(request).reports))


def test_it_is_a_call_where_the_session_says_so(daemon: DaemonProcess, answer: str) -> None:
    execute(daemon, "sleep", "0.2")
    execute(daemon, "bash", "-c", "cd / && sleep 0.2; exit 0")
    found = [(report.name, list(report.argv)) for report in reports(daemon)]
    both = [("sleep", ["sleep", "0.2"]), ("sleep", ["bash", "-c", "cd / && sleep 0.2; exit 0"])]
    assert found == (both if answer == "yes" else [])


def test_its_environment_says_what_it_may_use(daemon: DaemonProcess, answer: str) -> None:
    said = {
        "AGENTCG_CALL_NAME": "tests",
        "AGENTCG_CALL_MEMORY_MAX": "64M",
        "AGENTCG_CALL_TIMEOUT": "1h",
        "AGENTCG_CALL_PRIORITY": "20",
    }
    out = execute(daemon, "sh", "-c", "sleep 0.2; grep 0:: /proc/self/cgroup", **said)
    if answer != "yes":
        assert "/agent" in out and not reports(daemon)
        return
    (report,) = reports(daemon)
    assert f"/call-{report.call_id}" in out
    grant = report.grant
    assert (report.name, report.observed) == ("tests", True)
    assert (grant.memory_max_bytes, grant.timeout_usec) == (64 << 20, 3_600_000_000)
    assert (grant.priority, grant.leftovers) == (20, "keep")


def test_what_makes_no_sense_is_told_and_ignored(daemon: DaemonProcess) -> None:
    spec = pb.SessionSpec(id="box", exec_is_call="yes")
    daemon.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
    execute(daemon, "sleep", "0.2", AGENTCG_CALL_MEMORY_MAX="much", AGENTCG_CALL_NAME="x")
    (report,) = reports(daemon)
    assert report.name == "sleep" and not report.grant.HasField("memory_max_bytes")
    refused = [line for line in daemon.audit_lines() if '"call_refused"' in line]
    assert any("memory_max: 'much' cannot be used" in line for line in refused)
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="box"))


def test_what_a_runtimes_helper_forks_there_is_from_outside(
    daemon: DaemonProcess, answer: str, tmp_path: Path
) -> None:
    """A runtime that starts a helper in the leaf, which forks the process that executes the
    program (CLONE_INTO_CGROUP)."""
    helper = tmp_path / "runc"
    shutil.copy(shutil.which("dash") or "/bin/sh", helper)
    execute(daemon, str(helper), "-c", "sleep 0.2; true")
    execute(daemon, str(helper), "-c", "bash -c 'sleep 0.2; true'; true")
    assert len(reports(daemon)) == (2 if answer == "yes" else 0)


def test_the_agent_itself_is_none(daemon: DaemonProcess, answer: str) -> None:
    environment = {**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    argv = [EXEC, "--session=box", "--", "sh", "-c", "sleep 0.2; cat /proc/self/cgroup"]
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert "/box/agent" in done.stdout
    assert not reports(daemon)
    assert answer in ("yes", "no", "")


def test_it_can_be_changed(daemon: DaemonProcess, answer: str) -> None:
    for now in ("yes", "no"):
        spec = pb.SessionSpec(id="box", exec_is_call=now)
        session = daemon.admin.UpdateSession(pb.UpdateSessionRequest(spec=spec))
        assert session.exec_is_call is (now == "yes")
    execute(daemon, "sleep", "0.1")
    assert not reports(daemon)
