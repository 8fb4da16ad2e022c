"""Names of calls, made from command lines."""

from __future__ import annotations

import os

from agentcgroup.text import printable
from agentcgroupd.intents.parse import NAME_CHARS_MAX
from agentcgroupd.intents.script import commands_of, is_shell, shell_command


def tool_name(comm: str, argv: list[str]) -> str:
    """Name a call by its program, or by the first command that a shell's `-c` is run for. `comm`:
    the program's name as the kernel has it."""
    name = comm
    script = shell_command(argv) if argv and is_shell(argv[0]) else None
    if script is not None:
        first = next(commands_of(["sh", "-c", script]), [""])
        name = os.path.basename(first[0].strip("(){};&|")) or comm
    name = printable(os.path.basename(name) or comm)
    return name[:NAME_CHARS_MAX] or "tool"
