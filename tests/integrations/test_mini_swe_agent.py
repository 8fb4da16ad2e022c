"""mini-swe-agent, the real package: the daemon sees its commands, which it runs by sh -c, and
finds what they were. Opt-in: make test-integrations."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.features import load
from tests.harness import DaemonProcess, wait_until
from tests.integrations.test_adapters import PYTHON, RUN

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not PYTHON.exists(), reason="make test-integrations installs what it needs"),
]
CODE = """
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.test_models import DeterministicModel, make_output

commands = [
    {"command": "sleep 0.7; exit 3"},
    {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo done"},
]
model = DeterministicModel(outputs=[make_output("", [command]) for command in commands])
templates = {"system_template": "s", "instance_template": "{{task}}"}
agent = DefaultAgent(model, LocalEnvironment(), **templates)
print(agent.run("go"))
"""


def test_its_commands_are_calls(tmp_path: Path) -> None:
    if load("lifecycle")[0] is None:
        pytest.skip("programs in the kernel see no calls here")
    daemon = DaemonProcess(tmp_path)
    try:
        daemon.start()
        argv = ["env", "MSWEA_SILENT_STARTUP=1", str(PYTHON), "-c", CODE]
        status, out, error = daemon.open("mini").run(RUN, argv=argv)
        assert status == 0 and "Submitted" in out, (out, error[-3000:])
        wait_until("all calls have ended", lambda: not daemon.call_dirs())
        reports = daemon.admin.ListReports(pb.ListReportsRequest(session_id="mini")).reports
        found = {report.command: report.exit_code for report in reports}
        assert found["sleep 0.7; exit 3"] == 3, found
    finally:
        daemon.close()
