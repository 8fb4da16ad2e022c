"""What an agent is told at the end of a call besides the verdict's sentence. Pure."""

from __future__ import annotations

import signal

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.facts import EndFacts, LimitHit
from agentcgroupd.calls.words import (
    child_oom,
    count_of,
    earlier_left_words,
    earlier_oom,
    gone_words,
    left_words,
    outside_words,
    swept_words,
)
from agentcgroupd.units import show_bytes, show_usec

STATED_SLACK_BYTES = 64 << 20
"""A call that takes at most this much more than it expected hurts nobody."""
OVERSTATED_LEAST_BYTES = 64 << 20
"""Below this an overstated intent keeps nobody out."""
FEWER_CPUS_RATIO = 1.5
"""CPUs seen, for each that may be used, from which on workers by their count are too many."""
NEAR_LIMIT_SHARE = 0.9
"""A call that has come to this part of its own limit was slowed by that; else by its credit."""
THROTTLED_LEAST_USEC = 100_000
"""Shorter stalls are noise that an agent can do nothing about."""

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
    if verdict == pb.VERDICT_SIGNALED and facts.signal == signal.SIGKILL:
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


def _of_oom(facts: EndFacts) -> list[pb.Feedback]:
    """Tell of processes that the kernel's OOM killer ended, where that is not the verdict."""
    kills = facts.oom.least + facts.oom.least_before
    told = [child_oom(facts)] if facts.ever_entered else []
    told.append(earlier_oom(facts))
    return [
        _feedback(
            pb.FEEDBACK_CODE_OOM,
            sentence,
            memory_peak_bytes=facts.memory_peak_bytes,
            memory_max_bytes=facts.grant.memory_max_bytes,
            oom_kills=kills,
        )
        for sentence in filter(None, told)
    ]


def _of_leaving(facts: EndFacts) -> list[pb.Feedback]:
    """Tell that the main process left its call, or others of it."""
    code = pb.FEEDBACK_CODE_LEFT_CALL
    told = []
    if facts.left:
        told.append(_feedback(code, left_words(facts), pid=facts.left[-1].pid))
    if facts.gone_count or facts.gone_before:
        count = facts.gone_count + facts.gone_before
        told.append(_feedback(code, gone_words(facts), processes=count))
    for left, words in zip(facts.left_before, earlier_left_words(facts), strict=True):
        told.append(_feedback(code, words, pid=left.pid))
    if facts.ender is not None and facts.ender.outside:
        told.append(_feedback(code, outside_words(facts), processes=facts.ender.outside))
    return told


def _of_leftovers(facts: EndFacts) -> list[pb.Feedback]:
    """Tell of processes that were left behind."""
    left = facts.leftovers
    if not left:
        return []
    swept = swept_words(facts)
    was = "was" if left == 1 else "were"
    said = swept or f"{count_of(left)} that the tool left running {was} ended with the call."
    sentence = f"{said} To keep a server running, ask for leftovers = keep."
    return [_feedback(pb.FEEDBACK_CODE_LEFTOVERS, sentence, processes=left)]


def _of_pids(facts: EndFacts) -> list[pb.Feedback]:
    """Tell of processes that could not be started, for each limit that kept them from it."""
    code = pb.FEEDBACK_CODE_PIDS_LIMIT
    return [
        _feedback(code, _pids_words(hit), pids_max=hit.limit, refused=hit.times)
        for hit in facts.pids_hits
    ]


def _pids_words(hit: LimitHit) -> str:
    times = "once" if hit.times == 1 else f"{hit.times} times"
    refused = f"Starting a process or thread was refused {times}"
    most = "a number that is not known" if hit.limit is None else str(hit.limit)
    match hit.level:
        case pb.LEVEL_NESTED:
            what = f"the cgroup {hit.name!r}" if hit.name else "a cgroup, gone since,"
            return f"{refused}: {what} that the tool made below its call may have {most}."
        case pb.LEVEL_CALL:
            return (
                f"{refused}: the call may have {most}. Ask for a larger pids_max, or use fewer "
                "workers."
            )
        case pb.LEVEL_OUTER:
            return f"{refused} in call {hit.name}, which this one is in: that one may have {most}."
        case pb.LEVEL_SESSION:
            return (
                f"{refused} in this session while the call ran: all of the session together may "
                f"have {most}. Run fewer calls at a time, or use fewer workers."
            )
        case pb.LEVEL_POOL:
            return f"{refused} while the call ran: all sessions together may have {most}."
        case _:
            return (
                f"{refused} while the call ran: the cgroup {hit.name!r} above this session may "
                f"have {most}."
            )


