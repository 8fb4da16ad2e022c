"""`config`: the daemon's configuration file. It is read by the daemon's package."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import common
from .output import complain, print_json, say
from .summaries import summary
from .trace import load

CONFIG = Path("/etc/agentcgroup/agentcgroupd.toml")


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    commands = common.group(subparsers, "config", summary("config"))
    file_help = f"the file; else {CONFIG} if it is there"
    text = "Show every setting, its default and what it means, as TOML."
    show = common.command(commands, "show", run_show, text)
    show.add_argument("file", nargs="?", type=Path, metavar="FILE", help=file_help)
    text = "Say what would keep the daemon from starting."
    check = common.command(commands, "check", run_check, text)
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help=file_help)


def file_of(args: argparse.Namespace) -> Path | None:
    """Return the file that is meant; None: there is none, so all defaults hold."""
    file: Path | None = args.file
    return file or (CONFIG if CONFIG.exists() else None)


def run_show(args: argparse.Namespace) -> int:
    """Print the configuration; returns the exit code, as every `run_` function."""
    settings = load("agentcgroupd.settings")
    if args.json:
        print_json(settings.as_dict(file_of(args)))
    else:
        say(settings.show(file_of(args)), end="")
    return common.OK


def run_check(args: argparse.Namespace) -> int:
    """Print whether the daemon could start with the configuration."""
    check, errors = load("agentcgroupd.check"), load("agentcgroupd.errors")
    file = file_of(args)
    try:
        check.check(load("agentcgroupd.config").load_config(file))
    except errors.ConfigError as error:
        if args.json:
            details = [
                {"file": m.file, "line": m.line or None, "key": m.key, "sentence": m.sentence}
                for m in getattr(error, "errors", ())
            ]
            print_json({"ok": False, "sentence": str(error), "mistakes": details})
        complain(error)
        return common.BAD
    if args.json:
        print_json({"ok": True, "file": str(file) if file is not None else None})
    else:
        say(f"{file or 'the defaults'}: ok")
    return common.OK
