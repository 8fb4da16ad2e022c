"""`doctor`, `record`, `replay`: made in the daemon's package, which needs more than the SDK."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from . import common
from .output import print_json, wants_color

DELEGATED = ("record", "replay")


class MissingExtra(Exception):
    """The daemon's package cannot be imported; the message says what to install."""


def load(name: str) -> Any:
    """Import a module of the daemon's package.

    Raises:
        MissingExtra: something that it needs is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this command needs the Python package {error.name}; "
            "try: pip install 'agentcgroup[daemon]'"
        ) from error


def add_commands(subparsers: common.Subparsers, chosen: str | None) -> None:
    """Add this module's commands. Only the arguments of the one `chosen` are asked for: that
    imports the daemon's package."""
    common.command(
        subparsers, "doctor", run_doctor, "Show what this kernel can enforce, and what is missing."
    )
    for name, summary in (
        ("record", "Write a trace of a running session (root)."),
        ("replay", "Replay traces as real processes."),
    ):
        parser = common.command(
            subparsers, name, run_delegated, summary, conflict_handler="resolve"
        )
        parser.set_defaults(delegated=name)
        if chosen == name:
            getattr(load("agentcgroup_lab.replay.cli"), f"add_{name}_arguments")(parser)


def run_delegated(args: argparse.Namespace) -> int:
    """`record` and `replay`."""
    run = getattr(load("agentcgroup_lab.replay.cli"), f"run_{args.delegated}")
    return int(run(args))


def run_doctor(args: argparse.Namespace) -> int:
    """What can be enforced here. Bad (1) where nothing useful can."""
    diagnosis = load("agentcgroupd.doctor.report").run()
    if args.json:
        print_json(diagnosis.to_dict())
    else:
        print(diagnosis.render(wants_color(sys.stdout)))
    return common.OK if diagnosis.ok else common.BAD
