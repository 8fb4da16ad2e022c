"""What happened, told to everyone it concerns: the audit log, the metrics, the log, the agent."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from agentcgroup.text import printable
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.history import History
from agentcgroupd.state.ending import Gone
from agentcgroupd.state.session import HISTORY_KEPT, Call, Session, unix_usec
from agentcgroupd.telemetry.audit import Audit
from agentcgroupd.telemetry.feed import Feed
from agentcgroupd.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Notices:
    """The daemon's ways of telling; one object holds them, so that none is forgotten."""

    audit: Audit
    metrics: Metrics
    feed: Feed
    history: History = field(default_factory=History)
    """What is told of sessions and by feedback; entries of the log come to it from there."""

    def tell(self, session: Session, call_id: str, feedback: pb.Feedback) -> None:
        """Send feedback to whoever listens to the session, and count it. `call_id`: the open call
        that it is about, which keeps it in its history; empty: the session itself."""
        feedback.call_id, feedback.session_id = call_id, session.id
        feedback.at_unix_usec = feedback.at_unix_usec or unix_usec()
        self.metrics.count_feedback(feedback)
        self.history.told(feedback)
        if (call := session.calls.get(call_id)) is not None:
            call.history = (*call.history, feedback)[-HISTORY_KEPT:]
        if self.feed.listening:
            self.feed.publish(session.id, pb.Event(feedback=feedback))

    # Of what the daemon did

    def acted_on_call(
        self, action: str, call: Call, why: str, code: pb.FeedbackCode.ValueType | None
    ) -> None:
        """An action on a call was carried out. `code`: what its agent is told; None: nothing."""
        self.metrics.actions.labels(action).inc()
        session = call.session.id
        self.audit.write(action, session=session, call=call.id, why=why)
        fields = {"session": session, "call": call.id}
        words = (action, call.id, call.name, session, why)
        log.info("%s call %s (%s) of session %s: %s", *words, extra=fields)
        if code is not None:
            self.tell(call.session, call.id, pb.Feedback(code=code, sentence=why))

    def acted_on_session(
        self, action: str, session: Session, why: str, code: pb.FeedbackCode.ValueType
    ) -> None:
        """An action on a session was carried out; its agent is told `code`."""
        self.metrics.actions.labels(action).inc()
        self.audit.write(action, session=session.id, why=why)
        log.info("%s session %s: %s", action, session.id, why, extra={"session": session.id})
        self.tell(session, "", pb.Feedback(code=code, sentence=why))

    def dry_run(self, action: str, subject: str, ruleset: str, why: str) -> None:
        """A ruleset on trial would have acted: the operator is told, the agent is not. `subject`:
        id of the call or session; empty: the pool."""
        self.metrics.actions.labels(f"dry_{action}").inc()
        self.audit.write("dry_run", action=action, subject=subject, ruleset=ruleset, why=why)
        log.info("dry run: %s of %s by %s: %s", action, subject or "the pool", ruleset, why)

    def moved(self, call: Call, since_exec_ns: int) -> None:
        """The process that began an undeclared call was moved into the call's leaf,
        `since_exec_ns` after its exec."""
        self.metrics.moved.observe(since_exec_ns / 1e9)
        usec = since_exec_ns // 1000
        self.audit.write("call_moved", session=call.session.id, call=call.id, since_exec_usec=usec)

    def left_call(self, call: Call, pid: int, path: str, moved_back: bool, sentence: str) -> None:
        """The main process of a call left its cgroup for `path`, and may have been moved back."""
        session = call.session.id
        self.audit.write(
            "left_call", session=session, call=call.id, pid=pid, to=path, moved_back=moved_back
        )
        log.warning("call %s of session %s: %s", call.id, session, sentence)
        code = pb.FEEDBACK_CODE_LEFT_CALL
        told = pb.Feedback(code=code, sentence=sentence, numbers={"pid": float(pid)})
        self.tell(call.session, call.id, told)

    def process_left(self, call: Call, gone: Gone, is_main: bool, words: str) -> None:
        """The kernel told that a process was moved out of a call, and by whom. Of the main process
        the agent hears by `left_call`, when the daemon has looked where it is."""
        session = call.session.id
        self.audit.write(
            "process_left",
            session=session,
            call=call.id,
            pid=gone.pid,
            name=gone.name,
            mover_pid=gone.mover_pid,
            mover=gone.mover,
            to=gone.path,
            main=is_main,
        )
        log.warning("call %s of session %s: %s", call.id, session, words)
        if not is_main:
            code = pb.FEEDBACK_CODE_LEFT_CALL
            told = pb.Feedback(code=code, sentence=words, numbers={"pid": float(gone.pid)})
            self.tell(call.session, call.id, told)

    def more_left(self, call: Call) -> None:
        """More processes were moved out of a call than are told one by one."""
        session = call.session.id
        words = "More processes left the call's cgroup; from here on they are only counted."
        self.audit.write("more_left", session=session, call=call.id)
        log.warning("call %s of session %s: %s", call.id, session, words)
        told = pb.Feedback(code=pb.FEEDBACK_CODE_LEFT_CALL, sentence=words)
        self.tell(call.session, call.id, told)

    # Of what the kernel did

    def oom_victim(self, session: Session, call: Call | None, pid: int, comm: str) -> None:
        """The kernel's OOM killer chose a process of a call; `call` None: of the agent itself."""
        comm = printable(comm)
        self.metrics.oom_victims.inc()
        call_id = call.id if call else ""
        self.audit.write("oom_victim", session=session.id, call=call_id, pid=pid, comm=comm)
        log.warning(
            "the kernel's OOM killer chose %s (%d) of session %s, %s",
            comm,
            pid,
            session.id,
            f"call {call.id}" if call else "the agent itself",
            extra={"session": session.id, "call": call_id},
        )

    def events_lost(self, counts: dict[str, int]) -> None:
        """Events of the kernel's programs did not reach the daemon; how many, by type."""
        for kind, count in counts.items():
            self.metrics.events_lost.labels(kind).inc(count)
        self.audit.write("events_lost", counts=counts)
        lost = ", ".join(f"{count} {kind} events" for kind, count in counts.items())
        log.warning("lost in the kernel: %s; the cgroups themselves are read instead", lost)
