"""What agents say to their hooks, and what they make of a command: fields and shapes that Claude
Code 2.1.332, Codex 0.171.0, Gemini CLI 0.61.0 and OpenHands 1.58 were seen to use."""

from __future__ import annotations

import json
import shlex
from typing import Any

AGENTS = ("claude", "codex", "gemini")
"""Agents whose models hear something right after a tool."""


def after_tool(
    agent: str, command: str, tool_use_id: str = "toolu_1", *, failed: bool = False, cwd: str = "/"
) -> dict[str, Any]:
    """The input of the hook that an agent runs after its shell tool."""
    said: dict[str, Any] = {"session_id": "s-1", "transcript_path": "/t.jsonl", "cwd": cwd}
    if agent == "claude":
        said |= {"permission_mode": "default", "tool_use_id": tool_use_id, "duration_ms": 72}
        said["tool_input"] = {"command": command, "description": "what it is for"}
        said["tool_name"] = "Bash"
        if failed:
            said |= {"hook_event_name": "PostToolUseFailure", "error": "Exit code 1"}
            said["is_interrupt"] = False
        else:
            out = {"stdout": "", "stderr": "", "interrupted": False, "isImage": False}
            said |= {"hook_event_name": "PostToolUse", "tool_response": out}
    elif agent == "codex":
        said |= {"turn_id": "t-1", "model": "m", "permission_mode": "default"}
        said |= {"hook_event_name": "PostToolUse", "tool_name": "Bash", "tool_response": ""}
        said |= {"tool_input": {"command": command}, "tool_use_id": tool_use_id}
    else:
        said |= {"hook_event_name": "AfterTool", "tool_name": "run_shell_command"}
        said |= {"timestamp": "2026-11-29T03:15:56Z", "tool_input": {"command": command}}
        said["tool_response"] = {"llmContent": "", "returnDisplay": ""}
    return said


def before_tool(agent: str, command: str) -> dict[str, Any]:
    """The input of the hook before it."""
    said = after_tool(agent, command)
    for name in ("tool_response", "duration_ms"):
        said.pop(name, None)
    return {**said, "hook_event_name": "BeforeTool" if agent == "gemini" else "PreToolUse"}


def before_stop(event: str = "Stop") -> dict[str, Any]:
    """The input of a hook of OpenHands, whose model hears nothing after a tool."""
    return {"event_type": event, "session_id": "s-1", "working_dir": "/", "metadata": {}}


def wrapped(agent: str, command: str) -> list[str]:
    """The command line that an agent makes of a command."""
    quoted = shlex.quote(command)
    if agent == "claude":
        snapshot = "/home/dev/.claude/shell-snapshots/snapshot-bash-1795922799595-wibv25.sh"
        script = (
            f"source {snapshot} 2>/dev/null || true && \\builtin shopt -u extglob 2>/dev/null || "
            "true && { \\builtin unalias -- 'which'; \\builtin unset -f -- 'which'; } >/dev/null "
            "2>&1 || true && { \\builtin unalias -- 'unsetenv'; \\builtin unset -f -- 'unsetenv'; "
            f"}} >/dev/null 2>&1 || true && eval {quoted} < /dev/null && pwd -P >| /tmp/c-1eb4-cwd"
        )
    elif agent == "codex":
        script = (
            '__CODEX_SNAPSHOT_OVERRIDE_SET_0="${CODEX_PERMISSION_PROFILE+x}"\n'
            '__CODEX_SNAPSHOT_OVERRIDE_0="${CODEX_PERMISSION_PROFILE-}"\n'
            "if . '/home/dev/.codex/shell_snapshots/01.sh' >/dev/null 2>&1; then :; fi\n\n"
            f"exec '/bin/bash' -c {quoted}"
        )
    else:
        script = (
            "shopt -u promptvars nullglob extglob nocaseglob dotglob; "
            "_bgpids_file='/tmp/shell_pgrep_1.tmp'\n(\n"
            f"  trap 'jobs -p > \"$_bgpids_file\"' EXIT\n{command}\n)\n__code=$?\nexit $__code"
        )
    return ["/bin/bash", "-c", script]


def text(said: dict[str, Any]) -> str:
    """A hook's input as the agent writes it."""
    return json.dumps(said, separators=(",", ":"))
