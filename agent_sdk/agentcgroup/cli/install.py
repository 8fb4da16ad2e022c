"""`install` and `uninstall`: the daemon as a service of systemd, from where it is installed."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from agentcgroup import errors

from . import common, install_docker
from .install_files import (
    CONFIG,
    UNITS,
    CannotInstall,
    Entry,
    Found,
    Installation,
    below,
    is_packaged,
    put,
    refuse_packaged,
    removable,
    remove,
)
from .install_pins import PINS, remove_pins
from .install_sessions import give_back, open_sessions
from .output import print_json, say
from .summaries import summary

T = TypeVar("T")

HOST = Path("/")
RUN, LOG = Path("/run/agentcgroup"), Path("/var/log/agentcgroup")
STATE = Path("/var/lib/agentcgroup")
SOCKETS = ("agentcgroupd-agent.socket", "agentcgroupd-admin.socket")
ROUNDS = 3
"""How often giving back is tried again, because a container was adopted meanwhile."""
QUIET_S = 2.0
"""A daemon that has just been started finds the containers that are to be sessions in this time."""
_DONE = {"new": "made", "changed": "replaced", "same": "as it was", "kept": "kept, as changed here"}
_WOULD = {"new": "would be made", "changed": "would be replaced"}


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    install = common.command(subparsers, "install", run_install, summary("install"))
    install.add_argument("--no-start", action="store_true", help="only the files")
    install.add_argument(
        "--docker",
        action="store_true",
        help="also tell Docker of the runtime agentcg, in /etc/docker/daemon.json",
    )
    uninstall = common.command(subparsers, "uninstall", run_uninstall, summary("uninstall"))
    keep = "configuration, audit log and history stay"
    uninstall.add_argument("--keep", action="store_true", help=keep)
    force = (
        "end sessions that are open, and give back adopted ones; forget Docker's runtime though "
        "containers have it"
    )
    uninstall.add_argument("--force", action="store_true", help=force)
    uninstall.add_argument(
        "--docker", action="store_true", help="only have Docker forget the runtime agentcg"
    )
    for parser in (install, uninstall):
        parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
        parser.add_argument(
            "--root",
            metavar="DIR",
            type=Path,
            default=HOST,
            help="files in a directory that becomes a system's root; nothing is started or stopped",
        )


def run_install(args: argparse.Namespace) -> int:
    """Put the files in place and start the service; returns the exit code."""
    root = _root(args)
    installation = Installation.this()
    docker = None
    if args.docker:
        docker = install_docker.adding(root, installation.programs / install_docker.PROGRAM)
    if docker is not None and is_packaged(root):  # the service is there already
        _change_docker(args, docker)
        _tell_install(args, [], [], False, docker)
        return common.OK
    installation.check(root)
    live = root == HOST and not args.no_start
    entries = installation.entries()
    if args.dry_run:
        found = [(entry, entry.found(root)) for entry in entries]
    else:
        if live:
            _need_systemd()
        _need_root(root)
        _check_config(installation, root)
        found = _changing(lambda: put(entries, root))
    notes = installation.writers() if root == HOST else []
    if live and not args.dry_run:
        _start(found)
    if docker is not None:
        _change_docker(args, docker)
    _tell_install(args, found, notes, live, docker)
    return common.OK


def run_uninstall(args: argparse.Namespace) -> int:
    """Stop the service and remove its files; returns the exit code."""
    root = _root(args)
    docker = install_docker.removing(root)
    if docker is not None:
        _refuse_used(root, args.force)
    if args.docker:
        if docker is not None:
            _change_docker(args, docker)
        return _tell_uninstall(args, [], docker)
    refuse_packaged(root, "apt-get remove agentcgroup")
    paths = removable(root, keep_data=args.keep)
    trees = [RUN] if args.keep else [LOG, STATE, RUN]
    trees = [tree for path in trees if (tree := below(root, path)).is_dir()]
    pins = [PINS] if root == HOST and PINS.is_dir() else []
    if not args.dry_run:
        _need_root(root)
        if root == HOST:
            _stop(args.force)
            _refuse_running()
        if docker is not None:
            _change_docker(args, docker)
        _changing(lambda: remove(paths, root))
        for tree in trees:
            shutil.rmtree(tree, ignore_errors=False)
        pins = [PINS] if root == HOST and _changing(remove_pins) else []
        if root == HOST and _has_systemd():
            _systemctl("daemon-reload")
    return _tell_uninstall(args, [str(path) for path in (*paths, *trees, *pins)], docker)


def _tell_uninstall(
    args: argparse.Namespace, gone: Sequence[str], docker: install_docker.Change | None
) -> int:
    if args.json:
        told = None if docker is None else str(docker.place)
        print_json({"removed": list(gone), "docker": told, "dry_run": args.dry_run})
        return common.OK
    would = "would be " if args.dry_run else ""
    for path in gone:
        say(f"{path}: {would}removed")
    if docker is not None:
        say(f"{docker.place}: the runtime {install_docker.NAME} {would}taken out")
    if not gone and docker is None:
        say("nothing of the service is here")
    return common.OK


def _change_docker(args: argparse.Namespace, change: install_docker.Change) -> None:
    """Write Docker's configuration, and have a Docker that runs read it."""
    if args.dry_run or change.found == "same":
        return
    root = _root(args)
    _need_root(root)
    _changing(lambda: install_docker.apply(change, check=root == HOST))
    if root == HOST and _has_systemd():
        install_docker.reload()


