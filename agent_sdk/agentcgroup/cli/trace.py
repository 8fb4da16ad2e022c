"""`doctor`, `record`, `replay`: the work is done in packages that need more than the SDK."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from agentcgroup.extras import missing

from . import common
from .output import paint, print_json, say
from .summaries import summary


def load(name: str) -> Any:
    """Import a module of the daemon's or the laboratory's package and return it.

    Raises:
        MissingExtra: something that the module needs is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = missing(error)
        if extra is None:
            raise
        raise extra from error


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands.

    Only the arguments of the command that is asked for are, because that imports another package.
    """
    common.command(subparsers, "doctor", run_doctor, summary("doctor"))
    for name in ("record", "replay"):
        parser = common.command(
            subparsers, name, run_delegated, summary(name), conflict_handler="resolve"
        )
        parser.set_defaults(delegated=name)
        if words is None or words[:1] == (name,):
            getattr(load("agentcgroup_lab.replay.cli"), f"add_{name}_arguments")(parser)


def run_delegated(args: argparse.Namespace) -> int:
    """Run `record` or `replay`; returns the exit code."""
    run = getattr(load("agentcgroup_lab.replay.cli"), f"run_{args.delegated}")
    return int(run(args))


def run_doctor(args: argparse.Namespace) -> int:
    """Print what can be enforced here; BAD where nothing useful can."""
    diagnosis = load("agentcgroupd.doctor.report").run()
    if args.json:
        print_json(diagnosis.to_dict())
    else:
        say(diagnosis.render(paint))
    return common.OK if diagnosis.ok else common.BAD
