"""Whom the kernel is to choose when memory ends: calls before their agent, whatever its runtime
gave it. On this kernel, without controllers."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.enforce.limits import put_call_before_agent


@pytest.fixture
def place() -> Iterator[tuple[Any, Cgroup]]:
    """A session with an agent leaf, and a call's leaf."""
    root = Cgroup.open(cgroup2_mount())
    top = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    try:
        yield SimpleNamespace(agent=top.make_child("agent")), top.make_child("call-x")
    finally:
        top.kill_and_remove(20)
        root.close()


def sleeper(cgroup: Cgroup, value: int) -> subprocess.Popen[bytes]:
    """A process in a cgroup with this oom_score_adj."""
    process = subprocess.Popen(["sleep", "60"])
    cgroup.attach(process.pid)
    try:
        adj(process).write_text(str(value))
    except PermissionError:
        process.kill()
        process.wait()
        pytest.skip("lowering oom_score_adj needs CAP_SYS_RESOURCE, which is missing here")
    return process


def adj(process: subprocess.Popen[bytes]) -> Path:
    return Path(f"/proc/{process.pid}/oom_score_adj")


@pytest.mark.parametrize(
    ("of_agent", "priority", "agent_after", "call_after"),
    [
        (-500, 50, -500, 750),
        (0, 80, 0, 600),
        (650, 80, 650, 750),
        (1000, 80, 900, 1000),
        (950, 20, 900, 1000),
    ],
)
def test_a_call_goes_before_its_agent(
    place: tuple[Any, Cgroup], of_agent: int, priority: int, agent_after: int, call_after: int
) -> None:
    session, call = place
    agent, tool = sleeper(session.agent, of_agent), sleeper(call, of_agent)
    forked_meanwhile = sleeper(call, of_agent)
    try:
        put_call_before_agent(session, call, tool.pid, priority)
        found = [int(adj(process).read_text()) for process in (agent, tool, forked_meanwhile)]
        assert found == [agent_after, call_after, call_after]
    finally:
        for process in (agent, tool, forked_meanwhile):
            process.kill()
            process.wait()
