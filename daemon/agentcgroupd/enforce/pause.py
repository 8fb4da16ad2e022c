"""Pauses of a call: a brake on its memory, then the freezer; and the way back.

The freezer stops a task on its way to user space. A task that takes memory inside one system call
(mmap with MAP_POPULATE, mlock, a large write to tmpfs) is not on that way until it has all of it.
memory.high below what the call holds stops such a task where it is charged (mm/memcontrol.c:
try_charge_memcg since Linux 5.18). So the brake comes first, and the freezer right after it.

The way back has the same order: first the brake is lifted, so that nobody who wakes is slowed by
it, then the call is thawed. Thawing also ends the sleep of a task in the charge path, which would
otherwise go on for up to two seconds (kernel/cgroup/freezer.c: cgroup_freeze_task wakes every
task).
"""

from __future__ import annotations

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.held import HeldKnob
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.enforce import memory_high
from agentcgroupd.errors import KnobError
from agentcgroupd.state.session import (
    Call,
    Session,
    boottime_usec,
    count_pause,
    frozen_usec,
)

BRAKE_SHARE = 0.95
"""Part of what a call holds that the brake leaves it. Measured on Linux 6.18 for a call of 150 MiB
that populates: 0.5 MiB more at 0.95, 1.8 at 0.98, 4.2 at 1.0. At less than 1.25 % above memory.high
nobody sleeps (mm/memcontrol.c: __mem_cgroup_handle_over_high leaves out waits below 10 ms)."""
LATE_USEC = 100_000
"""A pause that has not stopped all tasks after this time is counted."""


def stop(call: Call, usage_bytes: int | None) -> None:
    """Brake and freeze a call. `usage_bytes`: what it holds; None: not known, and then it is
    only frozen. Raises KnobError, or CgroupGone."""
    if usage_bytes is not None:
        brake(call, usage_bytes)
    call.cgroup.write(knobs.CGROUP_FREEZE, True)
    call.frozen_since_usec = call.paused_at_usec = boottime_usec()
    call.stopped = call.counted_late = False


def brake(call: Call, usage_bytes: int) -> None:
    """Hold a call's memory a little below what it holds. Raises KnobError, or CgroupGone."""
    call.bounds.brake_bytes = int(usage_bytes * BRAKE_SHARE)
    memory_high.write(call)


def release(call: Call) -> None:
    """Lift the brake of a call and thaw it, unless others hold it frozen. Raises KnobError, or
    CgroupGone."""
    call.bounds.brake_bytes = None
    memory_high.write(call)
    if not call.held_frozen:
        call.cgroup.write(knobs.CGROUP_FREEZE, False)
    now = boottime_usec()
    since, call.frozen_since_usec = call.frozen_since_usec, None
    if since is not None:
        count_pause(call, since, now)
    call.resumed_at_usec = now
    call.stopped = call.counted_late = False


def wake(call: Call) -> None:
    """End the sleep of tasks that wait at a memory.high that has been raised since: raising it does
    not, but thawing wakes every task. Raises KnobError, or CgroupGone."""
    if call.frozen_since_usec is None and not call.held_frozen:
        call.cgroup.write(knobs.CGROUP_FREEZE, True)
        call.cgroup.write(knobs.CGROUP_FREEZE, False)


def is_late(call: Call) -> bool:
    """Look whether all tasks of a paused call have stopped; `call.stopped` says so from then on.
    Returns whether it is late, once for each pause. Raises KnobError, or CgroupGone."""
    if call.cgroup.read(knobs.CGROUP_EVENTS).get("frozen") == 1:
        call.stopped = True
        return False
    passed_usec = boottime_usec() - (call.frozen_since_usec or 0)
    if call.counted_late or passed_usec < LATE_USEC:
        return False
    call.counted_late = True
    call.late_pauses += 1
    return True


def paused_usec(call: Call) -> int:
    """Return for how long a call could not run through no doing of its own: the daemon had frozen
    it, or its session was frozen, as when a container is paused. A freeze of the call's own cgroup
    by others is not counted: a tool that may write there could put off its timeout for ever."""
    ours, counted = _ours_usec(call), _counted_usec(call.cgroup)
    if counted is None:
        return ours
    above = session_frozen_usec(call.session) - call.session_frozen_usec
    return max(ours, min(counted, ours + above))


def frozen_by_others_usec(call: Call) -> int:
    """Return for how long a call was frozen by others than the daemon, at its own cgroup or above
    it, where the kernel tells it (cgroup.stat.local)."""
    if knobs.CGROUP_STAT_LOCAL.file not in call.session.offered:
        return 0
    counted = _counted_usec(call.cgroup)
    return 0 if counted is None else max(0, counted - _ours_usec(call))


def session_frozen_usec(session: Session) -> int:
    """Return for how long a session has been frozen in all, where the kernel tells it; else 0."""
    if knobs.CGROUP_STAT_LOCAL.file not in session.offered:
        return 0
    if session.frozen_file is None:
        session.frozen_file = HeldKnob(session.cgroup, knobs.CGROUP_STAT_LOCAL)
    try:
        counted = session.frozen_file.read_if()
    except KnobError:
        return 0
    return 0 if counted is None else counted.get("frozen_usec", 0)


def take_up(call: Call) -> None:
    """Count the pause of a call that an earlier daemon had frozen and that goes on meanwhile."""
    since, counted = call.frozen_since_usec, _counted_usec(call.cgroup)
    call.frozen_since_usec = None
    if since is not None and counted is not None:
        longest = call.frozen_usec + boottime_usec() - since
        call.frozen_usec = max(call.frozen_usec, min(longest, counted))


def _ours_usec(call: Call) -> int:
    """Count the time for which the daemon has frozen a call, the present pause included."""
    return frozen_usec(call, boottime_usec()) + call.sliced_usec


def _counted_usec(cgroup: Cgroup) -> int | None:
    """Read for how long a cgroup has been frozen, by itself or from above; None: the kernel does
    not count it, or the cgroup is gone."""
    try:
        counted = cgroup.read_if(knobs.CGROUP_STAT_LOCAL)
    except KnobError:
        return None
    return None if counted is None else counted.get("frozen_usec", 0)
