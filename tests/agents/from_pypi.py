"""How SWE-ReX and aider, the real packages, are run without a network, in the ways in which they
start commands, and which calls are to be found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.agents.packages import from_pypi

COMMANDS = ("sleep 0.3; true", "cd / && ls | wc -l", "python3 -c 'import time; time.sleep(0.2)'")
JOBS = [("sleep", "0.3"), ("ls", "ls"), ("python3", "import time; time.sleep(0.2)")]
"""What is found of the commands in a shell that is kept."""
FOUND = [("sleep", COMMANDS[0]), ("ls", COMMANDS[1]), ("python3", COMMANDS[2])]
PATH = f"{Path(sys.base_prefix).resolve()}/bin:/usr/local/bin:/usr/bin:/bin"
"""Without programs that are scripts in front of others, as version managers have them."""
EDIT = 'f.py\n```python\nprint("hello")\n```\n'
"""What a model answers to have aider write a file, in aider's format `whole`."""
STARTUP = """
seq 3 > /dev/null
x=$(seq 3; seq 4)
eval "$(bash --norc -c 'seq 2 > /dev/null; true')"
seq 3 | cat > /dev/null
"""
"""A ~/.bashrc as version managers write theirs."""
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
SWE_REX = """
import asyncio, json, subprocess, sys, time, urllib.request
from swerex.deployment.local import LocalDeployment
from swerex.runtime.abstract import BashAction, Command, CreateBashSessionRequest

commands = [Command(command="du -s .; true", shell=True), Command(command=["sleep", "0.2"])]
session = CreateBashSessionRequest()
actions = [BashAction(command=word, timeout=20, check="silent") for word in sys.argv[2:]]

async def here():
    deployment = LocalDeployment()
    await deployment.start()
    await deployment.runtime.create_session(session)
    for action in actions:
        await deployment.runtime.run_in_session(action)
    for command in commands:
        await deployment.runtime.execute(command)
    await deployment.stop()

def post(port, path, model=None):
    body = b"" if model is None else json.dumps(model.model_dump()).encode()
    headers = {"X-API-Key": "x", "Content-Type": "application/json"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", body, headers)
    urllib.request.urlopen(asked, timeout=30).read()

def by_a_server(port):
    words = ["swerex-remote", "--host", "127.0.0.1", "--port", port, "--auth-token", "x"]
    server = subprocess.Popen(words)
    for _ in range(300):
        try:
            post(port, "create_session", session)
            break
        except OSError:
            time.sleep(0.1)
    for action in actions:
        post(port, "run_in_session", action)
    for command in commands:
        post(port, "execute", command)
    post(port, "close")
    server.terminate()
    server.wait()

by_a_server(sys.argv[1]) if sys.argv[1] != "0" else asyncio.run(here())
"""


@dataclass
class Agent:
    """How an agent is run, and which calls are to be found."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=lambda: list(FOUND))
    asks: bool = True
    """Whether it is told of its commands by asking the model for the next."""


CASES = {
    "swe-rex": ("here", "server"),
    "aider-chat": ("run", "terminal", "test", "edit"),
}
"""By package, the ways in which it starts commands."""


def agent_of(package: str, way: str, home: Path, work: Path, url: str) -> Agent:
    """Return how an agent is run in one of its ways, against the model at `url`."""
    if package == "swe-rex":
        return _swe_rex(way, home)
    return _aider(way, home, work, url)


def _swe_rex(way: str, home: Path) -> Agent:
    """Return SWE-ReX with a shell that it keeps, and with commands that it executes by themselves;
    in its own process, or by its server, as it has it in a container."""
    programs = from_pypi("swe-rex")
    port = _free_port() if way == "server" else 0
    script = home / "agent.py"
    script.write_text(SWE_REX)
    calls = [*JOBS, ("du", "du -s .; true"), ("sleep", "0.2")]
    env = {"PATH": f"{PATH}:{programs}"}
    argv = [str(programs / "python"), str(script), str(port), *COMMANDS]
    return Agent(argv, env, calls, asks=False)


def _aider(way: str, home: Path, work: Path, url: str) -> Agent:
    """Return aider with a command of its user, behind a pipe or at a terminal; with tests; and with
    a file that the model has it write, which it checks, tests and commits."""
    program = str(from_pypi("aider-chat") / "aider")
    env = {"OPENAI_API_KEY": "x", "OPENAI_API_BASE": f"{url}/v1", "AIDER_ANALYTICS": "false"}
    env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "AIDER_CHECK_UPDATE": "false", "PATH": PATH}
    argv = [program, "--model", "openai/scripted", "--yes-always", "--no-show-model-warnings"]
    if way in ("run", "terminal"):
        argv += ["--no-git", "--message", f"/run {COMMANDS[0]}"]
        if way == "terminal":
            argv = ["python3", "-c", TERMINAL, *argv]
        return Agent(argv, env, FOUND[:1], asks=False)
    git = ["git", "-C", str(work), "-c", "user.name=u", "-c", "user.email=u@localhost"]
    (work / "f.py").write_text('print("hi")\n')
    (home / ".gitconfig").write_text("[user]\n\tname = u\n\temail = u@localhost\n")
    for words in (["init", "--quiet"], ["add", "f.py"], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *words], check=True, env={**os.environ, "HOME": str(home)})
    if way == "test":
        return Agent([*argv, "--test", "--test-cmd", COMMANDS[0]], env, FOUND[:1], asks=False)
    argv += ["--edit-format", "whole", "--message", "go", "f.py"]
    argv += ["--lint-cmd", "python: sleep 0.2; true", "--auto-test", "--test-cmd", COMMANDS[2]]
    return Agent(argv, env, [("sleep", "sleep 0.2; true f.py"), FOUND[2]], asks=False)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
