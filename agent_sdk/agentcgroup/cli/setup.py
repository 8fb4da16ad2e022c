"""`setup` and `hook`: makes an agent tell its model what became of its tool calls."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

from . import common
from .agents import AGENTS, HOOKED, SCOPES, CannotSetUp, Settings, settings_of
from .output import complain, print_json, say
from .summaries import summary


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    setup = common.command(subparsers, "setup", run_setup, summary("setup"))
    setup.add_argument("agent", choices=AGENTS, metavar="AGENT", help=", ".join(AGENTS))
    scope = setup.add_mutually_exclusive_group()
    scope.add_argument(
        "--user",
        dest="scope",
        action="store_const",
        const="user",
        help="in the settings of this user (the default)",
    )
    scope.add_argument(
        "--project",
        dest="scope",
        action="store_const",
        const="project",
        help="in the settings of the project in this directory",
    )
    scope.add_argument(
        "--managed",
        dest="scope",
        action="store_const",
        const="managed",
        help="in the settings of this machine, which users cannot change (root)",
    )
    setup.set_defaults(scope="user")
    setup.add_argument("--remove", action="store_true", help="take the hook out of the settings")
    setup.add_argument("--dry-run", action="store_true", help="only show what would change")
    hook = subparsers.add_parser("hook", help=summary("hook"), description=summary("hook"))
    hook.add_argument("agent", choices=HOOKED, metavar="AGENT", help=", ".join(HOOKED))
    hook.set_defaults(run=run_hook, parser=hook)


def run_setup(args: argparse.Namespace) -> int:
    """Show what changes in an agent's settings, and write it; returns the exit code."""
    assert args.scope in SCOPES
    settings = settings_of(args.agent, args.scope, _front(), Path.home(), Path.cwd())
    if os.geteuid() == 0:
        _check_links(settings.path)
    path = Path(os.path.realpath(settings.path))
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = settings.write(old, not args.remove)
    except UnicodeDecodeError:
        raise CannotSetUp(f"{path}: it is no UTF-8") from None
    except CannotSetUp as error:
        raise CannotSetUp(f"{path}: {error}") from None
    diff = _diff(settings, old, new)
    if not args.json:
        say(diff, end="")
    if new != old and not args.dry_run:
        _put(path, new)
    if args.json:
        done = new != old and not args.dry_run
        print_json({"path": str(settings.path), "changed": done, "diff": diff})
    else:
        _tell(args, settings, old, new)
    return common.OK


def _check_links(path: Path) -> None:
    """Refuse to have root follow a link that somebody else has put in its way, as an agent may in
    its project. Raises CannotSetUp."""
    for part in (path, *path.parents):
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(found.st_mode) and found.st_uid != 0:
            raise CannotSetUp(
                f"{part} is a symbolic link of uid {found.st_uid}, which root does not follow; "
                "run this as that user"
            )


def _tell(args: argparse.Namespace, settings: Settings, old: str, new: str) -> None:
    done = "written" if new else "removed"
    if new == old:
        say(f"{settings.path}: as it should be")
    elif args.dry_run:
        say(f"{settings.path}: would be {done}")
    else:
        say(f"{settings.path}: {done}")
        if settings.note and not args.remove:
            say(settings.note)


def _diff(settings: Settings, old: str, new: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(keepends=True),
        new.splitlines(keepends=True),
        str(settings.path) if old else os.devnull,
        str(settings.path) if new else os.devnull,
    )
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _put(path: Path, text: str) -> None:
    """Write a file as a whole, or remove it where nothing is left in it. Raises OSError."""
    if not text:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        if path.exists():
            shutil.copymode(path, name)
            found = path.stat()
            os.chown(name, found.st_uid, found.st_gid)
        else:
            os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _front() -> Path:
    """Find the command `agentcg` that stands beside this one. Raises CannotSetUp."""
    beside = Path(sys.argv[0]).resolve().parent / "agentcg"
    found = str(beside) if beside.exists() else shutil.which("agentcg")
    if found is None:
        raise CannotSetUp("the command agentcg is not installed, which the hook is run by")
    return Path(found)


def run_hook(args: argparse.Namespace) -> int:
    """Become agentcg-hook, as the C front does."""
    program = _front().with_name("agentcg-hook")
    try:
        os.execv(program, [str(program), args.agent])
    except OSError as error:
        complain(f"agentcg: {program}: {error.strerror}")
        return 1  # not 2, by which a hook stops an agent
