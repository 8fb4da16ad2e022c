"""The commands in the order of the help, each with its module and what it is for."""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "exec": ("execute", "Run a command as a tool call: agentcg exec [intent] COMMAND."),
    "status": ("status", "Show the pool with its sessions and calls, or one's own."),
    "top": ("top", "Watch who uses the pool, who is paused and why, the queue, what helps (root)."),
    "web": ("web", "Show the same in a browser, with a timeline, on loopback; read-only (root)."),
    "sessions": ("status", "List the open sessions (root)."),
    "session": (
        "session",
        "Open, adopt, change, close, list sessions, or run a command in one (root).",
    ),
    "calls": ("calls", "List the open calls: of all sessions as root, else one's own."),
    "end": ("calls", "End an open call: its processes are killed. Prints its report."),
    "pause": ("hold", "Hold an open call paused until it is resumed (root)."),
    "resume": ("hold", "Let a paused call go on (root)."),
    "report": ("calls", "Show how a call ended and what it used."),
    "history": (
        "history",
        "List ended calls, also of closed sessions: of all as root, else one's own.",
    ),
    "usage": ("history", "Sum up what ended calls took, by session, tool or day (root)."),
    "explain": ("history", "Tell what happened to a call, in order, and why."),
    "timeline": ("timeline", "Draw a session's calls over time, as SVG or a page (root)."),
    "otel": ("otel", "Send a span of OpenTelemetry for each ended call, until ^C (root)."),
    "call": ("calls", "The same in other words: call list, call end, call report."),
    "budget": ("status", "Show what is left for the session one is in."),
    "feedback": ("streams", "Show feedback about one's session. --json: one document a line."),
    "events": ("streams", "Show what happened in the pool (root). --json: one document a line."),
    "audit": ("audit", "Show the audit log (root), or check that nothing is missing from it."),
    "policy": (
        "policy",
        "Check, show, compare, simulate and reload policies; explain one's view of a call.",
    ),
    "config": ("config", "Show the daemon's configuration with all defaults, or check it."),
    "install": ("install", "Install the daemon as a service of systemd and start it (root)."),
    "uninstall": (
        "install",
        "Stop the service and remove all of it: units, configuration, audit log (root).",
    ),
    "setup": ("setup", "Make an agent tell its model what became of its tool calls."),
    "hook": ("setup", "Tell an agent's model what became of a tool call; agents run it."),
    "doctor": ("trace", "Show what this kernel can enforce, and what is missing."),
    "record": ("trace", "Write a trace of a running session (root)."),
    "replay": ("trace", "Replay traces as real processes."),
    "version": ("status", "Show the versions of command and daemon."),
    "completion": ("completion", "Print what completes this command in bash or zsh."),
    "help": ("commands", "Show the help of a command: agentcg help session run."),
}

ALIASES: dict[str, tuple[str, ...]] = {"calls": ("ps",)}
"""Other words for a command."""

GUESSES = {
    **{verb: f"session {verb}" for verb in ("run", "open", "adopt", "set", "close", "list")},
    **dict.fromkeys(("ls", "session-list"), "sessions"),
    **dict.fromkeys(("kill", "stop", "rm", "cancel"), "end"),
    **dict.fromkeys(("log", "logs"), "events"),
    **dict.fromkeys(("unpause", "continue", "thaw"), "resume"),
    **{"freeze": "pause", "stats": "usage", "why": "explain", "check": "policy check"},
    **{"simulate": "policy simulate", "update": "session set", "start": "session run"},
}
"""Commands by words of other programs, and by the second word alone."""


def summary(name: str) -> str:
    """Return what a command is for, in one sentence."""
    return COMMANDS[name][1]
