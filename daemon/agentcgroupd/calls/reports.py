"""Reports of ended calls: made from the kernel's evidence, kept with the session, told to all."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.sched import CpuNumbers
from agentcgroupd.calls.evidence import gather
from agentcgroupd.calls.verdict import EndFacts, report_of
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.intents.grant import Ceiling, Grant, grant_for
from agentcgroupd.intents.parse import cut_argv, parse_intent
from agentcgroupd.policy.command_shape import shape_of
from agentcgroupd.policy.learning import Peaks, learn
from agentcgroupd.state.session import Call, Session, unix_usec
from agentcgroupd.telemetry.wire import cpu_to_proto, grant_to_proto
from agentcgroupd.units import CgroupId

_TOLD_BEFORE = frozenset((
    pb.FEEDBACK_CODE_FROZEN, pb.FEEDBACK_CODE_GPU_CLOSED, pb.FEEDBACK_CODE_GPU_MEMORY_DENIED,
    pb.FEEDBACK_CODE_GPU_MEMORY_OVER, pb.FEEDBACK_CODE_GPU_FAULT, pb.FEEDBACK_CODE_GPU_LOST,
    pb.FEEDBACK_CODE_GPU_UNSHARED,
))  # fmt: skip


@dataclass(slots=True)
class Reports:
    """Makes and keeps them."""

    actions: Actions
    pool: Cgroup
    ceiling: Callable[[Session], Ceiling]
    cpu: Callable[[CgroupId], CpuNumbers | None] = lambda cgroup: None
    peaks: Peaks = field(default_factory=Peaks)

    def of(self, call: Call) -> pb.Report:
        """The report of a call whose cgroup is empty and still there."""
        facts, cpu = gather(call, self.pool), self.cpu(call.cgroup.id)
        if cpu is not None:
            # cpu.stat counts only what the fair class held back.
            held = facts.cpu.get("throttled_usec", 0) + cpu.stalled_usec
            facts = replace(facts, cpu={**facts.cpu, "throttled_usec": held})
        report = report_of(facts)
        if cpu is not None:
            report.cpu.CopyFrom(cpu_to_proto(cpu))
        report.call_id, report.session_id, report.name = call.id, call.session.id, call.name
        report.argv.extend(call.argv)
        report.grant.CopyFrom(grant_to_proto(call.grant))
        report.began_unix_usec = call.began_unix_usec
        report.observed, report.waited_usec = call.observed, call.waited_usec
        if call.gpu_usage is not None:
            report.gpu.CopyFrom(call.gpu_usage)
            report.feedback.extend(call.gpu_feedback)
        for feedback in report.feedback:
            feedback.call_id, feedback.session_id = call.id, call.session.id
            feedback.at_unix_usec = unix_usec()
        return report

    def of_short(
        self,
        session: Session,
        name: str,
        argv: list[str],
        wall_usec: int,
        status: int | None,
        cpu: dict[str, int],
        refused: str,
    ) -> pb.Report:
        """The report of a call that had ended before it could have a cgroup, or was refused one,
        and why. `status`: as waitpid(2) gives it; `cpu`: keys as in cpu.stat."""
        grant = grant_for(parse_intent({}), self.ceiling(session))
        report = report_of(EndFacts(
            grant=grant, wall_usec=wall_usec, ever_entered=True, wait_status=status, cpu=cpu,
            evidence=pb.EVIDENCE_NONE if status is None else pb.EVIDENCE_KERNEL,
        ))  # fmt: skip
        report.call_id, report.session_id, report.name = secrets.token_hex(6), session.id, name
        report.argv.extend(cut_argv(argv))
        report.grant.CopyFrom(grant_to_proto(grant))
        report.began_unix_usec = unix_usec() - wall_usec
        report.observed = True
        if refused:
            report.sentence += f" It ran without limits of its own: {refused}"
        return report

    def likely_bytes(self, session: Session, name: str, argv: Sequence[str], grant: Grant) -> int:
        """What a call will take: as its intent says, corrected by the last ones of its shape; 0 for
        one that says nothing. Only for the order in which calls start and go on."""
        asked = grant.memory_expected_bytes
        if not asked:
            return 0
        return session.learned.expect(shape_of(name, argv), asked).expected_bytes

    def with_advice(self, session: Session, name: str, argv: Sequence[str], grant: Grant) -> Grant:
        """The grant with a sentence where its session's last calls show that the intent is off."""
        asked = grant.memory_expected_bytes
        sentence = session.learned.advice(shape_of(name, argv), asked) if asked else ""
        return replace(grant, advice=(*grant.advice, sentence)) if sentence else grant

    def learn(self, call: Call, report: pb.Report) -> None:
        """From an ended call."""
        learn(call.session.learned, self.peaks, report, denied=call.was_denied)

    def write(self, report: pb.Report) -> None:
        """To the audit log; before the call's cgroup goes, so that a crash loses nothing."""
        self.actions.audit.write(
            "call_ended", session=report.session_id, call=report.call_id, report=report
        )

    def keep(self, session: Session, report: pb.Report) -> None:
        """With the session, in the metrics, and to whoever listens."""
        session.reports.append(report)
        session.calls_ended += 1
        self.actions.metrics.count_end(report)
        for feedback in report.feedback:
            # How long it was paused is in the report; that it was, has been told then.
            if feedback.code not in _TOLD_BEFORE:
                self.actions.tell(session, report.call_id, feedback)
        if self.actions.feed.listening:
            self.actions.feed.publish(session.id, pb.Event(ended=report))
