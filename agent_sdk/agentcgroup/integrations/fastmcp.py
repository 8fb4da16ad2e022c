"""FastMCP: a middleware for servers whose tools run commands."""

from __future__ import annotations

import asyncio
from typing import Any

from fastmcp.server.middleware import Middleware
from mcp.types import TextContent

from agentcgroup.telling import Telling


class AgentcgroupMiddleware(Middleware):  # type: ignore[misc]
    """Adds to a tool's result what the model should know of its calls:
    `server.add_middleware(AgentcgroupMiddleware())`."""

    async def on_call_tool(self, context: Any, call_next: Any) -> Any:
        """Run a tool and tell of it."""
        with Telling(context.message.arguments) as telling:
            result = await call_next(context)
        said = await asyncio.to_thread(telling.text)
        if said:
            result.content = [*result.content, TextContent(type="text", text=said)]
        return result
