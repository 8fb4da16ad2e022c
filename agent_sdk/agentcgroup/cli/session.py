"""`session open|close|adopt|run`: the operator's part."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from agentcgroup import errors, paths
from agentcgroup.admin import Admin
from agentcgroup.types import SessionInfo

from . import common
from .output import print_json, say
from .status import print_sessions

if TYPE_CHECKING:
    from typing_extensions import Self

LIMITS = {
    "memory_low": "memory guaranteed to it, e.g. 512M",
    "memory_high": "memory above which it is throttled",
    "memory_max": "memory that it may reach",
    "cpu_weight": "its share of the CPUs, 1..10000",
    "cpu_max": "cores that it may use, e.g. 1.5",
    "pids_max": "processes and threads",
    "priority": "0..100, or batch, normal, important",
    "calls_max": "calls open at the same time",
    "gpu": "a part of GPUs for the agent itself, e.g. 10%%",
    "gpu_memory": "GPU memory of it, e.g. 4G",
    "gpu_priority": "whose turn it is on the GPU, as priority",
    "gpu_device": "any, any:2, an index, a UUID, or several with commas",
}


def add_commands(subparsers: common.Subparsers) -> None:
    """Add this module's commands."""
    group = subparsers.add_parser(
        "session", help="Open, adopt, close sessions, or run a command in one (root)."
    )
    verbs = group.add_subparsers(metavar="VERB", required=True)
    parser = common.command(verbs, "open", run_open, "Open a session.")
    parser.add_argument("name", metavar="NAME")
    _add_limits(parser)
    summary = "Make a session of an existing cgroup, e.g. a container's."
    parser = common.command(verbs, "adopt", run_adopt, summary)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("cgroup", metavar="CGROUP", help="its path below the cgroup2 mount")
    _add_limits(parser)
    summary = "End a session and all in it; an adopted one is given back."
    parser = common.command(verbs, "close", run_close, summary)
    parser.add_argument("name", metavar="NAME")
    summary = (
        "Open a session, run a command in it, pass on its exit status, close the session.\n"
        "With --json a JSON document follows the command's own output."
    )
    usage = "%(prog)s NAME [options] -- COMMAND [ARGUMENT...]"
    parser = common.command(verbs, "run", run_run, summary, usage=usage)
    parser.add_argument("name", metavar="NAME")
    parser.set_defaults(command=[])
    parser.add_argument("--reuse", action="store_true", help="use a session that is open already")
    parser.add_argument("--keep", action="store_true", help="leave the session open afterwards")
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    for name, text in LIMITS.items():
        limits.add_argument(f"--{name.replace('_', '-')}", metavar="X", help=text)


def _limits(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in LIMITS}


def _show(session: SessionInfo, as_json: bool) -> int:
    if as_json:
        print_json(session.to_dict())
    else:
        print_sessions([session])
    return common.OK


def run_open(args: argparse.Namespace) -> int:
    """Open a session and print it; returns the exit code, as every `run_` function."""
    with common.admin() as client:
        return _show(client.open_session(args.name, **_limits(args)), args.json)


def run_adopt(args: argparse.Namespace) -> int:
    """Make a session of a cgroup and print it."""
    with common.admin() as client:
        return _show(client.adopt_session(args.name, args.cgroup, **_limits(args)), args.json)


def run_close(args: argparse.Namespace) -> int:
    """Close a session and print how many calls were ended with it."""
    with common.admin() as client:
        ended = client.close_session(args.name)
    if args.json:
        print_json({"session_id": args.name, "calls_ended": ended})
    else:
        say(f"session {args.name} is closed; calls ended with it: {ended}")
    return common.OK


def run_run(args: argparse.Namespace) -> int:
    """Run a command in a session of its own."""
    if not args.command:
        say(
            "agentcg: no command given; usage: agentcg session run NAME [options] -- COMMAND",
            file=sys.stderr,
        )
        return common.USAGE
    launcher = paths.find_launcher()
    # From here on signals go to the command: dying of one would leave the session open.
    with common.admin() as client, _Forwarder() as forwarder:
        opened = _open_or_reuse(client, args)
        status, ended = common.BAD, 0
        try:
            socket = paths.admin_attach_socket(client.run_dir)
            prefix = [launcher, f"--session={args.name}", f"--socket={socket}", "--"]
            status = forwarder.run([*prefix, *args.command])
        finally:
            if opened and not args.keep:
                ended = _close(client, args.name)
    if args.json:
        result = {"session_id": args.name, "exit_status": status, "calls_ended": ended}
        print_json({**result, "kept": args.keep or not opened})
    return status


def _open_or_reuse(client: Admin, args: argparse.Namespace) -> bool:
    """Open the session; False where it was open already and --reuse allows that."""
    try:
        client.open_session(args.name, **_limits(args))
    except errors.AlreadyExists:
        if not args.reuse:
            raise
        return False
    return True


def _close(client: Admin, name: str) -> int:
    try:
        return client.close_session(name)
    except errors.NotFound:
        return 0  # closed by somebody else
    except errors.AgentcgError as error:
        # The command's exit status matters more than this failure.
        say(f"agentcg: session {name} is not closed: {error}", file=sys.stderr)
        return 0


class _Forwarder:
    """A command, and the signals of a person or an init system that are passed on to it."""

    SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._forward) for number in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, argv: list[str]) -> int:
        """Run a command. Returns its exit status as a shell has it."""
        self._process = subprocess.Popen(argv)
        for number in self._early:
            self._process.send_signal(number)
        returncode = self._process.wait()
        return 128 - returncode if returncode < 0 else returncode

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        # ^C and ^\ reach the command from the terminal itself, so they are not sent a second time.
        elif number not in (signal.SIGINT, signal.SIGQUIT) or not _in_foreground():
            self._process.send_signal(number)


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
