"""`session open|adopt|set|close|list|run`: the operator's part."""

from __future__ import annotations

import argparse
from typing import Any

from agentcgroup import errors, paths
from agentcgroup.admin import Admin
from agentcgroup.types import SessionInfo

from . import common
from .output import complain, print_json, say
from .parser import Parser
from .status import print_sessions, run_sessions
from .summaries import summary

LIMITS = {
    "memory_low": ("SIZE", "memory guaranteed to it"),
    "memory_high": ("SIZE", "memory above which it is throttled"),
    "memory_max": ("SIZE", "memory that it may reach"),
    "cpu_weight": ("N", "its share of the CPUs, 1 to 10000 (default: by priority)"),
    "cpu_max": ("CORES", "cores that it may use"),
    "io_weight": ("N", "its share of block devices, 1 to 10000 (default: by priority)"),
    "io_latency": ("TIME", "how long its requests to disks may take before others wait, as 20ms"),
    "pids_max": ("N", "processes and threads that it may have"),
    "priority": ("PRIORITY", "how important it is"),
    "calls_max": ("N", "calls that may be open at the same time"),
    "exec_is_call": ("yes|no", "whether what is executed in it from outside is a call"),
}
"""What can be changed: the kind of value, and what it means."""
GPU_LIMITS = {
    "gpu": ("PERCENT", "a part of each GPU for the agent itself, such as 10%%"),
    "gpu_memory": ("SIZE", "GPU memory of it"),
    "gpu_priority": ("PRIORITY", "whose turn it is on the GPU"),
    "gpu_device": ("DEVICE", "any, any:2, an index, a UUID, or several with commas"),
}
FILES = {
    "memory_low": "memory.low",
    "memory_high": "memory.high",
    "memory_max": "memory.max",
    "cpu_weight": "cpu.weight",
    "cpu_max": "cpu.max",
    "pids_max": "pids.max",
    "io_weight": "io.weight",
    "io_latency": "io.latency",
}
"""Interface file that keeps each limit."""
NO_LIMIT = (
    "  `none` takes a limit away: of --memory-low, --memory-high, --memory-max, --cpu-max,\n"
    "  --io-latency\n"
)


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    verbs = common.group(subparsers, "session", summary("session"))
    parser = common.command(verbs, "open", run_open, "Open a session.", epilog=common.UNITS)
    _add_name(parser)
    _add_limits(parser, {**LIMITS, **GPU_LIMITS})
    _add_labels(parser)
    text = "Make a session of an existing cgroup, e.g. a container's."
    parser = common.command(verbs, "adopt", run_adopt, text, epilog=common.UNITS)
    _add_adopt(parser)
    text = "Change limits of an open session; what is not named stays."
    parser = common.command(verbs, "set", run_set, text, epilog=common.UNITS + NO_LIMIT)
    _add_name(parser)
    _add_limits(parser, LIMITS)
    text = "End a session and all in it; an adopted one is given back."
    _add_name(common.command(verbs, "close", run_close, text))
    common.command(verbs, "list", run_sessions, summary("sessions"))
    text = (
        "Open a session, run a command in it, pass on its exit status, close the session.\n"
        "The session ends with this command, however that comes to its end, unless --keep.\n"
        "With --json a JSON document follows the command's own output."
    )
    usage = "%(prog)s NAME [options] [--] COMMAND [ARGUMENT...]"
    parser = common.command(verbs, "run", run_run, text, usage=usage, epilog=common.UNITS)
    parser.usage_code = common.NOT_STARTED
    add_run_arguments(parser)
    parser.set_defaults(command=[])


def _add_name(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the session's name")


def add_run_arguments(parser: Parser) -> None:
    """Add the arguments of `session run` but for the command."""
    _add_name(parser)
    reuse = "use a session of that name that is open already, with the limits given here"
    parser.add_argument("--reuse", action="store_true", help=reuse)
    parser.add_argument("--keep", action="store_true", help="leave the session open afterwards")
    user = "run the command as this user, with the user's groups or GROUP alone"
    parser.add_argument("--user", metavar="USER[:GROUP]", help=user)
    _add_limits(parser, {**LIMITS, **GPU_LIMITS})
    _add_labels(parser)


def _add_adopt(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="what the session is to be called")
    which = parser.add_mutually_exclusive_group(required=True)
    path = "the cgroup: a path in the file system, or below the cgroup2 mount"
    which.add_argument("cgroup", nargs="?", metavar="CGROUP", help=path)
    which.add_argument("--pid", type=int, metavar="PID", help="the cgroup that this process is in")
    container = "the cgroup of this container of Docker or Podman: its name, or an id"
    which.add_argument("--container", metavar="ID", help=container)
    _add_limits(parser, {**LIMITS, **GPU_LIMITS})
    _add_labels(parser)


def _add_limits(parser: Parser, limits: dict[str, tuple[str, str]]) -> None:
    group = parser.add_argument_group("limits")
    for name, (metavar, text) in limits.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=text)


