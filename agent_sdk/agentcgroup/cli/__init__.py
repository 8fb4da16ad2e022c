"""The command `agentcg` (everything but `exec`, which its C front does itself).

One module a group: status (status, sessions, budget, version), calls (calls, end, report), session,
policy, streams (feedback, events), audit, history (history, usage, explain), install,
trace (doctor, record, replay).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from agentcgroup import errors, extras, paths

from . import audit, calls, common, history, install, policy, session, status, streams, trace
from .output import print_json, say

GROUPS = (status, calls, session, streams, audit, history, install)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (else the process's own). Returns the exit code.

    Raises:
        SystemExit: --help, or wrong usage (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["exec"]:
        return _exec(arguments[1:])
    try:
        return _run(arguments)
    except errors.AgentcgError as error:
        return _failed(error, arguments)
    except ImportError as error:
        extra = extras.missing(error)
        if extra is None:
            raise
        return _failed(extra, arguments)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) has what it wants. Flushing stdout at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _failed(error: errors.AgentcgError, arguments: list[str]) -> int:
    """Report an error in words, and with --json as JSON too; returns the exit code."""
    if "--json" in _options(arguments):
        print_json({"error": error.to_dict()})
    return common.explain(error)


def _run(arguments: list[str]) -> int:
    words = [argument for argument in _options(arguments) if not argument.startswith("-")]
    tail: list[str] = []
    # Split by hand, because argparse would take options behind NAME for the command's.
    if words[:2] == ["session", "run"] and "--" in arguments:
        split = arguments.index("--")
        arguments, tail = arguments[:split], arguments[split + 1 :]
    args = build_parser(tuple(words[:2])).parse_args(arguments)
    if tail:
        args.command = tail
    code: int = args.run(args)
    sys.stdout.flush()
    return code


def _options(arguments: list[str]) -> list[str]:
    """The arguments before a "--": what comes behind it belongs to another command."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def build_parser(chosen: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """Make the parser.

    `chosen` holds the first words of the command line: `record`, `replay` and `policy simulate`
    have their arguments only if chosen, because those are defined in another package.
    """
    parser = argparse.ArgumentParser(
        prog="agentcg",
        description="Resource control for AI agents, one tool call at a time.",
        epilog=common.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    subparsers.add_parser(
        "exec", help="Run a command as a tool call: agentcg exec [intent] -- COMMAND."
    )
    for group in GROUPS:
        group.add_commands(subparsers)
    policy.add_commands(subparsers, chosen)
    trace.add_commands(subparsers, chosen[0] if chosen else None)
    return parser


def _exec(arguments: list[str]) -> int:
    """Become agentcg-exec, as the C front does."""
    try:
        launcher = paths.find_launcher()
    except errors.LauncherNotFound as error:
        say(f"agentcg: {error}", file=sys.stderr)
        return 127
    os.execv(launcher, ["agentcg-exec", *arguments])
