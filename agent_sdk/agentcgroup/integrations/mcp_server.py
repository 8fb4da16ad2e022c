"""A server of MCP, with the tools `budget`, `declare`, `report` and `feedback`:
`python -m agentcgroup.integrations.mcp_server`, started by an agent in its session."""

from __future__ import annotations

import asyncio

from mcp.server.mcpserver import MCPServer

import agentcgroup
from agentcgroup.told import told

server = MCPServer("agentcgroup")


@server.tool()  # type: ignore[untyped-decorator]
async def budget() -> str:
    """Say how much memory, CPU and how many calls are left for this session now."""
    async with agentcgroup.AsyncAgent() as agent:
        return (await agent.budget()).sentence


@server.tool()  # type: ignore[untyped-decorator]
async def declare(
    command: str, memory: str = "", memory_max: str = "", cpu_max: str = "", timeout: str = ""
) -> str:
    """Run a shell command that says what it needs: `memory` it expects (512M), `memory_max` it may
    reach (2G), `cpu_max` in cores (1.5), `timeout` (90s). It waits for room where it has to."""
    asked = {"memory": memory, "memory_max": memory_max, "cpu_max": cpu_max}
    intent = {name: value for name, value in asked.items() if value}
    async with agentcgroup.AsyncAgent() as agent:
        result = await agent.run(
            ["bash", "-c", command],
            call_timeout=timeout or None,
            stdin=asyncio.subprocess.DEVNULL,
            **{"capture_output": True, "text": True, "errors": "replace"},
            **intent,
        )
    ended = f"exit status {result.returncode}"
    return "\n".join(filter(None, (result.stdout, result.stderr, ended, result.told)))


@server.tool()  # type: ignore[untyped-decorator]
async def report(call_id: str = "") -> str:
    """Say how a call ended and what to try next; without an id, the newest one."""
    async with agentcgroup.AsyncAgent() as agent:
        found = await agent.report(call_id or None)
    return f"{found.name} ({found.call_id}): {told(found) or found.sentence}"


@server.tool()  # type: ignore[untyped-decorator]
async def feedback() -> str:
    """List what was said of the last calls of this session, newest first."""
    async with agentcgroup.AsyncAgent() as agent:
        said = [f"{r.name} ({r.call_id}): {told(r)}" for r in await agent.reports() if told(r)]
    return "\n".join(said) or "The last calls went as they should."


if __name__ == "__main__":
    server.run("stdio")
