"""pydantic-ai: a capability by which the model hears what became of its tools' calls."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic_ai.capabilities import AbstractCapability

from agentcgroup.telling import Telling


class Agentcgroup(AbstractCapability[Any]):  # type: ignore[misc]
    """Adds to a tool's result what the model should know of its calls:
    `Agent(capabilities=[Agentcgroup()])`. Text is added to text; anything else goes with it as
    `result` and `agentcgroup`."""

    async def wrap_tool_execute(
        self, ctx: Any, *, call: Any, tool_def: Any, args: Any, handler: Any
    ) -> Any:
        """Run a tool and tell of it."""
        with Telling(args, call.tool_call_id) as telling:
            result = await handler(args)
        said = await asyncio.to_thread(telling.text)
        if not said:
            return result
        if isinstance(result, str):
            return f"{result}\n{said}".lstrip()
        return {"result": result, "agentcgroup": said}