def _refuse_used(root: Path, force: bool) -> None:
    """Raise Refused where Docker could not start containers any more."""
    names = install_docker.users() if root == HOST and not force else []
    if names:
        raise errors.Refused(
            f"containers have Docker's runtime {install_docker.NAME}: {', '.join(names[:10])}; "
            "remove them first, or see to them yourself and use --force",
            code="FAILED_PRECONDITION",
        )


def _root(args: argparse.Namespace) -> Path:
    root: Path = args.root.absolute()
    if not root.is_dir():
        raise CannotInstall(f"--root: {root} is no directory", field="root", value=str(root))
    return root


def _need_root(root: Path) -> None:
    if os.geteuid() != 0 and not os.access(root, os.W_OK):
        raise errors.PermissionDenied("the service is installed by root", code="PERMISSION_DENIED")


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None


def _need_systemd() -> None:
    if not _has_systemd():
        raise CannotInstall(
            "systemd does not run here; start the daemon yourself (sudo agentcgroupd), or put the "
            "files into an image with --root DIR, or leave out the start with --no-start"
        )


def _changing(change: Callable[[], T]) -> T:
    """Do what changes files; an error names the file."""
    try:
        return change()
    except OSError as error:
        raise CannotInstall(f"{error.filename}: {error.strerror}") from error


