"""Purposes of calls: the command without what an agent puts around it, and the agent's own name for
the tool call. By these a hook finds the report that it is to tell of.

Both are read from the process that enters the call. They name a report of the caller's own session
to itself, and decide nothing.
"""

from __future__ import annotations

from dataclasses import replace

from agentcgroup.text import printable
from agentcgroup.unwrap import CUT, command_of, kept
from agentcgroupd.bpf import abi
from agentcgroupd.host.proc import CMDLINE_BYTES_MAX, read_proc
from agentcgroupd.host.syscalls import pidfd_alive, process_stat
from agentcgroupd.intents.environment import ENVIRONMENT_BYTES_MAX
from agentcgroupd.state.process import Process
from agentcgroupd.state.purpose import Purpose
from agentcgroupd.state.session import Call

TOOL_USE_ID_CHARS_MAX = 128
PARENTS_MAX = 4
"""Most processes between a shell that an agent starts and a launcher in its script."""
TOOL_USE_ID_NAMES = (b"AGENTCG_TOOL_USE_ID=", b"CODEX_TOOL_CALL_ID=")
"""Variables in which an agent tells a command its tool call's name; the first one that is set."""


def purpose_of(call: Call, process: Process, came_from: Call | None) -> Purpose:
    """Find out what a call was begun for, by the process that has entered it. `came_from`: the call
    that this process was in before; None: in none."""
    if came_from is not None and came_from is not call and came_from.observed:
        around = came_from.purpose
        if around is not None:
            command = around.command or declared(call)
            return Purpose(command, around.tool_use_id, came_from.id)
    command = _observed(call, process.pid) if call.observed else ""
    return Purpose(command or declared(call), tool_use_id(process.pid))


def with_parents(call: Call, came_from: Call | None) -> None:
    """Complete the purpose of a call by the processes above the one that has entered it. They live
    on, so this can wait until that one has been answered."""
    if call.purpose is None or call.main is None or call.observed or came_from is not None:
        return
    parents = _parents(call.main.pid)
    if pidfd_alive(call.main.pidfd):
        call.purpose = replace(call.purpose, parents=parents)


def placed_later(call: Call) -> Purpose | None:
    """The purpose of a call that was declared by a command of an observed one, before that had its
    cgroup; None: it was not."""
    purpose = call.purpose
    if purpose is None or purpose.in_call_id or not purpose.parents:
        return None
    for other in call.session.calls.values():
        if other.observed and other.main is not None and other.main.pid in purpose.parents:
            around = other.purpose or Purpose()
            command = around.command or purpose.command
            return Purpose(command, around.tool_use_id or purpose.tool_use_id, other.id)
    return None


def _parents(pid: int) -> tuple[int, ...]:
    found = list[int]()
    try:
        while len(found) < PARENTS_MAX and pid > 1:
            pid = process_stat(pid).parent_pid
            found.append(pid)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended, and so has what it was started for
    return tuple(found)


def tool_use_id(pid: int) -> str:
    """The name that a process's agent has given its tool call; empty: none."""
    try:
        data = read_proc(pid, "environ", ENVIRONMENT_BYTES_MAX)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
    data = b"\0" + data
    for name in TOOL_USE_ID_NAMES:
        _, _, rest = data.partition(b"\0" + name)
        found = rest[: 4 * TOOL_USE_ID_CHARS_MAX].partition(b"\0")[0]
        if found:
            return printable(found.decode("utf-8", "replace"))[:TOOL_USE_ID_CHARS_MAX]
    return ""


def _observed(call: Call, pid: int) -> str:
    """The command of a process that nobody has declared, read whole: what an agent puts in front of
    it may be longer than what the kernel program passes on."""
    try:
        data = read_proc(pid, "cmdline", CMDLINE_BYTES_MAX)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    words = data.removesuffix(b"\0").decode("utf-8", "replace").split("\0")
    if not data or (words[:1] != list(call.argv[:1]) and not _is_head(call)):
        return ""  # it has become another program since, by the shell's own exec
    return kept(command_of(words), len(data) >= CMDLINE_BYTES_MAX)


def _is_head(call: Call) -> bool:
    """Whether the arguments that were seen of a call may not be all of them."""
    return sum(len(word.encode()) + 1 for word in call.argv) >= abi.ABI_ARGV_BYTES


def declared(call: Call) -> str:
    """The command of a call by the arguments that are kept of it."""
    if not call.argv:
        return ""
    return kept(command_of(call.argv), call.argv[-1].endswith(CUT))
