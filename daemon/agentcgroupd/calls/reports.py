"""Reports of ended calls: made from the kernel's evidence, kept with the session, told to all."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.sched import CpuNumbers
from agentcgroupd.calls import nesting
from agentcgroupd.calls.counters import baseline_now, baseline_of_new
from agentcgroupd.calls.evidence import gather
from agentcgroupd.calls.facts import EndFacts
from agentcgroupd.calls.purposes import declared, placed_later
from agentcgroupd.calls.try_next import Room, try_next
from agentcgroupd.calls.verdict import report_of
from agentcgroupd.cgroup import knobs
from agentcgroupd.errors import KnobError
from agentcgroupd.host.kernel_log import OomLog
from agentcgroupd.intents.grant import Ceiling, Grant, grant_for
from agentcgroupd.intents.parse import Intent, cut_argv
from agentcgroupd.policy.command_shape import shape_of
from agentcgroupd.policy.learning import Peaks, learn
from agentcgroupd.sessions.holding import used_for_good, used_of_pool
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.ending import Baseline, Fact
from agentcgroupd.state.purpose import Purpose
from agentcgroupd.state.session import Call, Session, unix_usec
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.telemetry.wire import cpu_to_proto, grant_to_proto
from agentcgroupd.units import CgroupId

log = logging.getLogger(__name__)

_TOLD_BEFORE = frozenset(
    {
        pb.FEEDBACK_CODE_FROZEN,
        pb.FEEDBACK_CODE_GROWTH_DENIED,
        pb.FEEDBACK_CODE_GPU_CLOSED,
        pb.FEEDBACK_CODE_GPU_MEMORY_DENIED,
        pb.FEEDBACK_CODE_GPU_MEMORY_OVER,
        pb.FEEDBACK_CODE_GPU_FAULT,
        pb.FEEDBACK_CODE_GPU_LOST,
        pb.FEEDBACK_CODE_GPU_UNSHARED,
    }
)
"""Feedback that an agent was sent when it happened, before the report has it again."""


def _denied(call: Call) -> pb.Feedback:
    """The last word on memory that a call was refused."""
    code = pb.FEEDBACK_CODE_GROWTH_DENIED
    told = next((item for item in reversed(call.history) if item.code == code), None)
    sentence = "The call was refused memory while others needed it."
    return pb.Feedback(code=code, sentence=sentence) if told is None else told


def _fact_to_proto(fact: Fact) -> pb.Fact:
    return pb.Fact(
        what=fact.what, source=fact.source, at_unix_usec=fact.at_unix_usec, level=fact.level
    )


class Reports:
    """Makes reports, keeps them, and learns from them what later calls will take."""

    def __init__(
        self,
        pool: Pool,
        notices: Notices,
        ceiling: Callable[[Session], Ceiling],
        cpu: Callable[[CgroupId], CpuNumbers | None],
        peaks: Peaks,
        oom_log: OomLog,
    ) -> None:
        """`ceiling`: the limits above a call of a session. `cpu`: what our scheduler counted of a
        cgroup; None where it does not run. `peaks`: of all calls, which the policy judges by.
        `oom_log`: tells whom the kernel's OOM killer chose."""
        self._pool = pool
        self._notices = notices
        self._ceiling, self._cpu, self._peaks = ceiling, cpu, peaks
        self._oom_log = oom_log

    # Counters that an end is judged against

    def baseline_of_new(self, session: Session, outer: Call | None) -> Baseline:
        """Read the counters above a call that is about to get its cgroup, in another call or in
        none. Raises KnobError."""
        return baseline_of_new(session, self._pool.cgroup, outer)

    def baseline_now(self, call: Call) -> Baseline:
        """Read the counters of an open call and above it. Raises KnobError."""
        return baseline_now(call, self._pool.cgroup)

    # What a call will take

    def expect(
        self, session: Session, name: str, argv: Sequence[str], grant: Grant
    ) -> tuple[int, str]:
        """Give what a call will take, in bytes, and a sentence where its session's last calls of
        the same shape show that the intent is off.

        0 bytes and no sentence for a call that says nothing. The bytes count only for the order in
        which calls start and go on.
        """
        asked = grant.memory_expected_bytes
        if not asked:
            return 0, ""
        shape, learned = shape_of(name, argv), session.learned
        return learned.expect(shape, asked).expected_bytes, learned.advice(shape, asked)

    def learn(self, call: Call, report: pb.Report) -> None:
        """Learn from an ended call what the next ones of its shape will take; one inside another
        call has its part in what is learned from that."""
        if call.parent is None:
            learn(call.session.learned, self._peaks, report, denied=call.was_denied)

    # Making

    def of(self, call: Call) -> pb.Report:
        """Make the report of a call whose cgroup is empty and still there."""
        facts, cpu = gather(call, self._pool.cgroup, self._oom_log), self._cpu(call.cgroup.id)
        if cpu is not None:
            # cpu.stat counts only what the fair class held back.
            held = facts.cpu.get("throttled_usec", 0) + cpu.stalled_usec
            facts = replace(facts, cpu={**facts.cpu, "throttled_usec": held})
        report = report_of(facts)
        report.facts.extend(_fact_to_proto(fact) for fact in call.account.facts)
        if cpu is not None:
            report.cpu.CopyFrom(cpu_to_proto(cpu))
        report.call_id, report.session_id, report.name = call.id, call.session.id, call.name
        report.argv.extend(call.argv)
        report.grant.CopyFrom(grant_to_proto(call.grant))
        report.began_unix_usec = call.began_unix_usec
        report.observed, report.waited_usec = call.observed, call.waited_usec
        if call.traffic is not None and (net := call.traffic()) is not None:
            report.net.CopyFrom(net)
        if call.gpu_usage is not None:
            report.gpu.CopyFrom(call.gpu_usage)
            report.feedback.extend(call.gpu_feedback)
        nesting.tell(report, call)
        if call.was_denied:
            report.feedback.append(_denied(call))
        self._tell_purpose(report, call)
        for feedback in report.feedback:
            feedback.call_id, feedback.session_id = call.id, call.session.id
            feedback.at_unix_usec = unix_usec()
        return report

    def _tell_purpose(self, report: pb.Report, call: Call) -> None:
        """Add what the call was begun for, and what to try next."""
        purpose = placed_later(call) or call.purpose or Purpose(declared(call))
        report.command, report.tool_use_id = purpose.command, purpose.tool_use_id
        report.in_call_id = purpose.in_call_id
        if report.verdict == pb.VERDICT_OK:
            return
        argv = ["sh", "-c", purpose.command] if purpose.command else call.argv
        whole = call.session.learned.whole_peak(shape_of(call.name, call.argv))
        advice = try_next(report, argv, whole, self._room(call))
        if advice is not None:
            report.try_next.CopyFrom(advice)

    def _room(self, call: Call) -> Room:
        """What another call of the session could have once this one is gone."""
        session, ceiling = call.session, self._ceiling(call.session)
        most = ceiling.memory_max_bytes
        if most is not None:
            most -= ceiling.agent_memory_bytes + ceiling.files_memory_bytes
        return Room(
            memory_free=lambda: self._memory_free(call),
            memory_most_bytes=None if most is None else max(0, most),
            pids_most=ceiling.pids_max,
            timeout_most_usec=ceiling.timeout_max_usec,
            calls_left=session.limits.calls_max - len(session.calls) + 1,
        )

    def _memory_free(self, call: Call) -> int | None:
        """Memory that is free in the session and the pool, in bytes, with what this call still
        holds; None: there is no limit, or what is used cannot be read."""
        try:
            mine = used_for_good(call.cgroup) or 0
            sides = (
                (call.session.limits.memory_max_bytes, used_for_good(call.session.cgroup)),
                (self._pool.cgroup.read_if(knobs.MEMORY_MAX), used_of_pool(self._pool)),
            )
        except KnobError as error:
            log.debug("call %s: what is free cannot be read: %s", call.id, error)
            return None
        left = [most - used + mine for most, used in sides if most and used is not None]
        return max(0, min(left)) if left else None

    def of_short(
        self,
        session: Session,
        name: str,
        argv: Sequence[str],
        wall_usec: int,
        status: int | None,
        cpu: Mapping[str, int],
        refused: str,
    ) -> pb.Report:
        """Make the report of a call that had ended before it could have a cgroup, or was `refused`
        one and why. `status`: as waitpid(2) gives it; `cpu`: keys as in cpu.stat."""
        grant = grant_for(Intent(), self._ceiling(session))
        facts = EndFacts(
            grant=grant,
            wall_usec=wall_usec,
            ever_entered=True,
            wait_status=status,
            cpu=dict(cpu),
            evidence=pb.EVIDENCE_NONE if status is None else pb.EVIDENCE_KERNEL,
        )
        report = report_of(facts)
        report.call_id, report.session_id, report.name = secrets.token_hex(6), session.id, name
        report.argv.extend(cut_argv(argv))
        report.grant.CopyFrom(grant_to_proto(grant))
        report.began_unix_usec = unix_usec() - wall_usec
        report.observed = True
        if refused:
            report.sentence += f" It ran without limits of its own: {refused}"
        return report

    # Keeping

    def write(self, report: pb.Report) -> None:
        """Write a report to the audit log; before the call's cgroup goes, so that a crash loses
        nothing."""
        self._notices.audit.write(
            "call_ended", session=report.session_id, call=report.call_id, report=report
        )

    def keep(self, session: Session, report: pb.Report) -> None:
        """Keep a report with its session, count it, and send it to whoever listens."""
        session.reports.append(report)
        session.calls_ended += 1
        self._notices.metrics.count_end(report)
        for feedback in report.feedback:
            # How long it was paused is in the report; that it was, has been told then.
            if feedback.code not in _TOLD_BEFORE:
                self._notices.tell(session, report.call_id, feedback)
        if self._notices.feed.listening:
            self._notices.feed.publish(session.id, pb.Event(ended=report))
