"""What a killed call that is not over waits for, in words."""

from __future__ import annotations

from agentcgroupd.enforce.outside import place_outside
from agentcgroupd.enforce.tracers import kept_by
from agentcgroupd.errors import KnobError
from agentcgroupd.host.syscalls import wait_channel
from agentcgroupd.state.session import Call, all_inside


def stuck_words(call: Call) -> str:
    """Say which processes of a killed call are still there, and where they wait."""
    try:
        found = call.cgroup.all_procs()
    except KnobError as error:
        return f"its processes cannot be read: {error}"
    for each in (call, *all_inside(call)):
        if each.main is not None and place_outside(each) is not None:
            found.append(each.main.pid)
    waits = [_waits(pid) for pid in found[:3]]
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(waits) + more if waits else "its cgroup still counts as populated"


def _waits(pid: int) -> str:
    return kept_by(pid) or f"process {pid} waits in the kernel at {wait_channel(pid)}"
