"""Which programs begin a call when nobody declares one: the rules, and those that hold without any.

The rules without configuration know how agents start tools, and what they run for themselves: the
recorded command lines of Claude Code, Codex, Gemini CLI, OpenHands and SWE-ReX are in
tests/unit/boundaries/agents.json.
"""

from __future__ import annotations

from typing import Any

from agentcgroupd.config_values import ArgumentsGlob, Flag, ProgramGlob, Section

SHELLS = ("sh", "bash", "dash", "zsh", "ash", "ksh")


class BoundaryRule(Section):
    """Which programs begin a call when an agent's own process starts them."""

    program: tuple[ProgramGlob, ...]
    """Globs on the program's name as in /proc/<pid>/comm: its first 15 characters."""
    first_argument: str = "*"
    """Glob on the first argument; an empty one where there is none."""
    command_line: ArgumentsGlob = "*"
    """Glob on all arguments, from the program's name on, with blanks between them."""
    parent: tuple[ProgramGlob, ...] = ("*",)
    """Globs on the name of the process that started it, as `program`."""
    runs: ArgumentsGlob = "*"
    """Glob on what the call would be called: for a shell what its script is run for."""
    shell_command: Flag = False
    """Only with a command for a shell: `-c`, also among other options (`-lc`, `-o pipefail -c`)."""
    reads_commands: Flag = False
    """Only what runs a shell that reads its commands: it has neither `-c` nor a file."""
    job: Flag = False
    """Only what such a shell has started."""
    startup: Flag = False
    """Only what a shell with a terminal starts because its startup files say so. Any program can
    look like one (docs/security.md)."""
    begins_call: Flag = True
    descendants: Flag = False
    """Where no call begins: what it starts, and what that starts, begins none either."""


def _none(*programs: str, **fits: Any) -> BoundaryRule:
    return BoundaryRule(program=programs or ("*",), begins_call=False, **fits)


def _asks(*programs: str, **fits: Any) -> BoundaryRule:
    """What only asks something of the system, which may take programs of its own."""
    return _none(*programs, descendants=True, **fits)


SHELL_COMMANDS = BoundaryRule(program=SHELLS, shell_command=True)
FOR_THEMSELVES = (
    "* env",
    "* lspci -vvv  2>/dev/null",
    "* clinfo --raw",
    "* xdpyinfo 2>/dev/null | grep *",
    "* xrandr --verbose 2>/dev/null",
    "*SNAPSHOT_FILE=*",
    "*# Snapshot file*unalias -a*",
    "*set -e; . *shell_snapshots/*",
    "* npm root -g",
    "* ps aux | grep -E *code|cursor|*",
    "*env bash -n <<*",
)
"""What agents have a shell do for themselves: they save the user's shell settings, look for
editors, packages and GPUs, or check the syntax of a command that comes next."""
TERMINALS_SHELLS = ("* nice -n * */bash", "* */nice -n * */bash")
"""A shell that reads its commands, started by another one."""
CLAUDE = ("*/shell-snapshots/snapshot-*", "*pwd -P >| *")
"""What Claude Code wraps each command of its model in. What else it has a shell do are hooks, MCP
servers and the like."""
SANDBOXES = ("bwrap", "codex-linux-san*", "codex-execve-wr*", "srt", "apply-seccomp", "socat")
"""Programs that put a sandbox around a command, which begins the call inside; and its proxies."""
CODEX_SETUP = "--codex-run-as*"
"""First argument of Codex where it has become the process that is about to be a tool."""
AGENTS = (
    *("claude*", "codex*", "gemini*", "opencode*", "openhands*", "aider", "goose*", "qwen*"),
    *("mini", "mini-extra", "sweagent*", "swerex*"),
)
"""Programs that are agents, by their own names; what they start for a model is a tool."""
TERMINALS = ("tmux*", "screen", "script", "agent-server")
PROBES = (
    *("arch", "basename", "clinfo", "dircolors", "dirname", "file", "getconf", "getopt", "groups"),
    *("hostname", "id", "lspci", "xdpyinfo", "xrandr"),
    *("infocmp", "ldconfig*", "ldd", "lesspipe", "locale", "lsb_release", "lscpu", "nproc"),
    *("nvidia-smi", "pgrep", "ps", "readlink", "stty", "sw_vers", "sysctl", "tput", "tty", "uname"),
    *("which", "whoami", "xdg-*", "dbus-*"),
)
"""What runtimes and shells ask of the system for themselves."""
GIT_LOOKS = (
    *("--version", "-c", "--no-optional-locks", "branch", "cat-file", "check-ignore", "config"),
    *("diff", "log", "ls-files", "remote", "rev-list", "rev-parse", "show", "status"),
    *("symbolic-ref", "version"),
)
"""Commands of git by which agents learn where they are. By others aider keeps its model's work."""
RUNNERS = ("node", "python*", "npx", "npm*", "uv", "uvx", "bun*", "deno", "docker", "MainThread")
SERVERS = (
    *("*mcp-*", "* mcp*", "*mcp_server*", "*modelcontextprotocol*", "*/mcp*", "*-mcp*"),
    *("*--stdio*", "*language-server*", "*langserver*", "*--service=*", "*multiprocessing.*"),
)
"""Servers that an agent keeps: their tools are told from them. Helpers of the runtimes as well."""

DEFAULT_RULES = (
    _asks(startup=True),
    *(_asks(*SHELLS, shell_command=True, command_line=glob) for glob in FOR_THEMSELVES),
    *(_none(*SHELLS, shell_command=True, command_line=glob) for glob in TERMINALS_SHELLS),
    _none("exe", "codex*", first_argument=CODEX_SETUP),
    _none(*SHELLS, shell_command=True, runs="*mcp*"),
    *(_none(*SHELLS, shell_command=True, runs=name) for name in ("agentcg*", "bwrap")),
    *(
        BoundaryRule(program=SHELLS, shell_command=True, parent=("claude*",), command_line=glob)
        for glob in CLAUDE
    ),
    _none(*SHELLS, parent=("claude*",)),
    SHELL_COMMANDS,
    _none(reads_commands=True),
    _none(*SHELLS, first_argument="-n"),
    _none(*SANDBOXES, *AGENTS, *TERMINALS),
    _asks(*PROBES),
    _asks("run-parts", command_line="* /etc/profile.d"),
    _none("clear"),
    _none("*mcp*"),
    *(_none(*RUNNERS, command_line=glob) for glob in SERVERS),
    _none(first_argument="--stdio"),
    _asks(first_argument="--version"),
    _asks("rg", first_argument="--files"),
    *(_asks("git", first_argument=word) for word in GIT_LOOKS),
    _asks("git", parent=("aider",)),
    _none("node", "MainThread", "bun", parent=("node*", "MainThread", "bun")),
    BoundaryRule(program=("*",), job=True),
    _none(parent=SHELLS),
    BoundaryRule(program=("*",)),
)


class BoundariesConfig(Section):
    """Tool calls of agents that declare none (boundaries/)."""

    enabled: Flag = True
    rules: tuple[BoundaryRule, ...] = DEFAULT_RULES
    """The first that fits decides; none: no call."""
