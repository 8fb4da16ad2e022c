"""Rules for which programs begin a call when an agent's own process starts them."""

from __future__ import annotations

import fnmatch

from agentcgroupd.bpf import abi
from agentcgroupd.config import BoundariesConfig, BoundaryRule
from agentcgroupd.intents.script import shell_command

CMDLINE_BYTES_MAX = 65_536
"""Most that is read of a command line."""
OWN_LAUNCHERS = ("agentcg", "agentcg-exec")
"""Launchers ask for a call themselves."""


DECLARES = b"agentcg-exec\0--sealed="
"""Begins the arguments of a launcher that declares a call by this exec itself, because a sandbox
lets it use no socket (agent_sdk/exec/sealed.h)."""


def declares(event: abi.ExecEvent) -> bool:
    """Whether an exec is the declaration of a call."""
    return bytes(event.argv[: len(DECLARES)]) == DECLARES and event.argv_bytes > len(DECLARES)


def argv_of(event: abi.ExecEvent) -> list[str]:
    """The head of a program's arguments."""
    raw = bytes(event.argv[: event.argv_bytes])
    words = raw.split(b"\0")
    if not event.argv_cut and words:
        words.pop()  # what follows the last NUL
    return [word.decode("utf-8", "replace") for word in words]


def begins_call(config: BoundariesConfig, comm: str, argv: list[str]) -> bool:
    """Whether a program with these arguments begins a call: the first rule that fits decides; where
    none does, it begins none."""
    if not config.enabled or comm in OWN_LAUNCHERS:
        return False
    argument = argv[1] if len(argv) > 1 else ""
    for rule in config.rules:
        if not _names(rule, comm) or not fnmatch.fnmatchcase(argument, rule.first_argument):
            continue
        if rule.shell_command and shell_command(argv) is None:
            continue
        return rule.begins_call
    return False


def may_begin_call(config: BoundariesConfig, comm: str) -> bool:
    """Whether a program begins a call with some arguments or other."""
    if not config.enabled or comm in OWN_LAUNCHERS:
        return False
    return any(rule.begins_call and _names(rule, comm) for rule in config.rules)


def _names(rule: BoundaryRule, comm: str) -> bool:
    return any(fnmatch.fnmatchcase(comm, pattern) for pattern in rule.program)
