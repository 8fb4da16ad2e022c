"""Models that ask for one command and then are done, one for each framework: what stands before the
examples of docs/agents.md when a test runs them."""

from __future__ import annotations

COMMAND = "echo begun; sleep 1000"
_COMMON = f"import os\ncommand = {COMMAND!r}\nenv = dict(os.environ)\n"

LANGCHAIN = """
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools, **kwargs):
        return self

call = {"name": "shell", "args": {"command": command}, "id": "call_1", "type": "tool_call"}
model = Scripted(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("done")]))
"""
OPENAI_AGENTS = """
import json
from agents import ModelResponse, Usage, set_tracing_disabled
from agents.models.interface import Model
from openai.types.responses import (
    ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText,
)

set_tracing_disabled(True)

class Scripted(Model):
    asked = False

    async def get_response(self, *args, **kwargs):
        if self.asked:
            text = ResponseOutputText(text="done", type="output_text", annotations=[])
            item = ResponseOutputMessage(
                id="m", content=[text], role="assistant", status="completed", type="message")
        else:
            item = ResponseFunctionToolCall(
                arguments=json.dumps({"command": command}), call_id="call_1", name="shell",
                type="function_call")
        self.asked = True
        return ModelResponse(output=[item], usage=Usage(), response_id=None)

    def stream_response(self, *args, **kwargs):
        raise NotImplementedError("the examples do not stream")

model = Scripted()
"""
PYDANTIC_AI = """
from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel

def answer(messages, info):
    if len(messages) > 1:
        return ModelResponse([TextPart("done")])
    return ModelResponse([ToolCallPart("shell", {"command": command})])

model = FunctionModel(answer)
"""
PRELUDES = {
    "langchain": _COMMON + LANGCHAIN,
    "openai_agents": _COMMON + OPENAI_AGENTS,
    "pydantic_ai": _COMMON + PYDANTIC_AI,
    "mcp_server": _COMMON,
    "fastmcp": _COMMON,
}
