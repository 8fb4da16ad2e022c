"""What the commands share: exit codes, the way to the daemon, and errors in words."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agentcgroup import errors, paths
from agentcgroup.admin import Admin

from .output import complain
from .parser import Parser

if TYPE_CHECKING:
    from agentcgroup.client import Agent

    Subparsers = argparse._SubParsersAction[Parser]

Words = tuple[str, ...] | None
"""The first words of a command line; None: all commands are wanted in full."""

OK, BAD, USAGE, UNAVAILABLE, REFUSED, NOT_FOUND = range(6)
NOT_STARTED = 125
"""What `session run` ends with where the command did not come to run because of us, as `exec`."""

EXIT_CODES = """\
exit codes:
  0    done
  1    what was asked about is bad: calls have no cgroups or no limit of memory
       here, or it was not tried as root (doctor), a call that did not end well
       (report --check), a policy with a mistake, something is not installed, the
       output cannot be written, record or replay could not be done
  2    wrong usage
  3    the daemon is away
  4    refused, not allowed, or a value that makes no sense
  5    no such call, session, cgroup or report
  125  exec, session run: wrong usage, the daemon is away or has refused it; the
       command was not run
  126  exec, session run: the command cannot be run
  127  exec, session run: the command is not there
  130  interrupted by ^C
  141  the reader of the output has gone away
  else exec, session run: the command's own (128+n: it died of signal n)
"""

UNITS = """\
values:
  SIZE      512M, 1.5G, 2GiB (powers of 1,024), or a number of bytes
  CORES     1.5, or 250m (thousandths of a core)
  TIME      90 (seconds), 1.5s, 250ms, 10m, 2h
  PRIORITY  0 to 100, or batch (20), normal (50), important (80)
"""

_SESSION_RUN = ("session", "run")
_NAMES_OF = {"id": ("name",), "session_id": ("name", "session"), "call_id": ("call",)}
_NAMES_OF["cgroup_path"] = ("cgroup",)
"""Fields of the protocol that have another name among the arguments of a command."""


class Line:
    """A command line.

    arguments: what argparse gets. command: what `session run` is to run; None: it is another
    command. args: the arguments once they are parsed.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments, self.command = arguments, None
        self.args: argparse.Namespace | None = None
        words = (argument for argument in arguments if not argument.startswith("-"))
        self.words = (*words,)[:2]
        if self.words == _SESSION_RUN:
            self._split_off_the_command()

    def _split_off_the_command(self) -> None:
        # By hand, because argparse would take options behind NAME for the command's.
        from .session import add_run_arguments

        head = self.arguments.index("run") + 1
        parser = Parser()
        add_run_arguments(parser)
        mine, self.command = parser.split_command(self.arguments[head:])
        self.arguments = [*self.arguments[:head], *mine]

    command: list[str] | None

    @property
    def is_run(self) -> bool:
        """Whether a command is to be run, whose exit status is passed on."""
        return self.words == _SESSION_RUN

    @property
    def wants_json(self) -> bool:
        """Whether --json is among the options that are ours."""
        arguments = self.arguments
        end = arguments.index("--") if "--" in arguments else len(arguments)
        return "--json" in arguments[:end]


def command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    **kwargs: Any,
) -> Parser:
    """Add a command with --json and return its parser.

    `run` gets the arguments and returns the exit code.
    """
    parser = subparsers.add_parser(name, help=summary, description=summary, **kwargs)
    add_json(parser)
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_json(parser: Parser) -> None:
    """Add the option that every command has."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def group(subparsers: Subparsers, name: str, summary: str) -> Subparsers:
    """Add a command that has commands of its own, and shows its help where none is named. Returns
    what they are added to."""
    parser = subparsers.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=helping(parser), parser=parser)
    return parser.add_subparsers(metavar="COMMAND")


def helping(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Return what shows the help of a parser."""

    def run(args: argparse.Namespace) -> int:
        parser.print_help()
        return OK

    return run


