"""What a tool can do with systemd's own rights: a scope or a service that systemd starts for it is
outside of its session, for who may ask systemd for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from tests.harness import AgentProcess, wait_until
from tests.systemd.service import MANAGER, SYSTEMD_RUN_USER

pytestmark = pytest.mark.usefixtures("installed")

RUN = """
done = subprocess.run([EXEC, "--name", name, "--", *argv], capture_output=True, text=True)
result = (done.returncode, done.stdout, done.stderr)
"""
SHOW = ["sh", "-c", "cat /proc/self/cgroup; sleep 1"]
AUDIT = Path("/var/log/agentcgroup/audit.jsonl")


def ask(agent: AgentProcess, name: str, *argv: str) -> tuple[int, str, str]:
    status, out, error = agent.run(RUN, name=name, argv=[*argv, *SHOW])
    return int(status), str(out), str(error)


def test_a_scope_takes_the_process_out_of_its_call_which_is_told(agent: AgentProcess) -> None:
    status, out, error = ask(agent, "scoped", "systemd-run", "--scope", "--quiet")
    assert (status, error) == (0, "")
    assert ".scope" in out and "agentcg" not in out
    wait_until("the log has it", lambda: '"left_call"' in AUDIT.read_text())


def test_a_service_never_was_in_the_session(agent: AgentProcess) -> None:
    status, out, error = ask(agent, "served", "systemd-run", "--wait", "--pipe", "--quiet")
    assert (status, error) == (0, "")
    assert ".service" in out and "agentcg" not in out


@pytest.mark.parametrize("options", [["--scope"], ["--wait", "--pipe"], ["--user", "--scope"]])
def test_who_has_no_rights_is_refused_either(agent: AgentProcess, options: list[str]) -> None:
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    status, out, _ = ask(agent, "refused", *nobody, "systemd-run", "--quiet", *options)
    assert status != 0 and out == ""


def left(admin: pb_grpc.AdminStub, name: str) -> str:
    """The sentence of the newest report of that name, when there is one."""

    def found() -> list[str]:
        request = pb.ListReportsRequest(session_id="alpha", limit=50)
        reports = admin.ListReports(request).reports
        return [report.sentence for report in reports if report.name == name]

    wait_until("it is reported", lambda: bool(found()))
    return found()[0]


@pytest.mark.usefixtures("manager")
def test_who_has_a_user_manager_gets_a_scope_of_it_which_is_told(
    agent: AgentProcess, admin: pb_grpc.AdminStub
) -> None:
    status, out, error = ask(agent, "mine", *SYSTEMD_RUN_USER, "--scope")
    assert (status, error) == (0, "")
    assert f"/{MANAGER}/app.slice/run-" in out
    sentence = left(admin, "mine")
    assert "left the call's cgroup for" in sentence and f"/{MANAGER}/app.slice/run-" in sentence
    assert agent.run("result = 1 + 1") == 2


@pytest.mark.usefixtures("manager")
def test_a_service_of_the_user_manager_never_was_in_the_session(
    agent: AgentProcess, admin: pb_grpc.AdminStub
) -> None:
    status, out, error = ask(agent, "theirs", *SYSTEMD_RUN_USER, "--wait", "--pipe")
    assert (status, error) == (0, "")
    assert f"/{MANAGER}/app.slice/run-u" in out and "agentcg" not in out
    assert left(admin, "theirs") == "It ended well."
    assert agent.run("result = 1 + 1") == 2
