"""The adapters with the real frameworks at pinned versions, by the examples of docs/agents.md, in a
session of a real daemon. Opt-in, because of their size: make test-integrations."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import AgentProcess, DaemonProcess
from tests.integrations.preludes import PRELUDES

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build/integrations/bin/python"
ADAPTERS = ROOT / "agent_sdk/agentcgroup/integrations"
RUN = """
done = subprocess.run(argv, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
result = (done.returncode, done.stdout, done.stderr)
"""
SAID = "was ended at its timeout of 1 s"
GUARDRAIL = """
import asyncio, subprocess
from agents import Agent, Runner, function_tool
from agentcgroup.integrations.openai_agents import hear

@function_tool(tool_output_guardrails=[hear])
def shell(command: str) -> str:
    words = ["agentcg-exec", "--timeout", "1s", "--", "bash", "-c", command]
    return subprocess.run(words, capture_output=True, text=True).stdout

print(asyncio.run(Runner.run(Agent("w", model=model, tools=[shell]), "go")).to_input_list())
"""
POLICY = """
import tempfile
from pathlib import Path
from agentcgroup.integrations.langchain import AgentcgroupExecutionPolicy

policy = AgentcgroupExecutionPolicy(intent={"memory_max": "64M", "pids_max": "50"})
shell = policy.spawn(workspace=Path(tempfile.mkdtemp()), env=env, command=["/bin/bash"])
print(shell.communicate("cat /proc/self/cgroup; exit 3")[0], shell.returncode)
"""

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.skipif(not PYTHON.exists(), reason="make test-integrations installs what it needs"),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    running = DaemonProcess(tmp_path_factory.mktemp("d"), "[bpf]\nenabled = false\n")
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def agent(daemon: DaemonProcess) -> AgentProcess:
    return daemon.open("alpha")


def run(agent: AgentProcess, adapter: str, code: str) -> str:
    """Run code behind its prelude inside the session; returns what it printed."""
    path = f"{os.environ['PATH']}:{PYTHON.parent}"
    argv = ["env", f"PATH={path}", str(PYTHON), "-c", PRELUDES[adapter] + code]
    status, out, error = agent.run(RUN, argv=argv)
    assert status == 0, error[-3000:]
    return str(out)


def examples() -> dict[str, str]:
    """The examples of the page, by the adapter that they are of."""
    page = (ROOT / "docs/agents.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    found = {}
    for block in blocks:
        name = re.search(r"agentcgroup\.integrations\.(\w+)", block)
        assert name is not None, block
        found[name[1]] = block
    return found


def test_each_adapter_is_small_and_has_an_example_of_some_ten_lines() -> None:
    adapters = {path.stem: path for path in ADAPTERS.glob("[!_]*.py")}
    assert adapters.keys() == examples().keys() == PRELUDES.keys()
    for name, path in adapters.items():
        assert len(path.read_text().split("\n")) <= 61, name
        lines = [line for line in examples()[name].split("\n") if line]
        assert len(lines) <= 15, name


@pytest.mark.parametrize("adapter", PRELUDES)
def test_the_example_of_the_page_tells_what_became_of_its_command(
    agent: AgentProcess, adapter: str
) -> None:
    out = run(agent, adapter, examples()[adapter])
    assert SAID in out and "begun" in out, out


def test_a_guardrail_adds_to_a_tools_output(agent: AgentProcess) -> None:
    out = run(agent, "openai_agents", GUARDRAIL)
    assert SAID in out and "begun" in out, out


def test_the_shell_tools_shell_is_a_call(agent: AgentProcess) -> None:
    out = run(agent, "langchain", POLICY)
    assert "/call-" in out and out.endswith("3\n"), out


def test_the_pinned_versions_are_installed() -> None:
    lines = (ROOT / "tests/integrations/requirements.txt").read_text().split("\n")
    wanted = {line for line in lines if line and not line.startswith("#")}
    command = [str(PYTHON), "-m", "pip", "freeze"]
    found = set(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    )
    assert wanted <= found
