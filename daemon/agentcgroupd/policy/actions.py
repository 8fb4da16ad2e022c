"""What a decision does to a call: done, counted, written to the audit log, told to the agent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.audit import Audit
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.cgroup import knobs
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import KnobError
from agentcgroupd.feed import Feed
from agentcgroupd.metrics import Metrics
from agentcgroupd.rules import printable
from agentcgroupd.session import Call, Session, boottime_usec, unix_usec

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Actions:
    """Applies decisions. `memory`: None where growth cannot be denied here."""

    audit: Audit
    metrics: Metrics
    feed: Feed
    config: GuardConfig
    memory: Callable[[], MemoryPrograms | None]

    def freeze(self, call: Call, why: str) -> None:
        """Pause a call; no error if it is paused already. Raises CgroupGone."""
        if call.frozen_since_usec is not None or call.state == pb.CALL_STATE_ENDING:
            return
        call.cgroup.write(knobs.CGROUP_FREEZE, True)
        call.frozen_since_usec = boottime_usec()
        call.state = pb.CALL_STATE_FROZEN
        self._acted("freeze", call, why, pb.FEEDBACK_CODE_FROZEN)

    def thaw(self, call: Call, why: str) -> None:
        """Let a paused call go on; no error if it runs. Raises CgroupGone."""
        if call.frozen_since_usec is None:
            return
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
        call.denied_at_bytes = usage
        self._acted("deny", call, why, pb.FEEDBACK_CODE_GROWTH_DENIED)

    def allow(self, call: Call, why: str) -> None:
        """Let a call grow again; no error if it may. Raises BpfError."""
        memory = self.memory()
        if call.denied_at_bytes is None or memory is None:
            return
        memory.allow(call.cgroup.id)
        call.denied_at_bytes = None
        self._acted("allow", call, why, pb.FEEDBACK_CODE_GROWTH_ALLOWED)

    def stop(self, call: Call, why: str) -> None:
        """End a call by policy. Raises CgroupGone."""
        call.ended_by, call.ended_why = "stopped", why
        call.state = pb.CALL_STATE_ENDING
        call.held = False
        call.cgroup.kill()
        self._acted("kill", call, why, None)

    def let_go(self, call: Call, why: str) -> None:
        """Undo what keeps a call from going on without the daemon."""
        try:
            self.thaw(call, why)
        except KnobError:
            log.debug("call %s is gone", call.id)

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

    def _acted(
        self, action: str, call: Call, why: str, code: pb.FeedbackCode.ValueType | None
    ) -> None:
        self.metrics.actions.labels(action).inc()
        session = call.session.id
        self.audit.write(action, session=session, call=call.id, why=why)
        log.info("%s call %s (%s) of session %s: %s", action, call.id, call.name, session, why)
        if code is not None:
            self.tell(call.session, call.id, pb.Feedback(code=code, sentence=why))

    def tell(self, session: Session, call_id: str, feedback: pb.Feedback) -> None:
        """Feedback to whoever listens, counted."""
        feedback.call_id, feedback.session_id = call_id, session.id
        feedback.at_unix_usec = feedback.at_unix_usec or unix_usec()
        self.metrics.count_feedback(feedback)
        if self.feed.listening:
            self.feed.publish(session.id, pb.Event(feedback=feedback))
