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

import shtab
from argparse_manpage.manpage import Manpage

from agentcgroup.cli.commands import build_parser
from agentcgroupd.arguments import make_parser

COMPLETES = {"FILE": shtab.FILE, "TRACE": shtab.FILE, "DIR": shtab.DIRECTORY}
"""What completes an argument, by its name in the help."""
NAMES = {
    "bash": "bash-completion/completions/agentcg",
    "zsh": "zsh/site-functions/_agentcg",
}
AGENTCG = "resource control for AI agents, one tool call at a time"
AGENTCGROUPD = "the daemon that gives each tool call of an AI agent a cgroup of its own"


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of the parsers below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in dict.fromkeys(action.choices.values()):
                yield from _actions(below)


def completion(shell: str) -> str:
    """The completion of `agentcg` for a shell."""
    parser = build_parser()
    for action in _actions(parser):
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if metavar in COMPLETES:
            action.complete = COMPLETES[metavar]  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell=shell)
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
