"""`exec`: its options, for the help and the completion. The launcher in C reads them itself."""

from __future__ import annotations

from . import common
from .summaries import summary

INTENT = {
    "memory": ("SIZE", "memory that it is expected to use"),
    "memory_max": ("SIZE", "memory that it may reach"),
    "cpu_weight": ("N", "its share of the CPUs, 1 to 10000 (default: by priority)"),
    "cpu_max": ("CORES", "cores that it may use"),
    "pids_max": ("N", "processes and threads that it may have"),
    "timeout": ("TIME", "how long it may run"),
    "priority": ("PRIORITY", "how important it is"),
    "on_pressure": ("WHAT", "what it would rather suffer: freeze, deny, throttle or kill"),
    "hint": ("HINT", "the older form of an intent, such as memory:2g"),
    "wait": ("TIME", "how long it may wait for room, then it is refused; 0: not at all"),
    "cpuset": ("LIST", "CPUs, such as 0-3,8"),
    "leftovers": ("WHAT", "what becomes of what the command leaves running: end or keep"),
    "gpu": ("PERCENT", "a part of each GPU, such as 10%%"),
    "gpu_memory": ("SIZE", "GPU memory of it"),
    "gpu_priority": ("PRIORITY", "whose turn it is on the GPU"),
    "gpu_device": ("DEVICE", "any, any:2, an index, a UUID, or several with commas"),
    "io_read_max": ("SIZE", "bytes a second that it may read from each block device"),
    "io_write_max": ("SIZE", "bytes a second that it may write to each block device"),
    "io_weight": ("N", "its share of block devices, 1 to 10000 (default: as --cpu-weight)"),
    "net_send_max": ("SIZE", "bytes a second that its sockets may send"),
    "disk_max": ("SIZE", "bytes that it may write to disks in all; then it is ended"),
}
"""Fields of an intent: the kind of value, and what it means."""

OTHERS = {
    "name": ("NAME", "what the call is called (default: the command's file name)"),
    "call": ("ID", "run the command in this open call"),
    "session": ("ID", "run the command as the agent of this session (root)"),
    "user": ("UID:GID[:GID,...]", "with --session: the user and the groups, by number"),
    "socket": ("PATH", "the daemon's attach socket"),
    "on_unavailable": ("WHAT", "what to do where the daemon is away: run or refuse"),
}
FLAGS = {
    "own_group": "give the command a process group of its own, unless there is a terminal",
    "quiet": "no word about what the call got, and how it ended",
}


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's command."""
    text = summary("exec")
    usage = "%(prog)s [options] [--] COMMAND [ARGUMENT...]"
    parser = subparsers.add_parser(
        "exec", help=text, description=text, usage=usage, epilog=common.UNITS
    )
    parser.add_argument("--version", action="store_true", help="print its version")
    for title, options in (("intent", INTENT), ("call and daemon", OTHERS)):
        group = parser.add_argument_group(title)
        for name, (metavar, help_text) in options.items():
            group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=help_text)
    for name, help_text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=help_text)
    parser.set_defaults(run=common.helping(parser), parser=parser)
