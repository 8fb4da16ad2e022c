"""A model on loopback that asks for one shell command and then is done, in the three protocols that
agents speak: Anthropic's messages, OpenAI's responses, Google's generateContent."""

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
    "run_shell_command": lambda command: {"command": command, "description": "scripted"},
}
"""Arguments of the agents' shell tools, by their names."""


class Model:
    """The endpoint; `told` is what it was sent after the command had run, as JSON text."""

    def __init__(self, command: str) -> None:
        self.command = command
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
                events = model.answer(self.path.split("?")[0], request)
                if isinstance(events, dict):
                    self._answer(events)
                else:
                    self._stream(events)

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
                for event in events:
                    name = f"event: {event['type']}\n" if "type" in event else ""
                    self.wfile.write(f"{name}data: {json.dumps(event)}\n\n".encode())
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
        if "enerateContent" in path:
            return self._generate(request, streamed="stream" in path)
        return {"input_tokens": 100, "totalTokens": 100}

    def _next(self, request: dict[str, Any], ran: bool, tools: list[str]) -> str | None:
        """The name of the tool to call; None: nothing more is to be done."""
        self.tools = tools or self.tools
        if ran:
            self.told.append(json.dumps(request))
            return None
        return next((name for name in tools if name in SHELL_TOOLS), None)

    def _messages(self, request: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        ran = '"tool_result"' in json.dumps(request.get("messages", []))
        tool = self._next(request, ran, [t.get("name", "") for t in request.get("tools", [])])
        block: dict[str, Any] = {"type": "text", "text": "" if tool is None else DONE}
        delta: dict[str, Any] = {"type": "text_delta", "text": DONE}
        if tool is not None:
            arguments = SHELL_TOOLS[tool](self.command)
            block = {"type": "tool_use", "id": "toolu_1", "name": tool, "input": {}}
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
        ran = any(str(item.get("type", "")).endswith("_call_output") for item in items)
        tool = self._next(request, ran, [t.get("name", "") for t in request.get("tools", [])])
        content = [{"type": "output_text", "text": DONE, "annotations": []}]
        item: dict[str, Any] = {"type": "message", "id": "m1", "role": "assistant"}
        item |= {"status": "completed", "content": content}
        if tool is not None:
            arguments = json.dumps(SHELL_TOOLS[tool](self.command))
            item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": tool}
            item |= {"arguments": arguments, "status": "completed"}
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

    def _generate(
        self, request: dict[str, Any], streamed: bool
    ) -> dict[str, Any] | list[dict[str, Any]]:
        parts = [part for c in request.get("contents", []) for part in c.get("parts", [])]
        ran = any("functionResponse" in part for part in parts)
        declared = [d for t in request.get("tools", []) for d in t.get("functionDeclarations", [])]
        tool = self._next(request, ran, [d.get("name", "") for d in declared])
        part: dict[str, Any] = {"text": DONE}
        if tool is not None:
            part = {"functionCall": {"name": tool, "args": SHELL_TOOLS[tool](self.command)}}
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