def admin() -> Admin:
    """Make the operator's client.

    Raises:
        PermissionDenied: the admin socket is not for this user.
    """
    directory = paths.run_dir()
    socket = paths.admin_attach_socket(directory)
    if os.path.isdir(directory) and not os.access(os.path.dirname(socket), os.X_OK):
        if os.path.isdir(os.path.dirname(socket)):
            raise errors.PermissionDenied(f"{os.path.dirname(socket)} may not be entered")
    elif os.path.exists(socket) and not os.access(socket, os.W_OK):
        raise errors.PermissionDenied(f"{socket} may not be written to")
    return Admin()


def agent() -> Agent:
    """Make the client of the session that this process is in."""
    from agentcgroup.client import Agent

    return Agent(on_unavailable="refuse")


def either() -> Admin | Agent:
    """Make the operator's client where this process may use it, else that of its session."""
    try:
        operator = admin()
        operator.pool()
    except errors.PermissionDenied:
        return agent()
    except errors.Unavailable:
        # A container sees only the agent's sockets.
        if os.path.exists(paths.attach_socket(paths.run_dir())):
            return agent()
        raise
    return operator


def explain(error: errors.AgentcgError, line: Line | None = None) -> int:
    """Say on stderr what went wrong and what to try. Returns the exit code."""
    matching = (row for row in _ADVICE if isinstance(error, row[0]))
    _, code, advice = next(matching, (type(error), BAD, ""))
    sentence, allowed = error.sentence, error.allowed
    if advice == _SESSIONS and allowed:
        advice = ""  # it is no session that is not there
    if line is not None and line.args is not None:
        sentence = in_words_of(line.args, sentence, error.field)
        allowed = in_words_of(line.args, allowed, error.field)
    complain(f"agentcg: {sentence}")
    if allowed and allowed not in sentence:
        complain(f"  allowed: {allowed}")
    if advice:
        complain(f"  try: {advice.format(run_dir=paths.run_dir())}")
    return NOT_STARTED if line is not None and line.is_run else code


def in_words_of(args: argparse.Namespace, text: str, field: str) -> str:
    """Name the fields of the protocol in a text as the person at the keyboard does: `--memory-max`
    for `memory_max`, NAME for `id`. `field`: the one that the text is about."""
    shown = _names(args.parser)
    for dest in _NAMES_OF.get(field, (field,)):
        if dest in shown and text.startswith(f"{field}:"):
            text = shown[dest] + text[len(field) :]
            break
    long = [re.escape(dest) for dest in shown if "_" in dest]
    if not long:
        return text
    return re.sub(rf"(?<![\w-])({'|'.join(long)})\b", lambda found: shown[found[1]], text)


def _names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the options and arguments of a command as they are typed, by their names in here."""
    shown = {}
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else action.metavar
        if isinstance(name, str):
            shown[action.dest] = name
    return shown


_START = (
    "'systemctl start agentcgroupd' (its sockets are expected in {run_dir}; another place is set "
    "by AGENTCG_RUN_DIR)"
)
_ENTER = "open a session and start the agent in it: 'agentcg session run NAME COMMAND', as root"
_AS_ROOT = (
    "as root outside every session (sudo agentcg ...); inside a session only its own calls can be "
    "seen"
)
_SESSIONS = "'agentcg sessions'"
_LIST = "'agentcg calls' for open calls, 'agentcg report --limit 20' for ended ones"

# The first line that an error is an instance of counts: subclasses stand before their bases.
_ADVICE: list[tuple[type[errors.AgentcgError], int, str]] = [
    (errors.Unavailable, UNAVAILABLE, _START),
    (errors.NotInSession, REFUSED, _ENTER),
    (errors.PermissionDenied, REFUSED, _AS_ROOT),
    (errors.AlreadyExists, REFUSED, "another name, or 'session run --reuse'"),
    (errors.CallNotFound, NOT_FOUND, _LIST),
    (errors.NotFound, NOT_FOUND, _SESSIONS),
    (errors.InvalidIntent, REFUSED, ""),
    (errors.Refused, REFUSED, ""),
    (errors.LauncherNotFound, BAD, ""),
]
