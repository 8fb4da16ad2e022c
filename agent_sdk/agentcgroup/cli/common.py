"""What the commands share: exit codes, the way to the daemon, and errors in words."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agentcgroup import errors, paths
from agentcgroup.admin import Admin
from agentcgroup.client import Agent

from .output import say

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

OK, BAD, USAGE, UNAVAILABLE, REFUSED, NOT_FOUND = range(6)

EXIT_CODES = """\
exit codes:
  0    done
  1    what was asked about is bad: nothing can be enforced here (doctor), a call
       that did not end well (report --check), a policy with a mistake,
       something is not installed, record or replay could not be done
  2    wrong usage
  3    the daemon is away
  4    refused, not allowed, or a value that makes no sense
  5    no such call, session, cgroup or report
  125  exec: refused by the daemon or wrong usage; session run: the command was
       not let into the session
  126  exec, session run: the command cannot be run
  127  exec, session run: the command is not there
  else exec, session run: the command's own (128+n: it died of signal n)
"""


def command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    **kwargs: Any,
) -> argparse.ArgumentParser:
    """Add a command with --json and return its parser.

    `run` gets the arguments and returns the exit code.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def admin() -> Admin:
    """Make the operator's client.

    Raises:
        PermissionDenied: the admin socket is not for this user.
    """
    directory = paths.run_dir()
    socket = paths.admin_socket(directory)
    # Asked here, because gRPC says "connection refused" for all of these.
    if os.path.isdir(directory) and not os.access(os.path.dirname(socket), os.X_OK):
        if os.path.isdir(os.path.dirname(socket)):
            raise errors.PermissionDenied(f"{os.path.dirname(socket)} may not be entered")
    elif os.path.exists(socket) and not os.access(socket, os.W_OK):
        raise errors.PermissionDenied(f"{socket} may not be written to")
    return Admin()


def agent() -> Agent:
    """Make the client of the session that this process is in."""
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
        if os.path.exists(paths.agent_socket(paths.run_dir())):
            return agent()
        raise
    return operator


def explain(error: errors.AgentcgError) -> int:
    """Say on stderr what went wrong and what to try. Returns the exit code."""
    matching = (row for row in _ADVICE if isinstance(error, row[0]))
    _, code, advice = next(matching, (type(error), BAD, ""))
    say(f"agentcg: {error.sentence}", file=sys.stderr)
    if error.allowed and error.allowed not in error.sentence:
        say(f"  allowed: {error.allowed}", file=sys.stderr)
    if advice:
        say(f"  try: {advice.format(run_dir=paths.run_dir())}", file=sys.stderr)
    return code


_START = (
    "'systemctl start agentcgroupd' (its sockets are expected in {run_dir}; another place is set "
    "by AGENTCG_RUN_DIR)"
)
_ENTER = "open a session and start the agent in it: 'agentcg session run NAME -- COMMAND', as root"
_AS_ROOT = (
    "as root outside every session (sudo agentcg ...); inside a session only its own calls can be "
    "seen"
)
_LIST = "'agentcg calls' for open calls, 'agentcg report --limit 20' for ended ones"

# The first line that an error is an instance of counts: subclasses stand before their bases.
_ADVICE: list[tuple[type[errors.AgentcgError], int, str]] = [
    (errors.Unavailable, UNAVAILABLE, _START),
    (errors.NotInSession, REFUSED, _ENTER),
    (errors.PermissionDenied, REFUSED, _AS_ROOT),
    (errors.AlreadyExists, REFUSED, "another name, or 'session run --reuse'"),
    (errors.CallNotFound, NOT_FOUND, _LIST),
    (errors.NotFound, NOT_FOUND, "'agentcg sessions'"),
    (errors.InvalidIntent, REFUSED, ""),
    (errors.Refused, REFUSED, ""),
    (errors.LauncherNotFound, BAD, ""),
]
