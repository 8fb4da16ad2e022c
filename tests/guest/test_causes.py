"""Twelve causes for which a call ends badly, each told by three channels: `agentcg exec`, the SDK,
and an agent's hook. $AGENTCG_CAUSES: how often each is provoked, one channel after the other; 100
for a release, which is 1,200 runs in all."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import EXEC, AgentProcess, DaemonProcess
from tests.hook_inputs import after_tool, text

pytestmark = pytest.mark.controllers

RUNS = int(os.environ.get("AGENTCG_CAUSES", "3"))
FRONT = str(Path(EXEC).with_name("agentcg"))
LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
FAR = f"echo 1 {140 * MIB} 0 > /tmp/far; exec {LOAD} < /tmp/far"
GROW = f"echo 1 {40 * MIB} 0 > /tmp/grow; exec {LOAD} < /tmp/grow"
CHANNELS = ("exec", "sdk", "hook")

BY_EXEC = """
done = subprocess.run([front, "exec", *options, "--", "bash", "-c", command], cwd=cwd,
                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
result = " ".join(line for line in done.stderr.splitlines() if line.startswith("agentcg exec: "))
"""
BY_SDK = """
intent = {o.lstrip("-").replace("-", "_"): v for o, v in zip(options[::2], options[1::2])}
name = intent.pop("name", None)
if "timeout" in intent: intent["call_timeout"] = intent.pop("timeout")
done = agent.run(["bash", "-c", command], name=name, cwd=cwd, capture_output=True, text=True,
                 **intent)
from agentcgroup.told import told
result = told(done.report, cwd)
"""
BY_HOOK = """
import json
done = subprocess.run([front, "exec", "--quiet", *options, "--", "bash", "-c", command], cwd=cwd,
                      capture_output=True, text=True)
hook = subprocess.run([front, "hook", "claude"], input=said, capture_output=True, text=True)
out = hook.stdout
result = json.loads(out)["hookSpecificOutput"]["additionalContext"] if out else ""
"""


@dataclass(frozen=True)
class Cause:
    """A way to end badly, and what has to be told of it."""

    name: str
    command: str
    options: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    """Clauses that every channel says."""
    session: str = "own"
    in_directory: str = "/"
    never: tuple[str, ...] = ("No limit of agentcgroup",)
    """Clauses that would be wrong."""


NO_BLAME = ("Out of memory", "timeout", "refused", "paused", "agentcg exec --")
CAUSES = (
    Cause(
        "own limit",
        GROW,
        ("--memory-max", "16M"),
        ("the call reached its own limit of 16 MiB", "memory_max=32M", "would start now"),
    ),
    Cause(
        "session",
        GROW,
        ("--priority", "batch"),
        ("all of this session together reached its limit of 64 MiB", "would not fit now"),
        session="narrow",
    ),
    Cause(
        "pool",
        FAR,
        ("--priority", "batch"),
        ("all sessions together reached the pool's limit", "waits for room"),
        session="crowded",
    ),
    Cause(
        "pids",
        "for i in 1 2 3 4 5 6 7 8 9; do sleep 0.2 & done; wait; exit 2",
        ("--pids-max", "4"),
        ("the call may have 4", "pids_max="),
    ),
    Cause(
        "timeout",
        "sleep 1000",
        ("--timeout", "100ms"),
        ("was ended at its timeout of 100 ms", "timeout=1s", "Do not wait for as long"),
    ),
    Cause(
        "deny",
        "exit 1",
        ("--name", "acts-deny"),
        ("12 MiB was refused (ENOMEM)", "memory=", "for which room is kept"),
    ),
    Cause(
        "pause",
        "sleep 0.3; exit 1",
        ("--name", "acts-pause"),
        ("The call was paused for", "nothing of it was lost"),
    ),
    Cause(
        "vram",
        "exit 1",
        ("--name", "acts-vram"),
        ("2 GiB of GPU memory were refused", "smaller"),
    ),
    Cause(
        "disk",
        "dd if=/dev/zero of=file bs=64k count=64 2> /dev/null",
        (),
        ("The file system of", "is full"),
        in_directory="full",
        never=("Out of memory", "timeout"),
    ),
    Cause("the user's signal", "kill -TERM $$", (), (), never=NO_BLAME),
    Cause("own failure", "exit 3", (), (), never=NO_BLAME),
    Cause(
        "foreign kill",
        "kill -KILL $$",
        (),
        ("by whom is not known", "No limit of agentcgroup was reached", "Run it once more"),
        never=("Out of memory", "timeout", "agentcg exec --"),
    ),
)
QUIET_OF_EXEC = {"pause", "vram", "foreign kill", "own failure", "the user's signal"}
"""Causes of which `agentcg exec` says nothing, because the command ended by itself."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with a pool of 160 MiB whose guard is off: what is shown is the kernel's."""
    config = '[pool]\nmemory_max = "160M"\n[guard]\nenabled = false\n[bpf]\nenabled = false\n'
    running = DaemonProcess(tmp_path_factory.mktemp("d"), config)
    running.module, running.forks_agents = "tests.acting_daemon", False
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system with room for next to nothing."""
    path = tmp_path_factory.mktemp("full")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


Agents = Callable[[str], AgentProcess]


@pytest.fixture(scope="module")
def agents(daemon: DaemonProcess) -> Agents:
    """Agents by their session; a session is opened when it is first asked for."""
    open_now: dict[str, AgentProcess] = {}

    def agent(name: str) -> AgentProcess:
        if name not in open_now:
            limits = {"narrow": {"memory_max": "64M"}}.get(name, {})
            open_now[name] = daemon.open(name, **limits)
            if name == "narrow":
                _hold(open_now[name], 18)
            if name == "crowded":
                _hold(daemon.open("holder", priority="important"), 40)
        return open_now[name]

    return agent


HOLD = """
tool = subprocess.Popen([EXEC, "--name", "holder", "--", load], stdin=subprocess.PIPE, text=True)
tool.stdin.write(f"1 {mib << 20} 0\\n6000000 {mib << 20} 0\\n")
tool.stdin.close()
def held():
    with open(f"/proc/{tool.pid}/status") as file:
        found = [line.split()[1] for line in file if line.startswith("RssAnon")]
    return int(found[0]) if found else 0
while held() < mib << 10: time.sleep(0.05)
"""


def _hold(agent: AgentProcess, mib: int) -> None:
    """Let a more important call hold memory for as long as all of this takes."""
    agent.run(HOLD, load=LOAD, mib=mib)


def provoke(agent: AgentProcess, cause: Cause, channel: str, directory: str, run: int) -> str:
    """Provoke a cause; returns what the channel tells of it."""
    command = f"{cause.command}\n# {run}"
    code = {"exec": BY_EXEC, "sdk": BY_SDK, "hook": BY_HOOK}[channel]
    values: dict[str, Any] = {"front": FRONT, "command": command, "options": list(cause.options)}
    said = text(after_tool("claude", command, failed=True, cwd=directory))
    return str(agent.run(code, cwd=directory, said=said, **values))


def wrong(cause: Cause, channel: str, told: str) -> str:
    """What is wrong with what was told; empty: nothing."""
    expected = () if channel == "exec" and cause.name in QUIET_OF_EXEC else cause.told
    missing = [clause for clause in expected if clause not in told]
    false = [clause for clause in cause.never if clause in told]
    return f"{channel}: lacks {missing}, has {false}: {told!r}" if missing or false else ""


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.name)
def test_each_cause_is_told_for_what_it_is(agents: Agents, full: Path, cause: Cause) -> None:
    agent, results = agents(cause.session), Counter[str]()
    directory = str(full) if cause.in_directory == "full" else cause.in_directory
    for run in range(RUNS):
        channel = CHANNELS[run % len(CHANNELS)]
        results[
            wrong(cause, channel, provoke(agent, cause, channel, directory, run)) or "right"
        ] += 1
    print(f"{cause.name}: {results['right']} of {RUNS} right")
    assert results == {"right": RUNS}
