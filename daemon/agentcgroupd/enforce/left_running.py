"""What a command leaves running, and by which way each process has outlived it: it made a session
of its own (setsid), its parent has ended (a double fork, or a job in the background), or neither.

All of these stay in the call's cgroup, whatever they do; the report names them.
"""

from __future__ import annotations

from agentcgroup.text import printable
from agentcgroupd.errors import KnobError
from agentcgroupd.host.proc import program_name
from agentcgroupd.host.syscalls import process_stat
from agentcgroupd.state.session import Call, unix_usec

NAMED_MOST = 4
"""How many processes are named."""
LOOKED_AT_MOST = 64
"""How many are looked at."""


SAID = "the command left running "


def note_left_running(call: Call, pids: list[int]) -> None:
    """Take down which of the processes in a call goes on though its command has ended, once."""
    if any(fact.what.startswith(SAID) for fact in call.account.facts):
        return
    usual = _usual_sessions(call)
    inside = set(pids)
    named = []
    for pid in pids[:LOOKED_AT_MOST]:
        try:
            stat, name = process_stat(pid), printable(program_name(pid))
        except (FileNotFoundError, ProcessLookupError):
            continue
        ways = []
        if stat.session not in usual:
            ways.append("in a session of its own (setsid)")
        if stat.parent_pid not in inside:
            ways.append(f"its parent has ended, process {stat.parent_pid} has it now")
        elif not ways:
            ways.append("a child of another one")
        named.append(f"{name} ({pid}): {', '.join(ways)}")
        if len(named) == NAMED_MOST:
            break
    if not named:
        return
    more = f"; and {len(pids) - len(named)} more" if len(pids) > len(named) else ""
    text = f"{SAID}{'; '.join(named)}{more}"
    call.account.add(text, "/proc/<pid>/stat", unix_usec())


def _usual_sessions(call: Call) -> set[int]:
    """The sessions that a command is in without doing anything for it: that of its main process,
    which may have been started as the first of one, and those of the agent."""
    found = {call.main.pid} if call.main is not None else set()
    try:
        for pid in call.session.agent.procs()[:LOOKED_AT_MOST]:
            try:
                found.add(process_stat(pid).session)
            except (FileNotFoundError, ProcessLookupError):
                continue
    except KnobError:
        pass  # the agent has ended; then each counts as one of its own
    return found
