"""A server of MCP, with the tools `budget`, `declare`, `report` and `feedback`:
`python -m agentcgroup.integrations.mcp_server`, started by an agent in its session."""

from __future__ import annotations

import subprocess
from typing import Any

from mcp.server.mcpserver import MCPServer

import agentcgroup
from agentcgroup.told import told

server = MCPServer("agentcgroup")
PIPES: dict[str, Any] = {
    "stdin": subprocess.DEVNULL,
    "capture_output": True,
    "text": True,
    "errors": "replace",
}


@server.tool()  # type: ignore[untyped-decorator]
async def budget() -> str:
    """Say how much memory, CPU and how many calls are left for this session now."""
    async with agentcgroup.AsyncAgent() as agent:
        return (await agent.budget()).sentence


@server.tool()  # type: ignore[untyped-decorator]
async def declare(
    command: str, memory: str = "", memory_max: str = "", cpu_max: str = "", timeout: str = ""
) -> str:
    """Run a shell command that says what it needs (512M, 2G, 1.5, 90s); it may wait for room."""
    asked = {"memory": memory, "memory_max": memory_max, "cpu_max": cpu_max}
    intent = PIPES | {name: value for name, value in asked.items() if value}
    async with agentcgroup.AsyncAgent() as agent:
        done = await agent.run(["sh", "-c", command], call_timeout=timeout or None, **intent)
    ended = f"exit status {done.returncode}"
    return "\n".join(filter(None, (done.stdout, done.stderr, ended, done.told)))


@server.tool()  # type: ignore[untyped-decorator]
async def report(call_id: str = "") -> str:
    """Say how a call ended and what to try next; without an id, the newest one."""
    async with agentcgroup.AsyncAgent() as agent:
        r = await agent.report(call_id or None)
    return f"{r.name} ({r.call_id}): {told(r) or r.sentence}"


@server.tool()  # type: ignore[untyped-decorator]
async def feedback() -> str:
    """List what was said of the last calls of this session, newest first."""
    async with agentcgroup.AsyncAgent() as agent:
        said = [f"{r.name} ({r.call_id}): {told(r)}" for r in await agent.reports() if told(r)]
    return "\n".join(said) or "The last calls went as they should."


if __name__ == "__main__":
    server.run("stdio")
