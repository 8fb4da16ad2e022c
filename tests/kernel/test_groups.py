"""A tool that signals its process group does not take its agent along."""

from __future__ import annotations

import pytest

from tests.harness import AgentProcess, DaemonProcess

RUN = """
import asyncio, os, signal
os.setpgid(0, 0)
argv = ["sh", "-c", 'trap "" TERM; kill -TERM 0; exit 3']
how = {"run": lambda: agent.run(argv).returncode}
async def by_asyncio():
    async with agentcgroup.AsyncAgent() as other:
        return (await other.run(argv)).returncode
how["asyncio"] = lambda: asyncio.run(by_asyncio())
def by_popen():
    with agent.tool_call("x") as call:
        return call.popen(argv).wait()
how["popen"] = by_popen
result = how[way]()
"""


@pytest.mark.parametrize("way", ["run", "asyncio", "popen"])
def test_a_tool_that_signals_its_group_leaves_its_agent_alone(
    daemon: DaemonProcess, agent: AgentProcess, way: str
) -> None:
    assert agent.run(RUN, way=way) == 3
    assert agent.run("result = 'alive'") == "alive"


def test_a_group_that_was_asked_for_is_kept(daemon: DaemonProcess, agent: AgentProcess) -> None:
    code = """
import os
show = ["sh", "-c", "echo $$ $(ps -o pgid=,sid= -p $$)"]
def of(**options):
    done = agent.run(show, capture_output=True, text=True, **options)
    return [int(word) for word in done.stdout.split()]
result = (of(), of(start_new_session=True), of(preexec_fn=lambda: os.setpgid(0, 0)), os.getsid(0))
"""
    plain, session, preexec, ours = agent.run(code)
    assert plain[0] == plain[1] and plain[2] == ours
    assert session[0] == session[1] == session[2]
    assert preexec[0] == preexec[1] and preexec[2] == ours
