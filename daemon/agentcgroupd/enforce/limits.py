"""What a call's leaf is limited to, and which processes go first when memory ends."""

from __future__ import annotations

import logging
from dataclasses import replace

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.session import Session

log = logging.getLogger(__name__)


def write_grant(session: Session, cgroup: Cgroup, grant: Grant) -> Grant:
    """Set the interface files of a call's leaf; returns the grant, which names those that this
    kernel does not offer. Raises KnobError."""
    missing: list[str] = []

    def put(knob: knobs.Knob[knobs.T], value: knobs.T, wanted: bool) -> None:
        if not wanted:
            return
        if knob.file in session.offered:
            cgroup.write(knob, value)
        else:
            missing.append(knob.file)

    put(knobs.MEMORY_MAX, grant.memory_max_bytes, grant.memory_max_bytes is not None)
    put(knobs.MEMORY_HIGH, grant.memory_high_bytes, grant.memory_high_bytes is not None)
    if knobs.MEMORY_OOM_GROUP.file in session.offered:
        cgroup.write(knobs.MEMORY_OOM_GROUP, True)
    put(knobs.PIDS_MAX, grant.pids_max, grant.pids_max is not None)
    put(knobs.CPU_WEIGHT, grant.cpu_weight, grant.cpu_weight != 100)
    if grant.io_weight not in (None, 100) and knobs.IO_WEIGHT.file in session.offered:
        cgroup.write(knobs.IO_WEIGHT, grant.io_weight)
    if grant.cpu_max_millicores is not None:
        put(knobs.CPU_MAX, knobs.CpuMax(grant.cpu_max_millicores * 100), True)
    return replace(grant, not_enforced=tuple(missing)) if missing else grant


def rewrite_grant(session: Session, cgroup: Cgroup, old: Grant, new: Grant) -> Grant:
    """Set the interface files of an open call to its new grant, as `write_grant` does; limits that
    only the old one has are taken back. Raises KnobError."""
    granted = write_grant(session, cgroup, new)
    if new.memory_high_bytes is None and old.memory_high_bytes is not None:
        cgroup.write(knobs.MEMORY_HIGH, None)
    if new.cpu_max_millicores is None and knobs.CPU_MAX.file in session.offered:
        cgroup.write(knobs.CPU_MAX, knobs.CpuMax(None))
    if new.cpu_weight == 100 and old.cpu_weight != 100:
        cgroup.write(knobs.CPU_WEIGHT, 100)
    return granted


AGENT_OOM_SCORE_ADJ = -500
"""The value for an agent's own processes. Between it and the least that a call has lies the whole
limit: however much the agent holds, no process of it is chosen as long as one of a call is
there."""


def oom_score_adj(priority: int) -> int:
    """The value for the processes of a call: 600 for an important one, 750 for a normal one, 900
    for batch. So many thousandths of the limit that is reached are added to what a process holds
    (mm/oom_kill.c: oom_badness)."""
    return 1000 - 5 * priority


def set_oom_score_adj(pid: int, value: int) -> None:
    """Tell the kernel whom to choose when a limit above the calls is reached: a call, and the least
    important one, rather than the agent."""
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(value))
    except OSError as error:
        log.debug("oom_score_adj of %d: %s", pid, error)
