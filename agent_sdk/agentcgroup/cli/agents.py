"""Settings of agents that make them run our hook: where they are, and what is put there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentcgroup import errors

OURS = re.compile(r"(?:^|[\s/'\"])agentcg(?:-hook| hook) ")
"""Words in a hook's command by which it is told to be ours, wherever it is installed."""
BEGIN, END = "# agentcgroup: begin", "# agentcgroup: end"
_TIMEOUT_S = 10
_BASH = "Bash|mcp__.*"

Scope = str
SCOPES = ("managed", "user", "project")


class CannotSetUp(errors.AgentcgError):
    """Settings that are not written, and why."""


@dataclass(frozen=True)
class Settings:
    """A settings file of an agent. `write` gives its new text from the old one, with our hook or
    without it; raises CannotSetUp."""

    path: Path
    write: Callable[[str, bool], str]
    note: str = ""
    """Words for the user once it is written."""


def settings_of(agent: str, scope: Scope, front: Path, home: Path, project: Path) -> Settings:
    """Find an agent's settings file. `front`: the command `agentcg` that the hook is to be run by.
    Raises CannotSetUp."""
    base = {"managed": Path("/etc"), "user": home, "project": project}[scope]
    command = f"{shlex.quote(str(front))} hook {_DIALECTS.get(agent, agent)}"
    return _FINDERS[agent](scope, base, command)


_DIALECTS = {"opencode": "claude"}


# JSON, as most have it


def _json(entries: dict[str, list[dict[str, Any]]]) -> Callable[[str, bool], str]:
    """Make the writer of a JSON file whose key `hooks` holds a list of entries for each event."""

    def write(text: str, wanted: bool) -> str:
        settings = _read(text)
        hooks = settings.get("hooks", {})
        if not isinstance(hooks, dict) or not all(isinstance(v, list) for v in hooks.values()):
            raise CannotSetUp("its key 'hooks' is no object of lists")
        kept = {event: _others(found) for event, found in hooks.items()}
        if wanted:
            for event, ours in entries.items():
                kept[event] = [*kept.get(event, []), *ours]
        emptied = {event for event in hooks if hooks[event] and not kept[event]}
        kept = {event: found for event, found in kept.items() if event not in emptied}
        if kept == hooks:
            return text
        rest = {name: value for name, value in settings.items() if name != "hooks"}
        # In the place where it was: a diff shows what is new, and nothing else.
        new = {name: kept if name == "hooks" else value for name, value in settings.items()}
        new = (new if "hooks" in settings else {**new, "hooks": kept}) if kept else rest
        return json.dumps(new, indent=_indent(text), ensure_ascii=False) + "\n" if new else ""

    return write


