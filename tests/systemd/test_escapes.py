"""What a tool can do with systemd's own rights: a scope or a service that systemd starts for it is
outside of its session, for who may ask systemd for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import AgentProcess, wait_until

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
