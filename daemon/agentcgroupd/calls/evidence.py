"""Reading the kernel's evidence of how a call ended, before its cgroup is removed."""

from __future__ import annotations

import logging
from dataclasses import replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.verdict import EndFacts
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.enforce.pause import paused_usec
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.host.syscalls import pidfd_ended, pidfd_exit_status, process_stat
from agentcgroupd.state.session import Call, Session, boottime_usec

log = logging.getLogger(__name__)


def main_status(call: Call) -> tuple[int | None, pb.Evidence.ValueType]:
    """Give the wait status of the main process, and who says so; None: it has not ended, or nobody
    knows."""
    if call.main is not None:
        status = pidfd_exit_status(call.main.pidfd)
        if status is None:
            status = _unreaped_status(call)
        if status is None:
            # It may have been reaped after its pidfd was asked and before /proc was.
            status = pidfd_exit_status(call.main.pidfd)
        if status is not None:
            return status, pb.EVIDENCE_KERNEL
    if call.exit_status is not None:
        return call.exit_status, pb.EVIDENCE_KERNEL
    if call.client_status is not None:
        return call.client_status, pb.EVIDENCE_CLIENT
    return None, pb.EVIDENCE_NONE


def _unreaped_status(call: Call) -> int | None:
    """Read the wait status from /proc, where it stands until the process has been waited for."""
    assert call.main is not None
    if not pidfd_ended(call.main.pidfd):
        # A main thread that has ended is a zombie as well while other threads of its live.
        return None
    try:
        stat = process_stat(call.main.pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Z: not yet waited for. X: being reaped now. exit_code is set in both.
    ended = stat.start_ticks == call.main.start_ticks and stat.state in "ZX"
    return stat.exit_status if ended else None


def gather(call: Call, pool: Cgroup) -> EndFacts:
    """Gather the facts that are known of an ended call."""
    status, evidence = main_status(call)
    base = EndFacts(
        grant=call.grant,
        wall_usec=max(0, boottime_usec() - call.began_boot_usec),
        # The record may be older than the entering: a daemon can be killed between the two.
        ever_entered=call.entered or status is not None,
        wait_status=status,
        evidence=evidence,
        ended_by=call.ended_by,
        ended_why=call.ended_why,
        leftovers=call.leftovers,
        session_max_bytes=call.session.limits.memory_max_bytes,
        frozen_usec=paused_usec(call),
        late_pauses=call.late_pauses,
    )
    try:
        return _with_counters(base, call, pool)
    except CgroupGone:
        return replace(base, ended_by=call.ended_by or "removed")
    except KnobError as error:
        log.warning("call %s: its counters could not be read: %s", call.id, error)
        return base


def oom_counts(session: Session, pool: Cgroup) -> tuple[int, int]:
    """Count OOM events at the session's and at the pool's own limit; 0 without a memory controller.
    Raises KnobError."""
    if knobs.MEMORY_EVENTS_LOCAL.file not in session.offered:
        return 0, 0
    local = knobs.MEMORY_EVENTS_LOCAL
    return session.cgroup.read(local)["oom"], pool.read(local)["oom"]


def _with_counters(facts: EndFacts, call: Call, pool: Cgroup) -> EndFacts:
    offered = call.session.offered

    def read(knob: knobs.Knob[knobs.T]) -> knobs.T | None:
        return call.cgroup.read(knob) if knob.file in offered else None

    events, pids_events = read(knobs.MEMORY_EVENTS), read(knobs.PIDS_EVENTS)
    pressure, io = call.cgroup.read_if(knobs.MEMORY_PRESSURE), read(knobs.IO_STAT)
    cpu = call.cgroup.read(knobs.CPU_STAT)
    oom_kills = events["oom_kill"] if events else None
    # Limits above are read only after a kill, which is rare: each call that ends comes here.
    session_ooms, pool_ooms = oom_counts(call.session, pool) if oom_kills else (0, 0)
    return replace(
        facts,
        oom_kills=oom_kills,
        call_ooms=events["oom"] if events else 0,
        session_ooms=session_ooms - call.session_ooms_before if oom_kills else 0,
        pool_ooms=pool_ooms - call.pool_ooms_before if oom_kills else 0,
        pool_max_bytes=pool.read_if(knobs.MEMORY_MAX) if oom_kills else None,
        memory_peak_bytes=read(knobs.MEMORY_PEAK),
        memory_high_events=events["high"] if events else None,
        memory_throttled_usec=pressure["some"].total_usec if pressure else None,
        cpu=cpu,
        ever_entered=facts.ever_entered or cpu["usage_usec"] > 0,
        pids_peak=read(knobs.PIDS_PEAK),
        pids_max_events=pids_events["max"] if pids_events else None,
        io_read_bytes=sum(d.get("rbytes", 0) for d in io.values()) if io is not None else None,
        io_write_bytes=sum(d.get("wbytes", 0) for d in io.values()) if io is not None else None,
    )
