"""LangChain and LangGraph: a middleware by which the model hears what became of its tools' calls,
and an execution policy for the shell tool."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain.agents.middleware import AgentMiddleware, HostExecutionPolicy
from langchain_core.messages import ToolMessage

from agentcgroup.paths import find_launcher
from agentcgroup.telling import Telling


class AgentcgroupMiddleware(AgentMiddleware):  # type: ignore[misc]
    """Appends to a tool's result what the model should know of its calls."""

    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        """Run a tool and tell of it."""
        with Telling(request.tool_call["args"], request.tool_call["id"] or "") as telling:
            result = handler(request)
        return _with(result, telling.text())

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        """Run a tool and tell of it."""
        with Telling(request.tool_call["args"], request.tool_call["id"] or "") as telling:
            result = await handler(request)
        return _with(result, await asyncio.to_thread(telling.text))


def _with(result: Any, said: str) -> Any:
    if not said or not isinstance(result, ToolMessage):
        return result
    if isinstance(result.content, str):
        return result.model_copy(update={"content": f"{result.content}\n{said}".lstrip()})
    return result.model_copy(update={"content": [*result.content, {"type": "text", "text": said}]})


@dataclass
class AgentcgroupExecutionPolicy(HostExecutionPolicy):  # type: ignore[misc]
    """Runs the shell tool's shell in a call of its own, with an intent by its fields' names."""

    intent: Mapping[str, str] = field(default_factory=dict)

    def spawn(
        self, *, workspace: Path, env: Mapping[str, str], command: Sequence[str]
    ) -> subprocess.Popen[str]:
        """Start the shell by the launcher, which becomes it."""
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self.intent.items()]
        argv = [find_launcher(), *options, "--", *command]
        process: subprocess.Popen[str] = super().spawn(workspace=workspace, env=env, command=argv)
        return process
