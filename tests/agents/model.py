"""A model on loopback that asks for shell commands, one after the other, and then is done, in the
protocols that agents speak: Anthropic's messages, OpenAI's responses and chat, Google's
generateContent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DONE = "All done."
SHELL_TOOLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "Bash": lambda command: {"command": command, "description": "scripted"},
    "exec_command": lambda command: {"cmd": command},
    "shell_command": lambda command: {"command": command},
    "shell": lambda command: {"command": ["bash", "-c", command]},
    "bash": lambda command: {"command": command, "description": "scripted"},
    "terminal": lambda command: {"command": command},
    "run_shell_command": lambda command: {"command": command, "description": "scripted"},
}
"""Arguments of the agents' shell tools, by their names."""


class Model:
    """The endpoint; `told` is what it was sent after the command had run, as JSON text."""

    def __init__(self, *commands: str, says: str = DONE) -> None:
        """`says`: what it answers when nothing more is to be run, in the protocol of chat."""
        self.commands, self._says = commands, says
        self.told: list[str] = []
        self.tools: list[str] = []
        model = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                self._answer({"data": [], "models": []})

            do_HEAD = do_GET

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                try:
                    request = json.loads(self.rfile.read(length) or b"{}")
                except ValueError:
                    request = {}
                answer = model.answer(self.path.split("?")[0], request)
                if isinstance(answer, dict):
                    self._answer(answer)
                else:
                    self._stream(answer)

            def _answer(self, value: dict[str, Any]) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def _stream(self, events: list[dict[str, Any]]) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(_streamed(events))
                self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Model:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer a request of any of the protocols."""
        if path.endswith("/messages"):
            return self._messages(request)
        if path.endswith("/responses"):
            return self._responses(request)
        if path.endswith("/chat/completions"):
            return self._chat(request)
        if "enerateContent" in path:
            return self._generate(request, streamed="stream" in path)
        return {"input_tokens": 100, "totalTokens": 100}

    def _next(
        self, request: dict[str, Any], ran: int, tools: list[str]
    ) -> tuple[str, dict[str, Any]] | None:
        """The name of the tool to call, and its arguments; None: nothing more is to be done. `ran`:
        how many have run."""
        self.tools = tools or self.tools
        if ran:
            self.told.append(json.dumps(request))
        tool = next((name for name in tools if name in SHELL_TOOLS), None)
        if tool is None or ran >= len(self.commands):
            return None
        return tool, SHELL_TOOLS[tool](self.commands[ran])

    def _messages(self, request: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        ran = json.dumps(request.get("messages", [])).count('"tool_result"')
        tool = self._next(request, ran, [t.get("name", "") for t in request.get("tools", [])])
        block: dict[str, Any] = {"type": "text", "text": "" if tool is None else DONE}
        delta: dict[str, Any] = {"type": "text_delta", "text": DONE}
        if tool is not None:
            name, arguments = tool
            block = {"type": "tool_use", "id": f"toolu_{ran}", "name": name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
        usage = {"input_tokens": 100, "output_tokens": 10}
        message: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant"}
        message |= {"model": request.get("model"), "content": [], "stop_reason": None}
        message |= {"stop_sequence": None, "usage": usage}
        stop = "end_turn" if tool is None else "tool_use"
        if not request.get("stream"):
            whole = {**block, **({"text": DONE} if tool is None else {"input": arguments})}
            return {**message, "content": [whole], "stop_reason": stop}
        end = {"stop_reason": stop, "stop_sequence": None}
        return [
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": end, "usage": usage},
            {"type": "message_stop"},
        ]

    def _responses(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        items = request.get("input", [])
        ran = sum(str(item.get("type", "")).endswith("_call_output") for item in items)
        tool = self._next(request, ran, [t.get("name", "") for t in request.get("tools", [])])
        content = [{"type": "output_text", "text": DONE, "annotations": []}]
        item: dict[str, Any] = {"type": "message", "id": "m1", "role": "assistant"}
        item |= {"status": "completed", "content": content}
        if tool is not None:
            name, arguments = tool
            item = {"type": "function_call", "id": f"fc_{ran}", "call_id": f"call_{ran}"}
            item |= {"name": name, "arguments": json.dumps(arguments), "status": "completed"}
        usage: dict[str, Any] = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
        usage["input_tokens_details"] = {"cached_tokens": 0}
        usage["output_tokens_details"] = {"reasoning_tokens": 0}
        response: dict[str, Any] = {"id": "resp_1", "object": "response", "created_at": 1}
        response |= {"model": request.get("model"), "usage": usage, "tools": []}
        events: list[dict[str, Any]] = [
            {
                "type": "response.created",
                "response": {**response, "status": "in_progress", "output": []},
            },
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {
                "type": "response.completed",
                "response": {**response, "status": "completed", "output": [item]},
            },
        ]
        return [{**event, "sequence_number": n} for n, event in enumerate(events)]

    def _chat(self, request: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        ran = sum(message.get("role") == "tool" for message in request.get("messages", []))
        tools = [t.get("function", {}).get("name", "") for t in request.get("tools", [])]
        tool = self._next(request, ran, tools)
        message: dict[str, Any] = {"role": "assistant", "content": self._says}
        if tool is not None:
            function = {"name": tool[0], "arguments": json.dumps(tool[1])}
            call = {"index": 0, "id": f"call_{ran}", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop" if tool is None else "tool_calls",
        }
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        answer: dict[str, Any] = {"id": "chat_1", "created": 1, "model": request.get("model")}
        if not request.get("stream"):
            choices = [{**choice, "message": message}]
            return {**answer, "object": "chat.completion", "choices": choices, "usage": usage}
        answer["object"] = "chat.completion.chunk"
        first = {"index": 0, "delta": message, "finish_reason": None}
        return [
            {**answer, "choices": [first]},
            {**answer, "choices": [{**choice, "delta": {}}], "usage": usage},
        ]

    def _generate(
        self, request: dict[str, Any], streamed: bool
    ) -> dict[str, Any] | list[dict[str, Any]]:
        parts = [part for c in request.get("contents", []) for part in c.get("parts", [])]
        ran = sum("functionResponse" in part for part in parts)
        declared = [d for t in request.get("tools", []) for d in t.get("functionDeclarations", [])]
        tool = self._next(request, ran, [d.get("name", "") for d in declared])
        part: dict[str, Any] = {"text": DONE}
        if tool is not None:
            name, arguments = tool
            part = {"functionCall": {"name": name, "args": arguments}}
        schema = "responseJsonSchema" in request.get("generationConfig", {})
        if schema and not declared:
            choice = {"reasoning": "scripted", "next_speaker": "user", "model_choice": "pro"}
            part = {"text": json.dumps(choice)}
        content = {"role": "model", "parts": [part]}
        answer = {
            "candidates": [{"content": content, "finishReason": "STOP", "index": 0}],
            "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 2},
            "modelVersion": "scripted",
        }
        return [answer] if streamed else answer


def _streamed(events: list[dict[str, Any]]) -> bytes:
    """Events as a stream has them; chat has no names for them, but an end."""
    texts = []
    for event in events:
        name = f"event: {event['type']}\n" if "type" in event else ""
        texts.append(f"{name}data: {json.dumps(event)}\n\n")
    end = "data: [DONE]\n\n" if "object" in events[-1] else ""
    return "".join([*texts, end]).encode()
