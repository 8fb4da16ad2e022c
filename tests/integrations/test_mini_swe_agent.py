"""mini-swe-agent, the real package, whose commands are run by `agentcg-sh` (its setting `shell`): the
page's own line. Opt-in: make test-integrations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import EXEC, AgentProcess
from tests.integrations.test_adapters import PYTHON, RUN, agent, daemon

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.skipif(not PYTHON.exists(), reason="make test-integrations installs what it needs"),
]
SHIM = str(Path(EXEC).with_name("agentcg-sh"))
CODE = """
import sys
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.test_models import DeterministicModel, make_output

commands = [
    {"command": "cat /proc/self/cgroup; exit 3"},
    {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo done"},
]
model = DeterministicModel(outputs=[make_output("", [command]) for command in commands])
env = LocalEnvironment(shell=sys.argv[1])
agent = DefaultAgent(model, env, system_template="s", instance_template="{{task}}")
print(agent.run("go"))
print(agent.messages)
"""

__all__ = ["agent", "daemon"]


def test_its_commands_are_calls(agent: AgentProcess) -> None:
    argv = ["env", "MSWEA_SILENT_STARTUP=1", str(PYTHON), "-c", CODE, SHIM]
    status, out, error = agent.run(RUN, argv=argv)
    assert status == 0, error[-3000:]
    assert "/call-" in out and "returncode" in out, out[-3000:]
