"""The command line as a whole: its parser, and what becomes of errors."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

from agentcgroup import errors, extras, paths

from . import BROKEN_PIPE, INTERRUPTED, common
from .output import OutputError, complain, flush, give_up_stdout, print_json
from .parser import Parser
from .summaries import ALIASES, COMMANDS, GUESSES, summary

DESCRIPTION = "Resource control for AI agents, one tool call at a time."


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from agentcgroup import __version__

        parser._print_message(f"agentcg {__version__}\n", sys.stdout)
        parser.exit()


class _Misplaced(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        option = self.option_strings[0]
        parser.error(f"{option} stands behind the command, as in: agentcg sessions {option}")


def run(arguments: list[str]) -> int:
    """Run a command line. Returns the exit code."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if arguments[:1] == ["exec"]:
        return _exec(arguments[1:])
    line = common.Line(arguments)
    try:
        code = _run(line)
        flush()
        # A hook stops an agent by 2.
        return common.BAD if line.words[:1] == ("hook",) and code == common.USAGE else code
    except OutputError as error:
        give_up_stdout()
        if error.is_reader_gone:
            return BROKEN_PIPE
        complain(f"agentcg: the output cannot be written: {error}")
        return common.BAD
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(line: common.Line) -> int:
    try:
        line.args = build_parser(line.words).parse_args(line.arguments)
        if line.command is not None:
            line.args.command = line.command
        code: int = line.args.run(line.args)
        return code
    except SystemExit as stop:  # of argparse, after --help or wrong usage
        return stop.code if isinstance(stop.code, int) else common.USAGE
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        if line.wants_json:
            print_json({"error": known.to_dict()})
        return common.explain(known, line)


def _known(error: Exception) -> errors.AgentcgError | None:
    """Return the error to show for what a command raised; None: it is a mistake of this project."""
    if isinstance(error, errors.AgentcgError):
        return error
    if isinstance(error, ImportError):
        return extras.missing(error)
    if isinstance(error, OSError) and not isinstance(error, OutputError):
        what = f"{error.filename}: " if error.filename else ""
        return errors.AgentcgError(what + (error.strerror or str(error)))
    daemons = sys.modules.get("agentcgroupd.errors")
    if daemons is not None and isinstance(error, daemons.AgentcgroupdError):
        return errors.AgentcgError(str(error), field=getattr(error, "field", ""))
    return None


def build_parser(words: tuple[str, ...] | None = None) -> Parser:
    """Make the parser.

    `words`: the words of the command line that are no options. Only the module of the command that
    they begin with is imported; the others are known by name. None: all are wanted.
    """
    parser = Parser(prog="agentcg", description=DESCRIPTION, epilog=common.EXIT_CODES)
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the version of this command"
    )
    parser.add_argument("--json", action=_Misplaced, nargs=0, help=argparse.SUPPRESS)
    parser.guesses = GUESSES
    parser.set_defaults(run=common.helping(parser), parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")
    chosen = {other: name for name, names in ALIASES.items() for other in names}
    first = None if words is None else chosen.get(words[0], words[0]) if words else ""
    done: set[str] = set()
    for name, (module, text) in COMMANDS.items():
        if name in done:
            continue
        if first is not None and COMMANDS.get(first, ("",))[0] != module:
            commands.add_parser(name, aliases=ALIASES.get(name, ()), help=text)
            continue
        if module == "commands":
            _add_help(commands)
            continue
        group = import_module(f"agentcgroup.cli.{module}")
        before = {*commands.choices}
        group.add_commands(commands, words)
        done |= {*commands.choices} - before
    order = [*COMMANDS]
    commands._choices_actions.sort(key=lambda action: order.index(action.dest))
    return parser


def _add_help(commands: common.Subparsers) -> None:
    parser = commands.add_parser("help", help=summary("help"), description=summary("help"))
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="the command")


def _exec(arguments: list[str]) -> int:
    """Become agentcg-exec, which the C front has in itself."""
    try:
        launcher = paths.find_launcher()
    except errors.LauncherNotFound as error:
        complain(f"agentcg: {error}")
        return 127
    os.execv(launcher, ["agentcg exec", *arguments])