def _of_fewer_cpus(facts: EndFacts) -> list[pb.Feedback]:
    """Tell a call that was throttled where the CPUs that it counted were more than it may use: it
    may have started a worker for each."""
    limits = [facts.grant.cpu_max_millicores, facts.session_cpu_millicores]
    least = min((limit for limit in limits if limit), default=None)
    seen = facts.cpus_seen
    if least is None or seen is None or seen * 1000 < least * FEWER_CPUS_RATIO:
        return []
    workers = max(1, least // 1000)
    sentence = (
        f"Programs that count CPUs (nproc, os.cpu_count) saw {seen} and could use "
        f"{least / 1000:g}. "
        f"Say how many workers to start: make -j{workers}, OMP_NUM_THREADS={workers}."
    )
    code = pb.FEEDBACK_CODE_FEWER_CPUS
    return [_feedback(code, sentence, cpus_seen=seen, cpu_max_millicores=least)]


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
        told.extend(_of_fewer_cpus(facts))
    stalled, peak = facts.memory_throttled_usec or 0, facts.memory_peak_bytes
    if facts.memory_high_events and stalled >= THROTTLED_LEAST_USEC:
        near = facts.grant.memory_high_bytes or facts.grant.memory_max_bytes
        if near is not None and peak is not None and peak >= near * NEAR_LIMIT_SHARE:
            sentence = (
                f"The call was slowed for {show_usec(stalled)} because it neared its memory limit. "
                "Ask for more memory_max, or do the work in smaller parts."
            )
        else:
            sentence = (
                f"The call waited {show_usec(stalled)} for memory of the pool, which others needed "
                "as well. Say how much it expects (memory), and room is kept for it."
            )
        code = pb.FEEDBACK_CODE_MEMORY_THROTTLED
        told.append(_feedback(code, sentence, stalled_usec=stalled, memory_peak_bytes=peak))
    others = facts.frozen_by_others_usec
    if others >= THROTTLED_LEAST_USEC:
        sentence = (
            f"The call was frozen for {show_usec(others)} by others than agentcgroup, who wrote to "
            "cgroup.freeze of its cgroup or of one above it."
        )
        told.append(_feedback(pb.FEEDBACK_CODE_FROZEN, sentence, frozen_usec=others))
    frozen = facts.frozen_usec
    if frozen >= THROTTLED_LEAST_USEC:
        why = "while more important work needed the memory"
        if facts.operator_usec >= frozen:
            why = "by the operator"
        elif facts.disk_usec >= frozen:
            why = "because a file system that it wrote to was nearly full"
        elif facts.operator_usec:
            why += f", {show_usec(facts.operator_usec)} of it by the operator"
        sentence = f"The call was paused for {show_usec(frozen)} {why}; nothing of it was lost."
        late, code = facts.late_pauses or None, pb.FEEDBACK_CODE_FROZEN
        told.append(_feedback(code, sentence, frozen_usec=frozen, late_pauses=late))
    return told


def feedback_of(facts: EndFacts, verdict: pb.Verdict.ValueType, sentence: str) -> list[pb.Feedback]:
    """Tell an agent, at the end of a call, the verdict where it is no plain end, everything that
    slowed the call, and what could be asked for better next time. `sentence`: that of the
    verdict."""
    return [
        *_of_verdict(facts, verdict, sentence),
        *_of_oom(facts),
        *_of_leaving(facts),
        *_of_leftovers(facts),
        *_of_pids(facts),
        *_of_slowing(facts),
        *_misjudged(facts.memory_peak_bytes, facts.grant.memory_expected_bytes),
    ]
