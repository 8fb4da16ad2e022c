"""langchain's shell tool, the real package: it keeps one shell for all that a model asks for, and
each job of that is a call. Opt-in: make test-integrations."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.features import load
from tests.harness import EXEC, DaemonProcess, wait_until
from tests.integrations.test_adapters import PYTHON

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not PYTHON.exists(), reason="make test-integrations installs what it needs"),
]
CODE = """
import sys
from langchain.agents import create_agent
from langchain.agents.middleware import HostExecutionPolicy, ShellToolMiddleware
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools, **kwargs):
        self.name = tools[0].name
        return self

commands = sys.argv[1:]
calls = [
    {"name": "shell", "args": {"command": command}, "id": f"call_{n}", "type": "tool_call"}
    for n, command in enumerate(commands)
]
messages = [AIMessage("", tool_calls=[call]) for call in calls] + [AIMessage("done")]
shell = ShellToolMiddleware(execution_policy=HostExecutionPolicy(), **options)
agent = create_agent(Scripted(messages=iter(messages)), [], middleware=[shell])
for message in agent.invoke({"messages": [("user", "go")]})["messages"]:
    print(message.content)
"""
SHELLS = {
    "bash": "",
    "bash that is interactive": 'shell_command=("/bin/bash", "--norc", "-i")',
    "sh": 'shell_command="/bin/sh"',
}
COMMANDS = [
    "cd /tmp && export LANGCHAIN_KEPT=kept",
    "sleep 0.2",
    'echo "$PWD $LANGCHAIN_KEPT"',
    "sleep 0.3 | cat | cat",
    "for n in 1 2; do sed -n 1p /proc/self/cgroup; done",
    "bash -c 'sleep 0.2; true'",
    "x=$(sleep 0.4; echo 5); exit_it() { return $x; }; exit_it",
    "sleep 0.5 & wait",
    "python3 -c 'import time; time.sleep(0.2)'",
]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_job_is_a_call(tmp_path: Path, shell: str) -> None:
    if load("lifecycle")[0] is None:
        pytest.skip("programs in the kernel see no calls here")
    daemon = DaemonProcess(tmp_path, "[boundaries]\nenabled = true\n")
    try:
        daemon.start()
        code = f"options = dict({SHELLS[shell]})\n{CODE}"
        daemon.admin.OpenSession(pb.OpenSessionRequest(spec=pb.SessionSpec(id="kept")))
        # The interpreter itself, without the scripts that version managers put before it.
        env = {"PATH": f"{PYTHON.resolve().parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            [EXEC, "--session", "kept", "--", str(PYTHON), "-c", code, *COMMANDS],
            env={**env, "AGENTCG_RUN_DIR": str(daemon.run_dir)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0 and "/tmp kept" in done.stdout, done
        wait_until("all calls have ended", lambda: not daemon.call_dirs())
        time.sleep(0.3)  # what ended before it could be moved is reported by its exit event
        request = pb.ListReportsRequest(session_id="kept", limit=500)
        reports = list(reversed(daemon.admin.ListReports(request).reports))
        names = [(report.name, report.argv[-1]) for report in reports]
        pipeline = [name for name in names if name in (("sleep", "0.3"), ("cat", "cat"))]
        assert len(pipeline) == 1, names
        assert [name for name in names if name not in pipeline] == [
            ("sleep", "0.2"),
            ("sed", "/proc/self/cgroup"),
            ("sed", "/proc/self/cgroup"),
            ("sleep", "sleep 0.2; true"),
            ("sleep", "0.4"),
            ("sleep", "0.5"),
            ("python3", "import time; time.sleep(0.2)"),
        ], names
    finally:
        daemon.close()
