"""The real agents, at pinned versions, which know nothing of calls: each command that the scripted
model asks for is found as a call of that name, and nothing else is. Opt-in, because the packages
are large:

    make test-integrations AGENTS=1
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.agents.from_pypi import (
    CASES,
    COMMANDS,
    EDIT,
    FOUND,
    JOBS,
    STARTUP,
    Agent,
    agent_of,
)
from tests.agents.model import DONE, Model
from tests.agents.packages import FROM_NPM, command_line, from_npm, from_pypi, openhands
from tests.harness import EXEC, DaemonProcess, wait_until

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.timeout(400),
    pytest.mark.skipif("AGENTCG_AGENTS" not in os.environ, reason="set AGENTCG_AGENTS=1"),
]
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with the rules that hold without configuration."""
    running = DaemonProcess(tmp_path_factory.mktemp("d"), "[boundaries]\nenabled = true\n")
    try:
        running.start()
        yield running
    finally:
        running.close()


def _mini(program: Path, home: Path, url: str) -> Agent:
    env = {"OPENAI_API_KEY": "x", "OPENAI_API_BASE": f"{url}/v1", "OPENAI_BASE_URL": f"{url}/v1"}
    env |= {"MSWEA_CONFIGURED": "true", "MSWEA_COST_TRACKING": "ignore_errors"}
    env |= {"MSWEA_GLOBAL_CONFIG_DIR": str(home), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    options = ["-y", "-m", "openai/scripted", "-l", "0", "--exit-immediately"]
    argv = [str(program), *options, "-o", str(home / "trajectory.json"), "-t", "go"]
    return Agent(argv, env, [*FOUND, ("echo", SUBMIT)])


def prepared(name: str, home: Path, work: Path, url: str) -> Agent:
    """How an agent is run against the model at `url`."""
    if name.startswith("openhands"):
        argv, env = openhands(name.partition(": ")[2], home, work, url)
        return Agent(argv, env, JOBS)
    if name == "mini-swe-agent":
        return _mini(from_pypi(name) / "mini", home, url)
    package, _, way = name.partition(": ")
    if package in CASES:
        (home / ".bashrc").write_text(STARTUP)
        return agent_of(package, way, home, work, url)
    argv, env = command_line(name, from_npm(), home, url)
    return Agent(argv, env)


NAMES = [
    *(*FROM_NPM, "mini-swe-agent", "openhands: tmux", "openhands: subprocess"),
    *(f"{package}: {way}" for package, ways in CASES.items() for way in ways),
]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_model_asks_for_is_found_and_nothing_else(
    daemon: DaemonProcess, tmp_path: Path, name: str
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    base = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb", "LANG": "C.UTF-8"}
    base |= {"SHELL": "/bin/bash", "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    commands = (*COMMANDS, *([SUBMIT] if name == "mini-swe-agent" else []))
    with Model(*commands, says=EDIT if name == "aider-chat: edit" else DONE) as model:
        agent = prepared(name, home, work, model.url)
        spec = pb.SessionSpec(id=f"found-{name.replace(': ', '-')}")
        daemon.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
        done = subprocess.run(
            [EXEC, "--session", spec.id, "--", *agent.argv],
            env={**base, **agent.env},
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert bool(model.told) is agent.asks, (done, model.tools)
    wait_until("all calls have ended", lambda: not daemon.call_dirs(), 30)
    time.sleep(0.3)  # what ended before it could be moved is reported by its exit event
    request = pb.ListReportsRequest(session_id=spec.id, limit=500)
    reports = daemon.admin.ListReports(request).reports
    found = sorted((report.name, report.argv[-1]) for report in reports)
    # Of a pipeline in a shell that is kept, whichever was executed first; or both, where that had
    # ended before the other was executed.
    found = sorted(("ls", "ls") if each == ("wc", "-l") else each for each in found)
    if found.count(("ls", "ls")) == 2:
        found.remove(("ls", "ls"))
    assert found == sorted(agent.calls), (found, done)
