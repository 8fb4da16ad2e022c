"""What a decision does to a call, a session or the pool: it is written to the kernel, and told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.enforce import disks, memory_high, pause
from agentcgroupd.enforce.kill import ask_end, kill
from agentcgroupd.enforce.reclaimer import (
    ANON_FIRST,
    CACHE_ONLY,
    CacheHolder,
    Reclaimer,
    Swappiness,
)
from agentcgroupd.errors import BpfError, CgroupGone, KnobError
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.session import (
    Call,
    Session,
    all_inside,
    boottime_usec,
    count_pause,
    unix_usec,
)
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.units import show_bytes, show_usec

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Actions:
    """Writes decisions to the kernel; each is told by `notices` once it is done."""

    notices: Notices
    memory: Callable[[], MemoryPrograms | None]
    """The memory programs now; None: growth cannot be denied here."""
    hurry: Callable[[Call], None]
    """Lets a call that is about to be frozen or killed come to where it holds no lock of the
    kernel's."""
    reclaimer: Reclaimer = field(default_factory=Reclaimer)
    touched: Callable[[Call], None] = lambda call: None
    """Told of each call that something was done to."""
    disks_lowered: dict[str, Call] = field(default_factory=dict)
    """Calls whose use of disks was held back, by their ids. Whoever looks at them takes out those
    of which that is no longer so."""

    # Of a call

    def freeze(self, call: Call, why: str) -> None:
        """Pause a call; no error if it is paused already. Raises KnobError, or CgroupGone."""
        if call.frozen_since_usec is not None or call.state == pb.CALL_STATE_ENDING:
            return
        self.hurry(call)
        holds = memory_high.can_hold(call)
        pause.stop(call, call.cgroup.read(knobs.MEMORY_CURRENT) if holds else None)
        for each in (call, *all_inside(call)):
            _note_frozen(each)
        self.touched(call)
        self.notices.acted_on_call("freeze", call, why, pb.FEEDBACK_CODE_FROZEN)
        call.cgroup.set_xattr(call.record())

    def thaw(self, call: Call, why: str) -> None:
        """Let a paused call go on; no error if it runs. Raises KnobError, or CgroupGone."""
        if call.frozen_since_usec is None:
            return
        pause.release(call)
        for each in (call, *all_inside(call)):
            _note_thawed(each)
        self.touched(call)
        self.notices.acted_on_call("thaw", call, why, pb.FEEDBACK_CODE_THAWED)
        call.cgroup.set_xattr(call.record())

    def hold(self, call: Call, why: str) -> None:
        """Pause a call for the operator, whatever else pauses it; no error if it is held already.
        Raises KnobError, or CgroupGone."""
        if call.operator_since_usec is not None:
            return
        self.hurry(call)
        call.cgroup.write(knobs.CGROUP_FREEZE, True)
        call.operator_since_usec = boottime_usec()
        self.notices.acted_on_call("hold", call, why, pb.FEEDBACK_CODE_FROZEN)

    def unhold(self, call: Call, why: str) -> None:
        """End the operator's pause of a call; no error if there is none. Raises KnobError, or
        CgroupGone."""
        since = call.operator_since_usec
        if since is None:
            return
        call.operator_since_usec, took = None, boottime_usec() - since
        call.operator_usec += took
        said = f"the operator held it paused for {show_usec(took)}"
        call.account.add(said, "PauseCall", unix_usec())
        if call.frozen_since_usec is not None:
            call.frozen_since_usec = min(call.frozen_since_usec, since)
        else:
            count_pause(call, since, since + took)
            if not call.held_frozen:
                call.cgroup.write(knobs.CGROUP_FREEZE, False)
        self.notices.acted_on_call("unhold", call, why, pb.FEEDBACK_CODE_THAWED)

    def disk_hold(self, call: Call, why: str) -> None:
        """Pause a call because a file system that it writes to is filling, whatever else pauses it;
        no error if that is so already. Raises KnobError, or CgroupGone."""
        if call.disk_since_usec is not None or call.state == pb.CALL_STATE_ENDING:
            return
        self.hurry(call)
        call.cgroup.write(knobs.CGROUP_FREEZE, True)
        call.disk_since_usec = boottime_usec()
        self.notices.acted_on_call("disk_hold", call, why, pb.FEEDBACK_CODE_FROZEN)

    def disk_unhold(self, call: Call, why: str) -> None:
        """End such a pause; no error if there is none. Raises KnobError, or CgroupGone."""
        since, now = call.disk_since_usec, boottime_usec()
        if since is None:
            return
        call.disk_since_usec = None
        call.disk_usec += now - since
        count_pause(call, since, now)
        if call.frozen_since_usec is None and not call.held_frozen:
            call.cgroup.write(knobs.CGROUP_FREEZE, False)
        self.notices.acted_on_call("disk_unhold", call, why, pb.FEEDBACK_CODE_THAWED)

    def check_pause(self, call: Call) -> None:
        """Look whether a paused call has stopped, and count it where it takes long: it may be
        taking memory still, inside a system call. No error if it runs. Raises KnobError, or
        CgroupGone."""
        if call.frozen_since_usec is None or call.stopped or not pause.is_late(call):
            return
        self.notices.metrics.late_pauses.inc()
        self.notices.audit.write(
            "pause_late",
            session=call.session.id,
            call=call.id,
            braked=call.bounds.brake_bytes is not None,
            passed_usec=boottime_usec() - call.frozen_since_usec,
        )

    def deny(self, call: Call, why: str) -> None:
        """Let a call have what it has and no more; no error if that is so already. Raises
        CgroupGone or BpfError."""
        memory = self.memory()
        if call.denied_at_bytes is not None or call.state == pb.CALL_STATE_ENDING or memory is None:
            return
        usage = call.cgroup.read(knobs.MEMORY_CURRENT)
        memory.deny_above(call.cgroup.id, usage)
        call.refused_before = self.refused(call)
        call.denied_at_bytes, call.was_denied = usage, True
        self.touched(call)
        self.notices.acted_on_call("deny", call, why, pb.FEEDBACK_CODE_GROWTH_DENIED)

    def refused(self, call: Call) -> int:
        """How often a call has been refused memory so far. Raises BpfError."""
        memory = self.memory()
        state = None if memory is None else memory.state(call.cgroup.id)
        return 0 if state is None else state.denied

    def allow(self, call: Call, why: str) -> None:
        """Let a call grow again; no error if it may. Raises BpfError."""
        memory = self.memory()
        if call.denied_at_bytes is None or memory is None:
            return
        memory.allow(call.cgroup.id)
        call.denied_at_bytes = None
        self.touched(call)
        self.notices.acted_on_call("allow", call, why, pb.FEEDBACK_CODE_GROWTH_ALLOWED)

    def throttle(self, call: Call, slack_bytes: int, why: str, *, by_cpu: bool = False) -> None:
        """Let a call have what it has and `slack_bytes`; beyond, it is slowed: by the CPU scheduler
        where there is ours, and, unless that is to do alone, while its cold memory is swapped out.
        No error if that is so already. Raises KnobError or BpfError."""
        if call.throttled_at_bytes is not None or call.state == pb.CALL_STATE_ENDING:
            return
        usage = call.cgroup.read(knobs.MEMORY_CURRENT)
        high = min(usage + slack_bytes, call.grant.memory_high_bytes or usage + slack_bytes)
        if memory := self.memory():
            memory.set_throttle_mark(call.cgroup.id, high, strict=by_cpu)
        if not by_cpu:
            call.bounds.throttle_bytes = high
            memory_high.write(call)
        call.throttled_at_bytes = usage
        self.touched(call)
        self.notices.acted_on_call("throttle", call, why, pb.FEEDBACK_CODE_MEMORY_THROTTLED)

    def unthrottle(self, call: Call, why: str) -> None:
        """Set memory.high as granted and take the mark away; no error if that is so. Raises
        KnobError."""
        if call.throttled_at_bytes is None:
            return
        call.bounds.throttle_bytes = None
        memory_high.write(call)
        call.throttled_at_bytes = None
        try:
            if memory := self.memory():
                memory.set_throttle_mark(call.cgroup.id, 0)
        except BpfError as error:
            log.warning("call %s is still slowed above its mark: %s", call.id, error)
        self.touched(call)
        self.notices.acted_on_call("unthrottle", call, why, None)

    def io_weight(self, call: Call, percent: int, why: str) -> None:
        """Leave a call `percent` of its weight for disks; no error if that is so already. Raises
        KnobError, or CgroupGone."""
        if call.disks.weight_since_usec is None and disks.lower_weight(call, percent):
            self.disks_lowered[call.id] = call
            self.notices.acted_on_call("io_weight", call, why, pb.FEEDBACK_CODE_IO_LOWERED)

    def io_unweight(self, call: Call, why: str) -> None:
        """Give a call its weight for disks again; no error if it has it. Raises KnobError, or
        CgroupGone."""
        if call.disks.weight_since_usec is not None:
            disks.restore_weight(call)
            self.notices.acted_on_call("io_unweight", call, why, pb.FEEDBACK_CODE_IO_RESTORED)

    def io_max(self, call: Call, rate: int, why: str) -> None:
        """Hold a call to so many bytes a second of each disk that it uses; no error if it is held
        already. Raises KnobError, or CgroupGone."""
        if call.disks.held_since_usec is None and disks.hold(call, rate):
            self.disks_lowered[call.id] = call
            self.notices.acted_on_call("io_max", call, why, pb.FEEDBACK_CODE_IO_LOWERED)

    def io_unmax(self, call: Call, why: str) -> None:
        """Hold a call to no more than its grant says; no error if that is so. Raises KnobError, or
        CgroupGone."""
        if call.disks.held_since_usec is not None:
            disks.let_go(call)
            self.notices.acted_on_call("io_unmax", call, why, pb.FEEDBACK_CODE_IO_RESTORED)

    def take_up(self, call: Call) -> None:
        """Let a call that was found again go on as granted: an earlier daemon may have been killed
        while it had slowed or paused the call. Raises KnobError."""
        memory_high.take_up(call)
        disks.take_up(call)
        # cgroup.freeze says what was asked for: a process that sleeps in the kernel may not have
        # stopped yet.
        if not call.cgroup.read(knobs.CGROUP_FREEZE):
            pause.take_up(call)
        else:
            call.frozen_since_usec = call.frozen_since_usec or boottime_usec()
            self.thaw(call, "The daemon was restarted; what it had paused goes on.")

    def kill(self, call: Call, why: str, action: str = "kill") -> None:
        """End a call by policy. `action`: what that is called in the log and the metrics. Raises
        CgroupGone."""
        ask_end(call, Asker.POLICY, why)
        call.state = pb.CALL_STATE_ENDING
        call.held = False
        self.hurry(call)
        kill(call)
        self.touched(call)
        self.notices.acted_on_call(action, call, why, None)

    def let_go(self, call: Call, why: str) -> None:
        """Undo what keeps a call, or its session, from going on without the daemon."""
        call.bounds.credit_bytes = None
        undo: tuple[Callable[[], None], ...] = (
            lambda: memory_high.write(call),
            lambda: self.unhold(call, why),
            lambda: self.disk_unhold(call, why),
            lambda: self.io_unmax(call, why),
            lambda: self.io_unweight(call, why),
            lambda: self.thaw(call, why),
            lambda: self.unthrottle(call, why),
            lambda: self.restore(call.session, why),
        )
        for step in undo:
            try:
                step()
            except CgroupGone:
                log.debug("call %s is gone", call.id)
            except KnobError as error:
                log.error("call %s may stay held back: %s", call.id, error)

    # Of a session

    def reclaim(
        self, session: Session, size_bytes: int, calls: Iterable[Call], why: str
    ) -> asyncio.Task[int]:
        """Take memory of a session back: from its agent leaf, until one of its calls begins; or
        from the given calls, as long as they are paused.

        Returns a task at once; its result is by how many bytes their use fell. If a reclaim of this
        session is running already, returns that one's task and begins nothing.
        """
        paused = {call.cgroup: call for call in calls}
        waits = not session.calls

        def go_on(cgroup: Cgroup) -> bool:
            if cgroup in paused:
                return paused[cgroup].frozen_since_usec is not None
            return not session.closing and waits == (not session.calls)

        ids = [call.id for call in paused.values()]
        parts = [(cgroup, size_bytes) for cgroup in tuple(paused) or (session.agent,)]
        session.reclaimed_at_usec = boottime_usec()
        work = self._reclaim(session.id, ids, parts, size_bytes, go_on, why, ANON_FIRST)
        return self.reclaimer.start(session.id, work)

    def reclaim_pool(
        self, size_bytes: int, why: str, holders: Sequence[CacheHolder]
    ) -> asyncio.Task[int]:
        """Take up to `size_bytes` of cold file cache back from `holders`, in their order, and swap
        nobody's memory out; returns as `reclaim` does."""
        session_of = {holder.cgroup: holder.session for holder in holders}

        def go_on(cgroup: Cgroup) -> bool:
            session = session_of[cgroup]
            return session is None or not session.closing

        parts = [(holder.cgroup, holder.cold_bytes) for holder in holders if holder.cold_bytes]
        work = self._reclaim("", [], parts, size_bytes, go_on, why, CACHE_ONLY)
        return self.reclaimer.start("", work)

    async def _reclaim(
        self,
        session: str,
        calls: list[str],
        parts: Iterable[tuple[Cgroup, int]],
        size_bytes: int,
        go_on: Callable[[Cgroup], bool],
        why: str,
        swappiness: tuple[Swappiness, ...],
    ) -> int:
        began_usec = boottime_usec()
        try:
            got = await self.reclaimer.reclaim(parts, size_bytes, go_on, swappiness)
        except KnobError as error:
            log.warning("memory of %s cannot be reclaimed: %s", session or "the pool", error)
            return 0
        self.notices.metrics.actions.labels("reclaim").inc()
        self.notices.metrics.reclaimed.inc(got)
        self.notices.audit.write(
            "reclaim",
            session=session,
            calls=calls,
            asked_bytes=size_bytes,
            reclaimed_bytes=got,
            took_usec=boottime_usec() - began_usec,
            why=why,
        )
        source = f"session {session}" if session else "the pool"
        asked = show_bytes(size_bytes)
        log.info("reclaimed %s of %s from %s: %s", show_bytes(got), asked, source, why)
        return got

    def slow(self, session: Session, percent: int, why: str) -> None:
        """Give a session `percent` of its CPU weight; no error if it is slowed already. Raises
        KnobError."""
        if session.slowed or session.closing:
            return
        weight = max(1, session.limits.cpu_weight * percent // 100)
        session.cgroup.write(knobs.CPU_WEIGHT, weight)
        session.slowed = True
        self.notices.acted_on_session("slow", session, why, pb.FEEDBACK_CODE_CPU_LOWERED)

    def restore(self, session: Session, why: str) -> None:
        """Give a session its own CPU weight again; no error if it has it. Raises KnobError."""
        if not session.slowed:
            return
        session.cgroup.write(knobs.CPU_WEIGHT, session.limits.cpu_weight)
        session.slowed = False
        self.notices.acted_on_session("restore", session, why, pb.FEEDBACK_CODE_CPU_RESTORED)


def _note_frozen(call: Call) -> None:
    """Take down that a call is paused, if only with the call that it is in."""
    if call.frozen_since_usec is None:
        call.frozen_since_usec = boottime_usec()
    if call.state != pb.CALL_STATE_ENDING:
        call.state = pb.CALL_STATE_FROZEN


def _note_thawed(call: Call) -> None:
    """Take down that a call goes on, if only with the call that it is in."""
    if call.frozen_since_usec is not None:
        call.frozen_usec += boottime_usec() - call.frozen_since_usec
        call.frozen_since_usec = None
    if call.state == pb.CALL_STATE_FROZEN:
        call.state = pb.CALL_STATE_RUNNING
