"""`completion`: what makes a shell complete the command line, as the build made it, and the names
that it asks for meanwhile."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

from agentcgroup.admin import Admin
from agentcgroup.errors import AgentcgError

from . import common
from .output import print_json, say
from .summaries import summary

FILES = {
    "bash": "share/bash-completion/completions/agentcg",
    "zsh": "share/zsh/site-functions/_agentcg",
}
NAMES = ("calls", "sessions")
USE = """\
bash:  eval "$(agentcg completion bash)"                 in ~/.bashrc
zsh:   agentcg completion zsh > "${fpath[1]}/_agentcg"   once
"""


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's command."""
    text = summary("completion")
    parser = common.command(subparsers, "completion", run_completion, text, epilog=USE)
    choices = [*sorted(FILES), *NAMES]
    for_shells = "bash or zsh; for these, calls or sessions prints the names of those that are open"
    parser.add_argument("shell", choices=choices, metavar="SHELL", help=for_shells)


def run_completion(args: argparse.Namespace) -> int:
    """Print the completion for a shell, or names for it; returns the exit code."""
    if args.shell in NAMES:
        names = _open(args.shell)
        print_json(names) if args.json else say("".join(f"{name}\n" for name in names), end="")
        return common.OK
    text = find(args.shell).read_text(encoding="utf-8")
    if args.json:
        print_json({"shell": args.shell, "text": text})
    else:
        say(text, end="")
    return common.OK


def _open(what: str) -> list[str]:
    """Return the names of open sessions, or the ids of open calls, that the user may see."""
    with common.either() as client:
        if what == "calls":
            return [call.id for call in client.calls()]
        sessions = client.sessions() if isinstance(client, Admin) else [client.session()]
    return [session.id for session in sessions]


def find(shell: str) -> Path:
    """Return the file for a shell, of the installed package or of the checkout.

    Raises:
        AgentcgError: the package came without it.
    """
    checkout = Path(__file__).resolve().parents[3]
    places = [Path(sysconfig.get_path("data")) / FILES[shell]]
    if (checkout / "pyproject.toml").exists():
        places.insert(0, checkout / "build" / FILES[shell])
    for place in places:
        if place.is_file():
            return place
    raise AgentcgError(f"the completion for {shell} is not installed: {places[-1]} is not there")