def _add_labels(parser: Parser) -> None:
    text = "what its use is added up by, as in `agentcg usage --by label`; several times: each"
    parser.add_argument(
        "--label", type=_label, action="append", dest="labels", metavar="KEY=VALUE", help=text
    )


def _label(text: str) -> tuple[str, str]:
    """Split a label; the daemon judges both halves."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no label: allowed is KEY=VALUE")
    return key, value


def _limits(args: argparse.Namespace) -> dict[str, Any]:
    names = (*LIMITS, *GPU_LIMITS)
    given: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    labels = getattr(args, "labels", None) or []
    for key, value in labels:
        if dict(labels)[key] != value:
            args.parser.error(f"label {key!r} is given twice: {value!r} and {dict(labels)[key]!r}")
    given["labels"] = dict(labels) or None
    return {name: value for name, value in given.items() if value is not None}


def _show(session: SessionInfo, args: argparse.Namespace) -> int:
    warn_of_limits(session, args)
    if args.json:
        print_json(session.to_dict())
    else:
        print_sessions([session])
    return common.OK


def warn_of_limits(session: SessionInfo, args: argparse.Namespace) -> None:
    """Say on stderr which of the limits that were asked for this host does not enforce."""
    lacking = [
        f"--{name.replace('_', '-')}"
        for name in _limits(args)
        if FILES.get(name) in session.not_enforced
    ]
    if lacking:
        what = "is" if len(lacking) == 1 else "are"
        complain(
            f"agentcg: warning: {', '.join(lacking)} {what} not enforced on this host "
            "(see 'agentcg doctor')"
        )


def run_open(args: argparse.Namespace) -> int:
    """Open a session and print it; returns the exit code, as every `run_` function."""
    with common.admin() as client:
        return _show(client.open_session(args.name, **_limits(args)), args)


def run_adopt(args: argparse.Namespace) -> int:
    """Make a session of a cgroup and print it."""
    from .adopt import cgroup_to_adopt

    path = cgroup_to_adopt(args.cgroup, args.pid, args.container)
    with common.admin() as client:
        try:
            session = client.adopt_session(args.name, path, **_limits(args))
        except errors.InvalidIntent as error:
            if error.field == "cgroup_path" and args.cgroup is None:
                # Nobody has typed that path.
                error.field = "pid" if args.pid is not None else "container"
                error.sentence = error.sentence.replace("cgroup_path:", f"{error.field}: cgroup", 1)
            raise
        return _show(session, args)


def run_set(args: argparse.Namespace) -> int:
    """Change limits of a session and print it."""
    limits = _limits(args)
    if not limits:
        args.parser.error("no limit is given")
    with common.admin() as client:
        return _show(client.update_session(args.name, **limits), args)


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
    from .forward import Forwarder, User

    if not args.command:
        args.parser.error("no command is given; usage: agentcg session run NAME [options] COMMAND")
    user = User.named(args.user) if args.user is not None else None
    launcher = paths.find_launcher()
    # From here on signals go to the command.
    with common.admin() as client, Forwarder() as forwarder:
        opened = _open_or_reuse(client, args)
        status, ended = common.NOT_STARTED, 0
        try:
            socket = paths.admin_attach_socket(client.run_dir)
            options = [f"--session={args.name}", f"--socket={socket}"]
            options += [f"--user={user.ids}"] if user is not None else []
            prefix = [launcher, *options, "--"]
            environment = user.environment() if user is not None else None
            status = forwarder.run([*prefix, *args.command], environment)
        finally:
            if opened and not args.keep:
                ended = _close(client, args.name, status)
    if args.json:
        result = {"session_id": args.name, "exit_status": status, "calls_ended": ended}
        print_json({**result, "kept": args.keep or not opened})
    return status


def _open_or_reuse(client: Admin, args: argparse.Namespace) -> bool:
    """Open the session; False where it was open already and --reuse allows that."""
    limits = _limits(args)
    try:
        session = client.open_session(args.name, end_with_caller=not args.keep, **limits)
    except errors.AlreadyExists:
        if not args.reuse:
            raise
        if limits:
            warn_of_limits(client.update_session(args.name, **limits), args)
        return False
    warn_of_limits(session, args)
    return True


def _close(client: Admin, name: str, status: int) -> int:
    """Close the session, and say why the command died where that is known. Returns how many calls
    were ended with it."""
    try:
        end = client.end_session(name)
    except errors.NotFound:
        return 0  # closed by somebody else
    except errors.AgentcgError as error:
        # The command's exit status matters more than this failure.
        complain(f"agentcg: session {name} is not closed: {error}")
        return 0
    if end.agent_sentence and status:
        complain(f"agentcg: session {name}: {end.agent_sentence}")
    return end.calls_ended
