"""OpenAI Agents SDK: a guardrail by which the model hears what became of a tool's calls, and a
shell tool whose commands are calls."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from agents import (
    FunctionTool,
    ToolGuardrailFunctionOutput,
    ToolOutputGuardrail,
    ToolOutputGuardrailData,
    function_tool,
)

import agentcgroup
from agentcgroup.telling import Telling


async def _hear(data: ToolOutputGuardrailData) -> ToolGuardrailFunctionOutput:
    try:
        arguments = json.loads(data.context.tool_arguments)
    except ValueError:
        arguments = None
    with Telling(arguments, data.context.tool_call_id) as telling:
        said = await asyncio.to_thread(telling.text)
    if not said:
        return ToolGuardrailFunctionOutput.allow()
    return ToolGuardrailFunctionOutput.reject_content(f"{data.output}\n{said}")


hear = ToolOutputGuardrail(guardrail_function=_hear, name="agentcgroup")
"""For `function_tool(tool_output_guardrails=[hear])`, of a tool with an argument `command`: the
output stays, and what the model should know is added."""


def shell_tool(agent: agentcgroup.AsyncAgent, **intent: Any) -> FunctionTool:
    """Make a tool that runs shell commands as calls with this intent."""

    @function_tool(name_override="shell")  # type: ignore[untyped-decorator]
    async def shell(command: str) -> str:
        """Run a command in bash and return its output.

        Args:
            command: the command.
        """
        options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
        result = await agent.run(["bash", "-c", command], **options, **intent)
        ended = f"exit status {result.returncode}" if result.returncode else ""
        said = f"agentcgroup: {result.told}" if result.told else ""
        parts = (result.stdout, result.stderr, ended, said)
        return "\n".join(part.rstrip("\n") for part in parts if part)

    return shell
