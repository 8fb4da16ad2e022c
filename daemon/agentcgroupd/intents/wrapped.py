"""Command lines of agents' shells with the command that the model asked for in place of the script
that the agent has made of it, so that names and reports carry the command itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

from agentcgroup.unwrap import command_in
from agentcgroupd.intents.script import is_shell, shell_command


def user_command(argv: Sequence[str]) -> list[str]:
    """Return a command line with the script that an agent wrapped a command in replaced by that
    command; any other command line as it is."""
    script = shell_command(argv) if argv and is_shell(argv[0]) else None
    if script is None:
        return list(argv)
    # A sandbox is run by a script whose arguments hold the command.
    for candidate in (script, *reversed(argv[3:])):
        found = command_in(candidate)
        if found is not None:
            return [os.fspath(argv[0]), "-c", found]
    return list(argv)
