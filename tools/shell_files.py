"""Completion for bash and zsh, and the manual pages, made from the parsers of the commands.

Run by the build (`python -m tools.shell_files build/share`) with this checkout's packages in
PYTHONPATH; nothing that is made here is committed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shtab
from argparse_manpage.manpage import Manpage

from agentcgroup.cli.commands import build_parser
from agentcgroupd.arguments import make_parser

COMPLETES = {"FILE": shtab.FILE, "TRACE": shtab.FILE, "DIR": shtab.DIRECTORY}
"""What completes an argument, by its name in the help."""
OPEN_SESSIONS, OPEN_CALLS = (
    {"bash": f"_agentcg_open_{what}", "zsh": f"_agentcg_open_{what}"}
    for what in ("sessions", "calls")
)
NAME_OPEN_SESSIONS = ("agentcg session set", "agentcg session close")
"""Commands whose NAME is that of a session that is open already."""
PREAMBLE = {
    "bash": """
_agentcg_open_sessions() { compgen -W "$(agentcg completion sessions 2>/dev/null)" -- "$1"; }
_agentcg_open_calls() { compgen -W "$(agentcg completion calls 2>/dev/null)" -- "$1"; }
""",
    "zsh": """
_agentcg_open_sessions() { compadd -- ${(f)"$(agentcg completion sessions 2>/dev/null)"} }
_agentcg_open_calls() { compadd -- ${(f)"$(agentcg completion calls 2>/dev/null)"} }
""",
}
NAMES = {
    "bash": "bash-completion/completions/agentcg",
    "zsh": "zsh/site-functions/_agentcg",
}
AGENTCG = "resource control for AI agents, one tool call at a time"
AGENTCGROUPD = "the daemon that gives each tool call of an AI agent a cgroup of its own"


def _actions(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    """All arguments of a parser and of the parsers below it, each with its parser."""
    for action in parser._actions:
        yield parser, action
        if isinstance(action, argparse._SubParsersAction):
            for below in dict.fromkeys(action.choices.values()):
                yield from _actions(below)


def completes(parser: argparse.ArgumentParser, action: argparse.Action) -> Any:
    """What completes an argument, as shtab has it: files, directories, or names of what is open;
    None: nothing."""
    if action.metavar == "CALL":
        return OPEN_CALLS
    if action.dest == "session" or (action.dest == "name" and parser.prog in NAME_OPEN_SESSIONS):
        return OPEN_SESSIONS
    return COMPLETES.get(action.metavar) if isinstance(action.metavar, str) else None


def completion(shell: str) -> str:
    """The completion of `agentcg` for a shell."""
    parser = build_parser()
    for below, action in _actions(parser):
        if (found := completes(below, action)) is not None:
            action.complete = found  # type: ignore[attr-defined]
    preamble: Any = PREAMBLE  # declared as text, and documented as one for each shell
    text: str = shtab.complete(parser, shell=shell, preamble=preamble)
    return text


def manual(parser: argparse.ArgumentParser, section: int, version: str, name: str) -> str:
    """The manual page of a command. `name`: what it is, in one line."""
    # Where no date is given, none is made up: two builds of the same sources are the same.
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
    data = {
        "project_name": "agentcgroup",
        "version": version,
        "description": name,
        "manual_section": section,
        "manual_title": "agentcgroup",
    }
    page = Manpage(parser, format="single-commands-section", _data=data)
    return str(page).replace(".SH\nOPTIONS", ".SH OPTIONS")


def files(version: str) -> dict[str, str]:
    """What is made, by its path below `share`."""
    made = {NAMES[shell]: completion(shell) for shell in NAMES}
    made["man/man1/agentcg.1"] = manual(build_parser(), 1, version, AGENTCG)
    made["man/man8/agentcgroupd.8"] = manual(make_parser(version), 8, version, AGENTCGROUPD)
    return made


def main(argv: list[str]) -> int:
    """Write all files below a directory; the version comes after it."""
    share, version = Path(argv[0]), argv[1]
    for name, text in files(version).items():
        path = share / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
