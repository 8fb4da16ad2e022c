"""What a decision does to a call or a session: done, counted, written to the audit log, told to the
agent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.config import GuardConfig
from agentcgroupd.enforce.reclaimer import Reclaimer
from agentcgroupd.errors import BpfError, KnobError
from agentcgroupd.intents.command import printable
from agentcgroupd.state.session import HISTORY_KEPT, Call, Session, boottime_usec, unix_usec
from agentcgroupd.telemetry.audit import Audit
from agentcgroupd.telemetry.feed import Feed
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.units import show_bytes

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Actions:
    """Applies decisions. `memory`: None where growth cannot be denied here."""

    audit: Audit
    metrics: Metrics
    feed: Feed
    config: GuardConfig
    memory: Callable[[], MemoryPrograms | None]
    pool: Cgroup | None = None
    """For reclaim_pool."""
    reclaimer: Reclaimer = field(default_factory=Reclaimer)
    hurry: Callable[[Call], None] = lambda call: None
    """Told of each call that is about to be frozen or killed."""

    # Of a call

    def freeze(self, call: Call, why: str) -> None:
        """Pause a call; no error if it is paused already. Raises CgroupGone."""
        if call.frozen_since_usec is not None or call.state == pb.CALL_STATE_ENDING:
            return
        self.hurry(call)
        call.cgroup.write(knobs.CGROUP_FREEZE, True)
        call.frozen_since_usec = boottime_usec()
        call.state = pb.CALL_STATE_FROZEN
        self._acted("freeze", call, why, pb.FEEDBACK_CODE_FROZEN)

    def thaw(self, call: Call, why: str) -> None:
        """Let a paused call go on; no error if it runs. Raises CgroupGone."""
        if call.frozen_since_usec is None:
            return
        if not call.held_for_turn:
            call.cgroup.write(knobs.CGROUP_FREEZE, False)
        call.frozen_usec += boottime_usec() - call.frozen_since_usec
        call.frozen_since_usec = None
        if call.state == pb.CALL_STATE_FROZEN:
            call.state = pb.CALL_STATE_RUNNING
        self._acted("thaw", call, why, pb.FEEDBACK_CODE_THAWED)
        call.cgroup.set_xattr(call.record())

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
        self._acted("deny", call, why, pb.FEEDBACK_CODE_GROWTH_DENIED)

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
        self._acted("allow", call, why, pb.FEEDBACK_CODE_GROWTH_ALLOWED)

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
            call.cgroup.write(knobs.MEMORY_HIGH, high, wait=False)
        call.throttled_at_bytes = usage
        self._acted("throttle", call, why, pb.FEEDBACK_CODE_MEMORY_THROTTLED)

    def unthrottle(self, call: Call, why: str) -> None:
        """memory.high as granted, and no mark; no error if that is so. Raises KnobError."""
        if call.throttled_at_bytes is None:
            return
        call.cgroup.write(knobs.MEMORY_HIGH, call.grant.memory_high_bytes, wait=False)
        call.throttled_at_bytes = None
        try:
            if memory := self.memory():
                memory.set_throttle_mark(call.cgroup.id, 0)
        except BpfError as error:
            log.warning("call %s is still slowed above its mark: %s", call.id, error)
        self._acted("unthrottle", call, why, None)

    def restore_high(self, call: Call) -> None:
        """Of a call found again: an earlier daemon may have been killed while it was throttled.
        Raises KnobError."""
        granted, knob = call.grant.memory_high_bytes, knobs.MEMORY_HIGH
        if knob.file in call.session.offered and call.cgroup.read(knob) != granted:
            call.cgroup.write(knob, granted, wait=False)
            self._acted("unthrottle", call, "The daemon was restarted.", None)

    def stop(self, call: Call, why: str) -> None:
        """End a call by policy. Raises CgroupGone."""
        call.ended_by, call.ended_why = "stopped", why
        call.state = pb.CALL_STATE_ENDING
        call.held = False
        self.hurry(call)
        call.cgroup.kill()
        self._acted("kill", call, why, None)

    def let_go(self, call: Call, why: str) -> None:
        """Undo what keeps a call, or its session, from going on without the daemon."""
        undo: tuple[Callable[[], None], ...] = (
            lambda: self.thaw(call, why),
            lambda: self.unthrottle(call, why),
            lambda: self.restore(call.session, why),
        )
        for step in undo:
            try:
                step()
            except KnobError:
                log.debug("call %s is gone", call.id)

    # Of a session

    def reclaim(
        self, session: Session, size_bytes: int, calls: Iterable[Call], why: str
    ) -> asyncio.Task[int]:
        """Take memory of a session back: from its agent leaf, until a call of it begins; or from
        these calls of it, as long as they are paused. Returns at once; the task's result is by how
        many bytes their use fell. While one of a session is going on, that one's task."""
        paused = {call.cgroup: call for call in calls}
        waits = not session.calls

        def go_on(cgroup: Cgroup) -> bool:
            if cgroup in paused:
                return paused[cgroup].frozen_since_usec is not None
            return not session.closing and waits == (not session.calls)

        ids = [call.id for call in paused.values()]
        cgroups = tuple(paused) or (session.agent,)
        session.reclaimed_at_usec = boottime_usec()
        work = self._reclaim(session.id, ids, cgroups, size_bytes, go_on, why)
        return self.reclaimer.start(session.id, work)

    def reclaim_pool(self, size_bytes: int, why: str) -> asyncio.Task[int]:
        """As `reclaim`, from whatever of the pool is coldest."""
        assert self.pool is not None, "Actions was not given the pool"
        work = self._reclaim("", [], (self.pool,), size_bytes, lambda _: True, why)
        return self.reclaimer.start("", work)

    async def _reclaim(
        self, session: str, calls: list[str], cgroups: Iterable[Cgroup], size_bytes: int,
        go_on: Callable[[Cgroup], bool], why: str,
    ) -> int:  # fmt: skip
        began_usec = boottime_usec()
        try:
            got = await self.reclaimer.reclaim(cgroups, size_bytes, go_on)
        except KnobError as error:
            log.warning("memory of %s cannot be reclaimed: %s", session or "the pool", error)
            return 0
        self.metrics.actions.labels("reclaim").inc()
        self.metrics.reclaimed.inc(got)
        self.audit.write("reclaim", session=session, calls=calls, asked_bytes=size_bytes,
                         reclaimed_bytes=got, took_usec=boottime_usec() - began_usec,
                         why=why)  # fmt: skip
        log.info("reclaimed %s of %s from %s: %s", show_bytes(got), show_bytes(size_bytes),
                 f"session {session}" if session else "the pool", why)  # fmt: skip
        return got

    def slow(self, session: Session, percent: int, why: str) -> None:
        """Give a session `percent` of its CPU weight; no error if it is slowed already. Raises
        KnobError."""
        if session.slowed or session.closing:
            return
        weight = max(1, session.limits.cpu_weight * percent // 100)
        session.cgroup.write(knobs.CPU_WEIGHT, weight)
        session.slowed = True
        self._acted_on("slow", session, why, pb.FEEDBACK_CODE_CPU_LOWERED)

    def restore(self, session: Session, why: str) -> None:
        """Its CPU weight as it was; no error if it is. Raises KnobError."""
        if not session.slowed:
            return
        session.cgroup.write(knobs.CPU_WEIGHT, session.limits.cpu_weight)
        session.slowed = False
        self._acted_on("restore", session, why, pb.FEEDBACK_CODE_CPU_RESTORED)

    # What is told

    def moved(self, call: Call, since_exec_ns: int) -> None:
        """A process that began an undeclared call is in its leaf."""
        self.metrics.moved.observe(since_exec_ns / 1e9)
        self.audit.write("call_moved", session=call.session.id, call=call.id,
                         since_exec_usec=since_exec_ns // 1000)  # fmt: skip

    def oom_victim(self, session: Session, call: Call | None, pid: int, comm: str) -> None:
        """The kernel's OOM killer chose a process; `call` None: of the agent itself."""
        comm = printable(comm)
        self.metrics.oom_victims.inc()
        self.audit.write("oom_victim", session=session.id, call=call.id if call else "", pid=pid,
                         comm=comm)  # fmt: skip
        where = f"call {call.id}" if call else "the agent itself"
        log.warning("the kernel's OOM killer chose %s (%d) of session %s, %s", comm, pid,
                    session.id, where)  # fmt: skip

    def events_lost(self, counts: dict[str, int]) -> None:
        """Events of the kernel's that did not reach the daemon, by type."""
        for kind, count in counts.items():
            self.metrics.events_lost.labels(kind).inc(count)
        self.audit.write("events_lost", counts=counts)
        lost = ", ".join(f"{count} {kind} events" for kind, count in counts.items())
        log.warning("lost in the kernel: %s; the cgroups are looked at instead", lost)

    def dry(self, action: str, subject: str, ruleset: str, why: str) -> None:
        """What a dry run would do: told to the operator, not to the agent."""
        self.metrics.actions.labels(f"dry_{action}").inc()
        self.audit.write("dry_run", action=action, subject=subject, ruleset=ruleset, why=why)
        log.info("dry run: %s of %s by %s: %s", action, subject or "the pool", ruleset, why)

    def _acted(
        self, action: str, call: Call, why: str, code: pb.FeedbackCode.ValueType | None
    ) -> None:
        self.metrics.actions.labels(action).inc()
        session = call.session.id
        self.audit.write(action, session=session, call=call.id, why=why)
        log.info("%s call %s (%s) of session %s: %s", action, call.id, call.name, session, why)
        if code is not None:
            self.tell(call.session, call.id, pb.Feedback(code=code, sentence=why))

    def _acted_on(
        self, action: str, session: Session, why: str, code: pb.FeedbackCode.ValueType
    ) -> None:
        self.metrics.actions.labels(action).inc()
        self.audit.write(action, session=session.id, why=why)
        log.info("%s session %s: %s", action, session.id, why)
        self.tell(session, "", pb.Feedback(code=code, sentence=why))

    def tell(self, session: Session, call_id: str, feedback: pb.Feedback) -> None:
        """Feedback to whoever listens, counted."""
        feedback.call_id, feedback.session_id = call_id, session.id
        feedback.at_unix_usec = feedback.at_unix_usec or unix_usec()
        self.metrics.count_feedback(feedback)
        if (call := session.calls.get(call_id)) is not None:
            call.history = (*call.history, feedback)[-HISTORY_KEPT:]
        if self.feed.listening:
            self.feed.publish(session.id, pb.Event(feedback=feedback))
