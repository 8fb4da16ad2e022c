"""From the kernel's evidence of how a call ended to a verdict, a sentence and feedback. Pure.

The evidence is memory.events of the call and of the cgroups above it, the wait status of its main
process, and what the daemon itself did. An exit code alone never decides: 137 is what a shell
returns for a child that someone killed as much as for one that ran out of memory.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.intents.grant import Grant
from agentcgroupd.units import show_bytes, show_usec

STATED_SLACK_BYTES = 64 << 20
"""A call that takes at most this much more than it expected hurts nobody."""
OVERSTATED_LEAST_BYTES = 64 << 20
"""Below this an overstated intent keeps nobody out."""
THROTTLED_LEAST_USEC = 100_000
"""Shorter stalls are noise that an agent can do nothing about."""


@dataclass(frozen=True, slots=True)
class EndFacts:
    """Facts that are known when a call's cgroup has become empty; None where this kernel does not
    say."""

    grant: Grant
    wall_usec: int
    ever_entered: bool
    wait_status: int | None = None
    evidence: pb.Evidence.ValueType = pb.EVIDENCE_NONE
    ended_by: str = ""
    """`timeout`, `cancelled`, `stopped`, `removed`, `declared` (its process asked for another
    call), or empty: the call ended by itself."""
    ended_why: str = ""
    leftovers: int = 0
    """Processes that were ended with the call, after its main process had ended."""
    oom_kills: int | None = None
    call_ooms: int = 0
    """Times the call's own limit was hit with nothing left to reclaim (memory.events: oom)."""
    session_ooms: int = 0
    pool_ooms: int = 0
    session_max_bytes: int | None = None
    pool_max_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_high_events: int | None = None
    memory_throttled_usec: int | None = None
    cpu: dict[str, int] = field(default_factory=dict)
    """Numbers by their keys in cpu.stat."""
    pids_peak: int | None = None
    pids_max_events: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    frozen_usec: int = 0
    late_pauses: int = 0
    """Pauses that did not stop all tasks at once (`Call.late_pauses`)."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _oom(facts: EndFacts) -> tuple[pb.Verdict.ValueType, str]:
    if facts.call_ooms:
        limit = show_bytes(facts.grant.memory_max_bytes or 0)
        return pb.VERDICT_OOM_CALL, (
            f"Out of memory: the call reached its own limit of {limit} and the kernel ended it; "
            "nothing else was touched. Ask for a larger memory_max, or work in smaller parts."
        )
    if facts.session_ooms:
        limit = show_bytes(facts.session_max_bytes or 0)
        return pb.VERDICT_OOM_SESSION, (
            f"Out of memory: all calls of this session together reached its limit of {limit} and "
            "the kernel chose this one. Run fewer calls at a time, or with a smaller memory_max."
        )
    if facts.pool_ooms:
        limit = show_bytes(facts.pool_max_bytes or 0)
        return pb.VERDICT_OOM_POOL, (
            f"Out of memory: all sessions together reached the pool's limit of {limit} and the "
            "kernel chose this call. It may go through when tried again in a while."
        )
    return pb.VERDICT_OOM_HOST, (
        "Out of memory: the host itself ran out and the kernel chose this call; no limit of this "
        "call, its session or the pool was reached. Trying again later may help."
    )


def _by_daemon(facts: EndFacts) -> tuple[pb.Verdict.ValueType, str] | None:
    if facts.ended_by == "timeout":
        limit = show_usec(facts.grant.timeout_usec or 0)
        return pb.VERDICT_TIMEOUT, (
            f"The call was ended at its timeout of {limit}. Ask for a longer timeout, or for less "
            "work at a time."
        )
    if facts.ended_by == "cancelled":
        return pb.VERDICT_CANCELLED, f"The call was ended while running: {facts.ended_why}."
    if facts.ended_by == "declared":
        return pb.VERDICT_OK, facts.ended_why
    if facts.ended_by == "stopped":
        return pb.VERDICT_STOPPED, facts.ended_why
    return None


def _by_status(facts: EndFacts, status: int) -> tuple[pb.Verdict.ValueType, str]:
    if os.WIFSIGNALED(status):
        name = _signal_name(os.WTERMSIG(status))
        if os.WTERMSIG(status) == signal.SIGKILL:
            proof = (
                "memory.events counts no OOM kill"
                if facts.oom_kills == 0
                else "whether the kernel ran out of memory cannot be seen on this host"
            )
            return pb.VERDICT_SIGNALED, (
                f"It was killed with {name}, by whom is not known: itself, its caller, another "
                f"process or a limit such as RLIMIT_CPU. It was not the daemon, and {proof}."
            )
        return pb.VERDICT_SIGNALED, f"It died of {name}."
    code = os.WEXITSTATUS(status)
    if code == 0:
        return pb.VERDICT_OK, "It ended well."
    sentence = f"It ended with exit status {code}; no limit of agentcgroup ended it."
    if code == 128 + signal.SIGKILL and facts.oom_kills == 0:
        sentence = (
            "It ended with exit status 137, which a shell gives for a child that was killed; "
            "memory.events counts no OOM kill."
        )
    return pb.VERDICT_FAILED, sentence


def judge(facts: EndFacts) -> tuple[pb.Verdict.ValueType, str]:
    """Decide on the verdict, and say it in one plain sentence."""
    if not facts.ever_entered:
        return pb.VERDICT_ABANDONED, (
            "No process ever entered the call. Start the tool through agentcg-exec or call.run()."
        )
    if facts.oom_kills:
        return _oom(facts)
    by_daemon = _by_daemon(facts)
    if by_daemon is not None:
        return by_daemon
    if facts.wait_status is not None:
        return _by_status(facts, facts.wait_status)
    reason = "its main process ended while the daemon was not there to see it"
    if facts.ended_by == "removed":
        reason = "its cgroup was removed by someone else"
    return pb.VERDICT_UNKNOWN, f"It ended, and how is not known: {reason}."


_FEEDBACK_OF_VERDICT = {
    pb.VERDICT_OOM_CALL: pb.FEEDBACK_CODE_OOM,
    pb.VERDICT_OOM_SESSION: pb.FEEDBACK_CODE_OOM,
    pb.VERDICT_OOM_POOL: pb.FEEDBACK_CODE_OOM,
    pb.VERDICT_OOM_HOST: pb.FEEDBACK_CODE_OOM,
    pb.VERDICT_TIMEOUT: pb.FEEDBACK_CODE_TIMEOUT,
    pb.VERDICT_CANCELLED: pb.FEEDBACK_CODE_CANCELLED,
    pb.VERDICT_STOPPED: pb.FEEDBACK_CODE_STOPPED,
    pb.VERDICT_ABANDONED: pb.FEEDBACK_CODE_ABANDONED,
}


def _killed_from_outside(facts: EndFacts, verdict: pb.Verdict.ValueType) -> bool:
    return (
        verdict == pb.VERDICT_SIGNALED
        and facts.wait_status is not None
        and os.WTERMSIG(facts.wait_status) == signal.SIGKILL
    )


def _feedback(
    code: pb.FeedbackCode.ValueType, sentence: str, **numbers: float | None
) -> pb.Feedback:
    """Make feedback; numbers that are not known are left out."""
    known = {name: float(value) for name, value in numbers.items() if value is not None}
    return pb.Feedback(code=code, sentence=sentence, numbers=known)


def _misjudged(peak: int | None, expected: int) -> list[pb.Feedback]:
    """Compare what the intent said with what the call took, and tell where they are far apart."""
    if peak is None:
        return []
    if expected >= OVERSTATED_LEAST_BYTES and peak * 4 <= expected:
        code = pb.FEEDBACK_CODE_OVERSTATED
        advice = "at most. Ask for less, and calls will wait less for each other."
    elif expected and peak >= max(2 * expected, expected + STATED_SLACK_BYTES):
        code = pb.FEEDBACK_CODE_UNDERSTATED
        advice = "at most. Ask for what it takes, and room is kept for it."
    else:
        return []
    sentence = f"You expected {show_bytes(expected)}; the call took {show_bytes(peak)} {advice}"
    return [_feedback(code, sentence, memory_expected_bytes=expected, memory_peak_bytes=peak)]


def _of_verdict(facts: EndFacts, verdict: pb.Verdict.ValueType, sentence: str) -> list[pb.Feedback]:
    """Tell the verdict where it is no plain end."""
    code = _FEEDBACK_OF_VERDICT.get(verdict)
    if _killed_from_outside(facts, verdict):
        code = pb.FEEDBACK_CODE_KILLED
    if code is None:
        return []
    told = _feedback(
        code,
        sentence,
        memory_peak_bytes=facts.memory_peak_bytes,
        memory_max_bytes=facts.grant.memory_max_bytes,
        oom_kills=facts.oom_kills,
        wall_usec=facts.wall_usec,
        timeout_usec=facts.grant.timeout_usec,
    )
    return [told]


def _of_processes(facts: EndFacts) -> list[pb.Feedback]:
    """Tell of processes that were left behind, and of those that could not be started."""
    told = []
    if facts.leftovers:
        sentence = (
            f"{facts.leftovers} processes that the tool left running were ended with the call. "
            "To keep a server running, end the call with detach."
        )
        code = pb.FEEDBACK_CODE_LEFTOVERS
        told.append(_feedback(code, sentence, processes=facts.leftovers))
    if facts.pids_max_events:
        most, refused = facts.grant.pids_max, facts.pids_max_events
        sentence = (
            f"Starting a process or thread was refused {refused} times: the call may have {most}. "
            "Ask for a larger pids_max, or use fewer workers."
        )
        code = pb.FEEDBACK_CODE_PIDS_LIMIT
        told.append(_feedback(code, sentence, pids_max=most, refused=refused))
    return told


def _of_slowing(facts: EndFacts) -> list[pb.Feedback]:
    """Tell what kept the call waiting: its CPU limit, its memory limit, a pause."""
    told = []
    wall, throttled = facts.wall_usec, facts.cpu.get("throttled_usec", 0)
    if throttled >= max(THROTTLED_LEAST_USEC, wall // 10):
        cores = (facts.grant.cpu_max_millicores or 0) / 1000
        limit = f"its limit of {cores:g} cores" if cores else "a limit above it"
        sentence = (
            f"The call waited {show_usec(throttled)} of {show_usec(wall)} at {limit}. "
            "Use fewer workers or ask for more cpu_max."
        )
        code = pb.FEEDBACK_CODE_CPU_THROTTLED
        told.append(_feedback(code, sentence, throttled_usec=throttled, wall_usec=wall))
    stalled, peak = facts.memory_throttled_usec or 0, facts.memory_peak_bytes
    if facts.memory_high_events and stalled >= THROTTLED_LEAST_USEC:
        sentence = (
            f"The call was slowed for {show_usec(stalled)} because it neared its memory limit. "
            "Ask for more memory_max, or do the work in smaller parts."
        )
        code = pb.FEEDBACK_CODE_MEMORY_THROTTLED
        told.append(_feedback(code, sentence, stalled_usec=stalled, memory_peak_bytes=peak))
    frozen = facts.frozen_usec
    if frozen >= THROTTLED_LEAST_USEC:
        sentence = (
            f"The call was paused for {show_usec(frozen)} while more important work needed the "
            "memory; nothing of it was lost."
        )
        late, code = facts.late_pauses or None, pb.FEEDBACK_CODE_FROZEN
        told.append(_feedback(code, sentence, frozen_usec=frozen, late_pauses=late))
    return told


def feedback_of(facts: EndFacts, verdict: pb.Verdict.ValueType, sentence: str) -> list[pb.Feedback]:
    """Tell an agent, at the end of a call, the verdict where it is no plain end, everything that
    slowed the call, and what could be asked for better next time. `sentence`: that of the
    verdict."""
    return [
        *_of_verdict(facts, verdict, sentence),
        *_of_processes(facts),
        *_of_slowing(facts),
        *_misjudged(facts.memory_peak_bytes, facts.grant.memory_expected_bytes),
    ]


def report_of(facts: EndFacts) -> pb.Report:
    """Make a report from facts: all of it but the names of call and session and the grant."""
    verdict, sentence = judge(facts)
    report = pb.Report(
        verdict=verdict,
        sentence=sentence,
        evidence=facts.evidence,
        wall_usec=facts.wall_usec,
        memory_peak_bytes=facts.memory_peak_bytes,
        cpu_usage_usec=facts.cpu.get("usage_usec", 0),
        cpu_user_usec=facts.cpu.get("user_usec", 0),
        cpu_system_usec=facts.cpu.get("system_usec", 0),
        cpu_throttled_usec=facts.cpu.get("throttled_usec"),
        pids_peak=facts.pids_peak,
        io_read_bytes=facts.io_read_bytes,
        io_write_bytes=facts.io_write_bytes,
        memory_throttled_usec=facts.memory_throttled_usec,
        memory_high_events=facts.memory_high_events,
        oom_kills=facts.oom_kills,
        pids_max_events=facts.pids_max_events,
        frozen_usec=facts.frozen_usec,
        feedback=feedback_of(facts, verdict, sentence),
    )
    if facts.wait_status is not None:
        if os.WIFSIGNALED(facts.wait_status):
            report.term_signal = os.WTERMSIG(facts.wait_status)
        else:
            report.exit_code = os.WEXITSTATUS(facts.wait_status)
    return report
