"""Rules for which programs begin a call when an agent's own process starts them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from agentcgroupd.bpf import abi
from agentcgroupd.config_boundaries import BoundariesConfig, BoundaryRule
from agentcgroupd.intents.command import tool_name
from agentcgroupd.intents.script import is_shell, reads_commands, shell_command
from agentcgroupd.intents.wrapped import user_command

GLOBBED_CHARS = 4096
"""How much of the beginning and of the end of a long command line is looked at."""
OWN_LAUNCHERS = ("agentcg", "agentcg-exec", "agentcg-cli")
"""Launchers ask for a call themselves; the command is no tool."""
DECLARES = b"agentcg-exec\0--sealed="
"""Begins the arguments of a launcher that declares a call by this exec itself, because a sandbox
lets it use no socket (agent_sdk/exec/sealed.h)."""


def declares(event: abi.ExecEvent) -> bool:
    """Whether an exec is the declaration of a call."""
    return bytes(event.argv)[: len(DECLARES)] == DECLARES and event.argv_bytes > len(DECLARES)


def argv_of(event: abi.ExecEvent) -> list[str]:
    """The head of a program's arguments."""
    raw = bytes(event.argv)[: event.argv_bytes]
    words = raw.split(b"\0")
    if not event.argv_cut and words:
        words.pop()  # what follows the last NUL
    return [word.decode("utf-8", "replace") for word in words]


def continues(argv: Sequence[str], head: Sequence[str]) -> bool:
    """Whether arguments begin with a head that may end within one of them."""
    if not head or len(argv) < len(head):
        return False
    cut = len(head) - 1
    # A character may have been cut in two.
    return list(argv[:cut]) == list(head[:cut]) and argv[cut].startswith(head[cut].rstrip("\ufffd"))


@dataclass(frozen=True)
class Started:
    """A program that a process in an agent leaf has just executed."""

    comm: str
    argv: Sequence[str]
    parent: str = ""
    """Name of the process that forked it; empty: not known."""
    is_first: bool = True
    """Whether it has executed no other program since its fork."""
    is_job: Callable[[], bool] = lambda: False
    """Whether a shell that reads its commands has started it."""
    is_cut: bool = False
    """Whether only the head of its arguments is known."""
    at_startup: bool = False
    """Whether it looks like what a shell's startup files start, by its terminal, signals and time:
    see is_at_startup() in bpf/lifecycle.bpf.c."""

    @property
    def is_of_startup_files(self) -> bool:
        """Whether a shell's startup files have it started, as far as can be told: any program can
        ignore the stop of its terminal, as shells do."""
        return self.at_startup and (not self.parent or is_shell(self.parent))

    @cached_property
    def command_line(self) -> str:
        """All arguments in one text; of a long one the beginning and the end."""
        text = " ".join(self.argv)
        return (
            text if len(text) <= 2 * GLOBBED_CHARS else text[:GLOBBED_CHARS] + text[-GLOBBED_CHARS:]
        )

    @cached_property
    def has_script(self) -> bool:
        """Whether it is a shell with a command."""
        return shell_command(self.argv) is not None

    @cached_property
    def reads_commands(self) -> bool:
        """Whether it runs a shell that reads its commands."""
        return reads_commands(self.argv)

    @cached_property
    def name(self) -> str:
        """What its call would be called."""
        return tool_name(self.comm, user_command(self.argv))


@dataclass(frozen=True, slots=True)
class Decision:
    """What a program is."""

    begins_call: bool
    is_quiet: bool = False
    """Whether what it starts begins no call either."""


NO_CALL = Decision(begins_call=False)


class Rules:
    """The rules of a configuration, prepared once: they are asked for each program that an agent
    executes."""

    def __init__(self, config: BoundariesConfig) -> None:
        rules = config.rules if config.enabled else ()
        self._rules = [_Prepared(rule) for rule in rules]

    def of(self, started: Started) -> Decision:
        """Decide what a program is: by the first rule that fits; where none does, it begins no
        call."""
        if started.comm in OWN_LAUNCHERS:
            return NO_CALL
        return next((rule.decision for rule in self._rules if rule.fits(started)), NO_CALL)

    def may_begin_call(self, comm: str) -> bool:
        """Whether a program begins a call with some arguments or other, whoever started it; of
        rules for all programs that is not said."""
        if comm in OWN_LAUNCHERS:
            return False
        rules = (rule for rule in self._rules if rule.decision.begins_call and not rule.is_for_all)
        return any(rule.names(comm) for rule in rules)


class _Prepared:
    """A rule whose globs are compiled. None: anything fits."""

    def __init__(self, rule: BoundaryRule) -> None:
        self._rule = rule
        is_quiet = rule.descendants and not rule.begins_call
        self.decision = Decision(rule.begins_call, is_quiet)
        self.is_for_all = "*" in rule.program
        self._program = _compiled(rule.program)
        self._parent = _compiled(rule.parent)
        self._first_argument = _compiled((rule.first_argument,))
        self._command_line = _compiled((rule.command_line,))
        self._runs = _compiled((rule.runs,))

    def names(self, comm: str) -> bool:
        """Whether it is about programs of that name."""
        return self._program is None or self._program.match(comm) is not None

    def fits(self, started: Started) -> bool:
        """Whether all that the rule demands holds; what costs most is asked last."""
        rule, argv = self._rule, started.argv
        return (
            self.names(started.comm)
            and (not rule.startup or started.is_of_startup_files)
            and (started.is_first or not self.is_for_all)
            and _matches(self._parent, started.parent)
            and _matches(self._first_argument, argv[1] if len(argv) > 1 else "")
            and (not rule.shell_command or started.has_script)
            and (not rule.reads_commands or started.reads_commands)
            and (self._command_line is None or _matches(self._command_line, started.command_line))
            and (self._runs is None or _matches(self._runs, started.name))
            and (not rule.job or started.is_job())
        )


def _compiled(globs: Sequence[str]) -> re.Pattern[str] | None:
    """Compile globs into one expression; None: one of them fits everything."""
    if "*" in globs:
        return None
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs) if globs else r"(?!)")


def _matches(pattern: re.Pattern[str] | None, text: str) -> bool:
    return pattern is None or pattern.match(text) is not None
