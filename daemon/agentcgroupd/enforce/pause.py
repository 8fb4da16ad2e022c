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
from agentcgroupd.enforce import memory_high
from agentcgroupd.errors import KnobError
from agentcgroupd.state.session import Call, boottime_usec

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
    if not call.held_for_slice:
        call.cgroup.write(knobs.CGROUP_FREEZE, False)
    now = boottime_usec()
    if call.frozen_since_usec is not None:
        call.frozen_usec += now - call.frozen_since_usec
    call.frozen_since_usec, call.resumed_at_usec = None, now
    call.stopped = call.counted_late = False


def wake(call: Call) -> None:
    """End the sleep of tasks that wait at a memory.high that has been raised since: raising it does
    not, but thawing wakes every task. Raises KnobError, or CgroupGone."""
    if call.frozen_since_usec is None and not call.held_for_slice:
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
    """Return for how long a call has been frozen in all: by the kernel's own count where it keeps
    one (cgroup.stat.local), which goes on while no daemon runs; else by the daemon's."""
    ours = call.frozen_usec
    if call.frozen_since_usec is not None:
        ours += boottime_usec() - call.frozen_since_usec
    try:
        counted = call.cgroup.read_if(knobs.CGROUP_STAT_LOCAL)
    except KnobError:
        counted = None  # the cgroup is gone
    return ours if counted is None else max(ours, counted.get("frozen_usec", 0))
