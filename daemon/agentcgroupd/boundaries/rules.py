"""Rules for which programs begin a call when an agent's own process starts them."""

from __future__ import annotations

import fnmatch

from agentcgroupd.bpf import abi
from agentcgroupd.config import BoundariesConfig
from agentcgroupd.intents.command import shell_command

OWN_LAUNCHERS = ("agentcg", "agentcg-exec")
"""They ask for a call themselves."""


def argv_of(event: abi.ExecEvent) -> list[str]:
    """The head of a program's arguments."""
    raw = bytes(event.argv[: event.argv_bytes])
    words = raw.split(b"\0")
    if not event.argv_cut and words:
        words.pop()  # what follows the last NUL
    return [word.decode("utf-8", "replace") for word in words]


def begins_call(config: BoundariesConfig, comm: str, argv: list[str]) -> bool:
    """Whether the rules say so; the first that fits decides, none: no."""
    if not config.enabled or comm in OWN_LAUNCHERS:
        return False
    argument = argv[1] if len(argv) > 1 else ""
    for rule in config.rules:
        if any(fnmatch.fnmatchcase(comm, pattern) for pattern in rule.program) and (
            fnmatch.fnmatchcase(argument, rule.first_argument)
        ):
            if rule.shell_command and shell_command(argv) is None:
                continue
            return rule.begins_call
    return False


def may_begin_call(config: BoundariesConfig, comm: str) -> bool:
    """Whether the rules could say so for some arguments."""
    return (
        config.enabled
        and comm not in OWN_LAUNCHERS
        and any(
            rule.begins_call and any(fnmatch.fnmatchcase(comm, pattern) for pattern in rule.program)
            for rule in config.rules
        )
    )
