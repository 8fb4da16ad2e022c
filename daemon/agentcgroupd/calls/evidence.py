"""Reading the kernel's evidence of how a call ended, before its cgroup is removed."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.counters import (
    Counted,
    Counters,
    ended_as_a_whole,
    memory_hits,
    pids_hits,
    shown,
    swap_hit,
)
from agentcgroupd.calls.delays import delays_of
from agentcgroupd.calls.devices import devices_of
from agentcgroupd.calls.facts import EndFacts, OomFacts
from agentcgroupd.calls.words import at_least, limit_words
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.enforce.outside import outside_path
from agentcgroupd.enforce.pause import frozen_by_others_usec
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.host.kernel_log import OomLog
from agentcgroupd.host.syscalls import (
    cgroup_is_gone,
    pidfd_ended,
    pidfd_exit_status,
    pidfd_info,
    process_stat,
)
from agentcgroupd.sessions.holding import held_by
from agentcgroupd.state.ending import Left
from agentcgroupd.state.session import (
    Call,
    boottime_usec,
    disk_usec,
    frozen_usec,
    operator_usec,
    unix_usec,
)

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


def gather(call: Call, pool: Cgroup, oom_log: OomLog) -> EndFacts:
    """Gather the facts that are known of an ended call, and add those of its end to its account."""
    status, evidence = main_status(call)
    outside = _note_place_of_end(call, pool)
    account = call.account
    base = EndFacts(
        grant=call.grant,
        wall_usec=max(0, boottime_usec() - call.began_boot_usec),
        # The record may be older than the entering: a daemon can be killed between the two. The
        # caller's word is none for it: its process may have failed before it could enter.
        ever_entered=call.entered or evidence == pb.EVIDENCE_KERNEL,
        wait_status=status,
        evidence=evidence,
        asked=tuple(account.asked),
        main_killed=account.main_killed,
        main_lives=call.main is not None and status is None and not pidfd_ended(call.main.pidfd),
        main_lost=account.main_lost,
        removed=account.removed,
        left=tuple(account.left),
        gone=tuple(account.gone),
        gone_count=account.gone_count,
        gone_more=account.gone_more,
        gone_before=account.gone_before,
        left_before=tuple(account.left_before),
        left_lives=frozenset(p.pid for p in call.left_mains if not pidfd_ended(p.pidfd)),
        outside=outside,
        commands=account.commands,
        cpus_seen=call.cpus_seen,
        session_cpu_millicores=call.session.limits.cpu_max_millicores,
        frozen_usec=frozen_usec(call, boottime_usec()),
        frozen_by_others_usec=frozen_by_others_usec(call),
        operator_usec=operator_usec(call),
        disk_usec=disk_usec(call),
        late_pauses=call.late_pauses,
    )
    try:
        found = _with_counters(base, call, pool, oom_log)
    except CgroupGone:
        found = replace(base, removed=True)
    except KnobError as error:
        log.warning("call %s: its counters could not be read: %s", call.id, error)
        found = base
    _add_facts(call, found)
    return found


def _note_place_of_end(call: Call, pool: Cgroup) -> bool | None:
    """Take down where the main process ended, if that was outside of its call: it may have left
    while others stayed, or a moment before its end, when nobody looked for it. Returns whether it
    ended outside, as far as is known; None: in a cgroup that has been removed since."""
    seen = call.account.left[-1] if call.account.left else None
    was_seen = seen is not None and not seen.moved_back
    found = None if call.main is None else pidfd_info(call.main.pidfd).cgroup_id
    if call.main is None or found is None:
        return was_seen
    if found in (call.cgroup.id, call.leaf.id):
        return False
    path = outside_path(call, pool, found)
    if path is None:
        return was_seen or (None if cgroup_is_gone(pool.dir_fd, found) else False)
    if seen is None or seen.moved_back or seen.path != shown(path):
        left = Left(call.main.pid, shown(path), unix_usec())
        call.account.left.append(left)
        text = f"the main process ({left.pid}) ended in {left.path}"
        call.account.add(text, "PIDFD_GET_INFO", left.at_unix_usec)
    return True


_SOURCES = {
    pb.EVIDENCE_KERNEL: "the kernel's wait status",
    pb.EVIDENCE_CLIENT: "EndCall",
}


def _add_facts(call: Call, facts: EndFacts) -> None:
    account, now = call.account, unix_usec()
    name = "the main process" if call.main is None else f"the main process ({call.main.pid})"
    if facts.wait_status is not None:
        source = _SOURCES[facts.evidence]
        if facts.signal is not None:
            account.add(f"{name} died of signal {facts.signal}", source, now)
        else:
            account.add(f"{name} ended with status {facts.exit_code}", source, now)
    if facts.removed:
        account.add("the call's cgroup was removed by someone else", "cgroup", now)
    oom = facts.oom
    if oom.kills or oom.kills_before:
        count = at_least(oom.least + oom.least_before, oom.kills + oom.kills_before)
        text = f"the kernel's OOM killer ended {count} of the call"
        account.add(text, "memory.events", now)
    if oom.whole:
        account.add("it ended the call as a whole", "memory.events.local", now)
    for hit in oom.hits:
        account.add(f"{limit_words(hit)} ({hit.times})", "memory.events.local", now, hit.level)
    if oom.kills and not oom.hits:
        text = "no limit of memory was reached from the call up to the root"
        account.add(text, "memory.events.local", now, pb.LEVEL_HOST)
    for hit in facts.pids_hits:
        most = "unknown" if hit.limit is None else hit.limit
        text = f"a process or thread was refused at a limit of {most} ({hit.times})"
        account.add(text, "pids.events", now, hit.level)


def _with_counters(facts: EndFacts, call: Call, pool: Cgroup, oom_log: OomLog) -> EndFacts:
    offered = call.session.offered

    def read(knob: knobs.Knob[knobs.T]) -> knobs.T | None:
        return call.cgroup.read(knob) if knob.file in offered else None

    def read_if(knob: knobs.Knob[knobs.T]) -> knobs.T | None:
        """For files that are there and cannot be read where PSI is switched off."""
        return call.cgroup.read_if(knob) if knob.file in offered else None

    events, pids_events = read(knobs.MEMORY_EVENTS), read(knobs.PIDS_EVENTS)
    pressure, io = read_if(knobs.MEMORY_STALLED), read(knobs.IO_STAT)
    cpu, pids_peak = call.cgroup.read(knobs.CPU_STAT), read(knobs.PIDS_PEAK)
    counters = Counters.read(call, pool, events or {}, pids_events or {})
    in_all = counters.since(call.account.began)
    oom = _oom_facts(call, pool, counters, in_all, oom_log)
    if facts.outside and facts.signal == signal.SIGKILL:
        # What this call's counters say is not of the cgroup that it was in.
        oom = replace(oom, main_chosen=_main_chosen(call, None, oom_log))
    return replace(
        facts,
        oom_kills=oom.least + oom.least_before if events else None,
        oom=oom,
        pids_hits=tuple(pids_hits(call, in_all, pids_peak)),
        memory_peak_bytes=read(knobs.MEMORY_PEAK),
        memory_high_events=events["high"] if events else None,
        memory_throttled_usec=pressure["some"] if pressure else None,
        cpu=cpu,
        ever_entered=facts.ever_entered or cpu["usage_usec"] > 0,
        pids_peak=pids_peak,
        pids_max_events=pids_events["max"] if pids_events else None,
        io_read_bytes=sum(d.get("rbytes", 0) for d in io.values()) if io is not None else None,
        io_write_bytes=sum(d.get("wbytes", 0) for d in io.values()) if io is not None else None,
        devices=devices_of(io or {}),
        delays=delays_of(read_if, pressure),
    )


def _oom_facts(
    call: Call, pool: Cgroup, counters: Counters, in_all: Counted, oom_log: OomLog
) -> OomFacts:
    """What the kernel's OOM killer did to a call. `in_all`: what was counted since the call began.
    Raises KnobError."""
    account = call.account
    counted = in_all if account.baseline is None else counters.since(account.baseline)
    kills = counted.below.oom_kills
    now = counters.now.below
    found = OomFacts(
        kills_before=now.oom_kills - kills,
        groups_before=now.group_kills - counted.below.group_kills,
    )
    if account.baseline is not None and now.oom_kills:
        found = replace(found, hits_before=tuple(memory_hits(call, in_all)))
    if not kills:
        return found
    hits = tuple(memory_hits(call, counted))
    if not hits and found.hits_before:
        # The kernel kills a group process by process, and counts each (mm/oom_kill.c:
        # oom_kill_memcg_member). It may still be at that when the earlier command has ended and
        # this one enters, which may then be killed too, by the limit that the earlier one reached.
        if not _main_chosen(call, kills, oom_log):
            return replace(
                found,
                kills_before=now.oom_kills,
                groups_before=now.group_kills,
            )
        hits = found.hits_before
    at_session = bool(hits) and hits[0].level == pb.LEVEL_SESSION
    whole = ended_as_a_whole(call, counted, hits)
    # One above the call is not counted in it, and before Linux 5.17 none is.
    above = sum(counts.group_kills for _, counts in counted.above)
    groups = max(counted.below.group_kills + above, int(whole))
    if max(1, kills - groups) <= len(account.victims) <= kills:
        kills, groups = len(account.victims), 0  # by their pids
    return replace(
        found,
        kills=kills,
        groups=groups,
        whole=whole,
        main_chosen=_main_chosen(call, kills, oom_log),
        hits=hits,
        swap=swap_hit(call, pool),
        held=held_by(call.session, call) if at_session else None,
    )


def _main_chosen(call: Call, kills: int | None, oom_log: OomLog) -> bool | None:
    """Whether the kernel's OOM killer chose the main process; None: not known. `kills`: how many it
    chose where that was."""
    victims, main = call.account.victims, call.main
    if main is None or main.pid in victims:
        return None if main is None else True
    if kills is not None and len(victims) >= kills:
        return False
    chose = oom_log.chose(main.pid)
    if chose:
        call.account.note_victim(main.pid, "the main process", "/dev/kmsg", unix_usec())
    return chose