def _read(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise CannotSetUp(f"it is no JSON that can be kept as it is: {error}") from None
    if not isinstance(settings, dict):
        raise CannotSetUp("it is no JSON object")
    return settings


def _others(entries: list[Any]) -> list[Any]:
    """Return the entries of an event without our hook."""
    found = []
    for entry in entries:
        hooks = entry.get("hooks") if isinstance(entry, dict) else None
        if isinstance(hooks, list) and any(map(_is_ours, hooks)):
            hooks = [hook for hook in hooks if not _is_ours(hook)]
            if not hooks:
                continue
            entry = {**entry, "hooks": hooks}
        found.append(entry)
    return found


def _is_ours(hook: object) -> bool:
    return isinstance(hook, dict) and bool(OURS.search(str(hook.get("command", ""))))


def _indent(text: str) -> int | str:
    found = re.search(r"^\{\s*?\n([ \t]+)\"", text)
    if found is None:
        return 2
    return "\t" if "\t" in found[1] else len(found[1])


def _claude(scope: Scope, base: Path, command: str) -> Settings:
    where = "claude-code/managed-settings.json" if scope == "managed" else ".claude/settings.json"
    hook = {"type": "command", "command": command, "timeout": _TIMEOUT_S}
    entry = {"matcher": _BASH, "hooks": [hook]}
    return Settings(base / where, _json({"PostToolUse": [entry], "PostToolUseFailure": [entry]}))


def _codex(scope: Scope, base: Path, command: str) -> Settings:
    hook = {"type": "command", "command": command, "timeout": _TIMEOUT_S}
    if scope == "managed":
        lines = ["[[hooks.PostToolUse]]", f"matcher = {json.dumps(_BASH)}"]
        lines += ["[[hooks.PostToolUse.hooks]]", 'type = "command"']
        lines += [f"command = {json.dumps(command)}", f"timeout = {_TIMEOUT_S}"]
        return Settings(base / "codex/requirements.toml", _block("\n".join(lines)))
    note = "Codex asks once whether you trust the hook: `/hooks` in Codex."
    entries = {"PostToolUse": [{"matcher": _BASH, "hooks": [hook]}]}
    return Settings(base / ".codex/hooks.json", _json(entries), note)


def _gemini(scope: Scope, base: Path, command: str) -> Settings:
    where = "gemini-cli/settings.json" if scope == "managed" else ".gemini/settings.json"
    hook: dict[str, Any] = {"type": "command", "name": "agentcgroup", "command": command}
    hook["timeout"] = 1000 * _TIMEOUT_S
    entries = {"AfterTool": [{"matcher": "run_shell_command", "hooks": [hook]}]}
    return Settings(base / where, _json(entries))


def _openhands(scope: Scope, base: Path, command: str) -> Settings:
    if scope == "managed":
        raise CannotSetUp("OpenHands has no managed hooks; use --user or --project")
    hook = {"type": "command", "command": command, "timeout": _TIMEOUT_S}
    entry = {"matcher": "*", "hooks": [hook]}
    entries = {"Stop": [entry], "UserPromptSubmit": [entry]}
    note = (
        "OpenHands passes nothing on to the model after a tool: it hears what there is to tell "
        "with your next message, or before it stops."
    )
    return Settings(base / ".openhands/hooks.json", _json(entries), note)


# Files that are ours, or have a part that is


def _block(lines: str) -> Callable[[str, bool], str]:
    """Make the writer of a file with a part between two comments."""

    def write(text: str, wanted: bool) -> str:
        ours = re.compile(rf"\n?^{BEGIN}$.*?^{END}$\n", re.M | re.S)
        kept = ours.sub("", text)
        if not wanted:
            return kept
        return f"{kept}{chr(10) if kept else ''}{BEGIN}\n{lines}\n{END}\n"

    return write


def _opencode(scope: Scope, base: Path, command: str) -> Settings:
    if scope == "managed":
        raise CannotSetUp("opencode has no managed plugins; use --user or --project")
    where = ".config/opencode/plugins" if scope == "user" else ".opencode/plugins"
    program, *arguments = shlex.split(command)
    source = _PLUGIN % {"program": json.dumps(program), "arguments": json.dumps(arguments)}

    def write(text: str, wanted: bool) -> str:
        if text and not text.startswith(_PLUGIN_HEAD):
            raise CannotSetUp("it is a plugin of somebody else's")
        return source if wanted else ""

    return Settings(base / where / "agentcgroup.js", write)


_PLUGIN_HEAD = "// Written by `agentcg setup opencode`."
_PLUGIN = (
    _PLUGIN_HEAD
    + """ After a shell command the model is told what became
// of it, where there is something to tell.
import { spawn } from "node:child_process"

const commands = new Map()

const told = (event) =>
  new Promise((resolve) => {
    const hook = spawn(%(program)s, %(arguments)s, { stdio: ["pipe", "pipe", "ignore"] })
    let text = ""
    hook.on("error", () => resolve(""))
    hook.stdin.on("error", () => {})
    hook.stdout.on("data", (data) => (text += data))
    hook.on("close", () => {
      try {
        resolve(text ? JSON.parse(text).hookSpecificOutput.additionalContext : "")
      } catch {
        resolve("")
      }
    })
    hook.stdin.end(JSON.stringify(event))
  })

export const Agentcgroup = async ({ directory }) => ({
  "tool.execute.before": async (input, output) => {
    if (output.args?.command) commands.set(input.callID, String(output.args.command))
  },
  "tool.execute.after": async (input, output) => {
    const command = commands.get(input.callID)
    commands.delete(input.callID)
    if (command === undefined) return
    const said = await told({
      hook_event_name: "PostToolUse",
      tool_name: input.tool,
      tool_use_id: input.callID,
      tool_input: { command },
      cwd: directory,
    })
    if (said) output.output = `${output.output ?? ""}\\n${said}`
  },
})
"""
)

_FINDERS: dict[str, Callable[[Scope, Path, str], Settings]] = {
    "claude": _claude,
    "codex": _codex,
    "gemini": _gemini,
    "opencode": _opencode,
    "openhands": _openhands,
}
AGENTS = tuple(_FINDERS)
HOOKED = tuple(agent for agent in AGENTS if agent not in _DIALECTS)
"""What `agentcg hook` takes: agents whose hooks have a dialect of their own, as in
exec/agentcg-hook.c."""