def _check_config(installation: Installation, root: Path) -> None:
    """Read the configuration that will be there as the daemon will. Whether this host has all that
    it names, such as the pool's unit, shows when the service starts."""
    there = below(root, CONFIG)
    shipped = installation.data / "share/agentcgroup/systemd" / CONFIG.name
    config = there if there.is_file() else shipped
    argv = [str(installation.programs / "agentcg"), "config", "show", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotInstall(done.stderr.strip().splitlines()[-1].strip() or f"{argv[0]} failed")


def _systemctl(*arguments: str, may_fail: bool = False) -> None:
    """Run systemctl. Raises CannotInstall with what it says, and the daemon's last words."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0 or may_fail:
        return
    said = " ".join(done.stderr.split())
    journal = subprocess.run(
        ["journalctl", "-u", "agentcgroupd.service", "-n", "3", "-o", "cat", "--no-pager"],
        capture_output=True,
        text=True,
        check=False,
    )
    words = " / ".join(line for line in journal.stdout.splitlines() if line.strip())
    raise CannotInstall(
        f"systemctl {' '.join(arguments)}: {said}" + (f" ({words})" if words else "")
    )


def _start(found: Sequence[tuple[Entry, Found]]) -> None:
    changed = {entry.path.name for entry, state in found if state in ("new", "changed")}
    tmpfiles = ["systemd-tmpfiles", "--create", "agentcgroup.conf"]
    subprocess.run(tmpfiles, check=True)
    if changed:
        _systemctl("daemon-reload")
    # Sessions live in the pool's unit, so a restart of the daemon ends none.
    verb = "restart" if "agentcgroupd.service" in changed else "start"
    _systemctl(verb, "agentcgroupd.service")


def _stop(force: bool) -> None:
    """Stop everything, unless sessions are open and nobody insists; adopted ones are given back
    first. Raises Refused, with the daemon running if it did."""
    if not _has_systemd():
        return
    _stop_daemon(force)
    _systemctl("stop", "agentcg-pool.service", may_fail=True)
    _systemctl("stop", "agentcg.slice", may_fail=True)
    _systemctl("reset-failed", *UNITS, may_fail=True)


def _stop_daemon(force: bool) -> None:
    """Stop the daemon with nothing left that it has adopted: the marks of that are on the pool's
    cgroup, and go with it."""
    for number in range(ROUNDS):
        if number and force:
            _give_back_until_quiet()
        found = _changing(open_sessions)
        if (found.inside or found.adopted) and not force:
            raise errors.Refused(
                f"sessions are open: {found}; close them first, or have --force end them, and give "
                "back those that are adopted",
                code="FAILED_PRECONDITION",
            )
        if found.adopted:
            give_back(found, str(RUN))
        # The sockets first: a connection would start the daemon again.
        _systemctl("stop", *SOCKETS, "agentcgroupd.service", may_fail=True)
        left = _changing(open_sessions).adopted
        if not left:
            return
        # A container has started meanwhile, or the daemon has to finish what it began.
        _systemctl("start", "agentcgroupd.service")
    raise errors.Refused(
        f"not given back: {', '.join(left)}; stop these containers first",
        code="FAILED_PRECONDITION",
    )


def _give_back_until_quiet() -> None:
    """Give back what a daemon adopts that has just been started again, which are all containers
    that are to be sessions, until it adopts no more. Raises Refused."""
    for _ in range(ROUNDS):
        time.sleep(QUIET_S)
        found = _changing(open_sessions)
        if not found.adopted:
            return
        give_back(found, str(RUN))


def _refuse_running() -> None:
    """Raise Refused where a daemon that is not the service's still runs in its directory."""
    try:
        lock = os.open(RUN / "private/lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise errors.Refused(
            f"a daemon that systemd did not start runs in {RUN}; stop it first",
            code="FAILED_PRECONDITION",
        ) from None
    finally:
        os.close(lock)


def _tell_install(
    args: argparse.Namespace,
    found: Sequence[tuple[Entry, Found]],
    notes: Sequence[str],
    live: bool,
    docker: install_docker.Change | None,
) -> None:
    started = live and not args.dry_run
    if args.json:
        files = [
            {"path": str(below(args.root.absolute(), entry.path)), "found": state}
            for entry, state in found
        ]
        if docker is not None:
            files.append({"path": str(docker.place), "found": docker.found})
        print_json({"files": files, "notes": notes, "started": started, "dry_run": args.dry_run})
        return
    words = {**_DONE, **_WOULD} if args.dry_run else _DONE
    for entry, state in found:
        say(f"{below(args.root.absolute(), entry.path)}: {words[state]}")
    if docker is not None:
        would = "would be " if args.dry_run else ""
        done = (
            "as it was"
            if docker.found == "same"
            else f"{would}given the runtime {install_docker.NAME}"
        )
        say(f"{docker.place}: {done}")
    for note in notes:
        say(f"agentcg: note: {note}, so that others could change what root runs", file=sys.stderr)
    if started:
        say("agentcgroupd runs; next: agentcg session run NAME -- COMMAND")
