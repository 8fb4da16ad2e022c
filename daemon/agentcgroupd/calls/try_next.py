"""What a model can do about the way in which its call ended: how much would have been enough, what
takes less, and whether another attempt would start at once. Pure.

How much is enough is known only of a command that has been run whole before in its session; else a
killed call has shown that its limit was too little, and twice as much is the next to try.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.writes import FILLED, WROTE_TOO_MUCH
from agentcgroupd.policy.smaller import Scarce, smaller_work
from agentcgroupd.units import show_bytes

MARGIN = 1.25
"""What is asked for, as a multiple of what was seen to be taken."""
ENDED_BY_ITSELF = (pb.VERDICT_OK, pb.VERDICT_FAILED, pb.VERDICT_SIGNALED)
"""Verdicts on a command that was not ended by a limit or by others, as far as is known."""
_MIB = 1 << 20
_SHELL_KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Room:
    """What a session's next call could have. None: not known, or no limit."""

    memory_free: Callable[[], int | None] = lambda: None
    """Tells the bytes that are free now in the session and the pool, the ended call's part
    included. To find out takes longer than all else here, and most advice is not about it."""
    memory_most_bytes: int | None = None
    """The largest memory_max that a call of the session is granted."""
    pids_most: int | None = None
    timeout_most_usec: int | None = None
    calls_left: int = 1
    """Calls that the session may still begin."""


@dataclass(slots=True)
class _Advice:
    steps: list[str] = field(default_factory=list)
    enough: dict[str, str] = field(default_factory=dict)
    memory_bytes: int = 0
    """What the next attempt needs to be admitted."""
    tells_admission: bool = True


def try_next(
    report: pb.Report, argv: Sequence[str], whole_peak_bytes: int, room: Room
) -> pb.TryNext | None:
    """Say what to try after a call; None: nothing, because it ended well or of its own fault.

    `argv`: the command as the model asked for it. `whole_peak_bytes`: the most that runs of the
    same command took that were not cut short; 0: there was none.
    """
    advice = _Advice()
    for rule in (_of_oom, _of_timeout, _of_denial, _of_stop, _of_pids, _of_gpu, _of_signal):
        rule(report, argv, whole_peak_bytes, room, advice)
        if advice.steps:
            break
    if not advice.steps:
        return None
    admitted = None
    if advice.tells_admission:
        free = room.memory_free()
        admitted = room.calls_left > 0 and (free is None or advice.memory_bytes <= free)
        advice.steps.append(_admission(admitted, free, room))
    return pb.TryNext(steps=advice.steps, enough=advice.enough, admitted_now=admitted)


def _admission(admitted: bool, free_bytes: int | None, room: Room) -> str:
    if admitted:
        return "Such a call would start now."
    if room.calls_left <= 0:
        return "It would not start now: as many calls are open as the session may have."
    free = show_bytes(free_bytes or 0)
    return f"It would not fit now, when {free} are free: wait until other calls have ended."


def in_words(advice: pb.TryNext) -> str:
    """All that is to be tried, in one line."""
    return " ".join(advice.steps)


def size_text(value: float) -> str:
    """Bytes as an intent has them, in whole MiB, rounded up."""
    return f"{-(-int(value) // _MIB)}M"


def _told(report: pb.Report, *codes: pb.FeedbackCode.ValueType) -> pb.Feedback | None:
    return next((item for item in report.feedback if item.code in codes), None)


# Memory


def _of_oom(
    report: pb.Report, argv: Sequence[str], whole: int, room: Room, advice: _Advice
) -> None:
    verdict, peak = report.verdict, report.memory_peak_bytes
    child = _told(report, pb.FEEDBACK_CODE_OOM)
    if verdict == pb.VERDICT_OOM_CALL or (child is not None and verdict in ENDED_BY_ITSELF):
        limit = report.grant.memory_max_bytes or peak
        if child is not None and verdict in ENDED_BY_ITSELF and peak < limit // 2:
            _elsewhere(report, argv, room, advice)
        else:
            _more_memory(limit, argv, whole, room, advice)
    elif verdict == pb.VERDICT_OOM_SESSION:
        advice.memory_bytes = int(max(peak, whole) * MARGIN)
        advice.steps.append(
            "Run it when the session's other calls have ended, or in a smaller form: "
            + smaller_work(argv, Scarce.MEMORY)
        )
        advice.enough["memory"] = size_text(advice.memory_bytes)
    elif verdict in (pb.VERDICT_OOM_POOL, pb.VERDICT_OOM_HOST):
        _elsewhere(report, argv, room, advice)
        if verdict == pb.VERDICT_OOM_HOST:
            # A container may have a limit around it that is nobody else's doing.
            advice.steps.append(
                "If it ends the same way again, do it in a smaller form: "
                + smaller_work(argv, Scarce.MEMORY)
            )


def _more_memory(limit: int, argv: Sequence[str], whole: int, room: Room, advice: _Advice) -> None:
    wanted = int(whole * MARGIN) if whole > limit else 2 * limit
    most = room.memory_most_bytes
    if most is not None and most <= limit + limit // 16:
        advice.steps.append(
            f"No larger limit is to be had in this session ({show_bytes(most)} at most). "
            + smaller_work(argv, Scarce.MEMORY)
        )
        advice.memory_bytes = limit
        return
    wanted = min(wanted, most or wanted)
    advice.enough["memory_max"] = size_text(wanted)
    known = f"it took {show_bytes(whole)} when it was run whole" if whole > limit else "twice that"
    advice.steps.append(
        f"{show_bytes(limit)} was too little; run it again with memory_max={size_text(wanted)} "
        f"({known}), or in a smaller form: {smaller_work(argv, Scarce.MEMORY)}"
    )
    advice.memory_bytes = wanted


def _elsewhere(report: pb.Report, argv: Sequence[str], room: Room, advice: _Advice) -> None:
    """Advise on memory that ran out above the session, for which others are the reason."""
    needed = int(report.memory_peak_bytes * MARGIN)
    advice.enough["memory"] = size_text(needed)
    advice.memory_bytes = needed
    advice.steps.append(
        f"Others took the memory. Run it again with memory={size_text(needed)}: it then waits for "
        "room and does not begin without."
    )


def _of_denial(
    report: pb.Report, argv: Sequence[str], whole: int, room: Room, advice: _Advice
) -> None:
    if _told(report, pb.FEEDBACK_CODE_GROWTH_DENIED) is None or report.verdict == pb.VERDICT_OK:
        return
    needed = int(max(report.memory_peak_bytes * 2, whole * MARGIN))
    advice.enough["memory"] = size_text(needed)
    advice.memory_bytes = needed
    advice.steps.append(
        f"It was refused memory while others needed it. Run it again with "
        f"memory={size_text(needed)}, for which room is kept, or in a smaller form: "
        + smaller_work(argv, Scarce.MEMORY)
    )


def _of_stop(
    report: pb.Report, argv: Sequence[str], whole: int, room: Room, advice: _Advice
) -> None:
    if report.verdict != pb.VERDICT_STOPPED:
        return
    if _of_disk(report, argv, advice):
        return
    needed = int(max(report.memory_peak_bytes, whole) * MARGIN)
    advice.enough["memory"] = size_text(needed)
    advice.memory_bytes = needed
    advice.steps.append(
        f"Run it again with memory={size_text(needed)}, so that it waits for room, or in a smaller "
        f"form: {smaller_work(argv, Scarce.MEMORY)}"
    )


def _of_disk(report: pb.Report, argv: Sequence[str], advice: _Advice) -> bool:
    """Advise a call that was ended for what it wrote; returns whether it was."""
    if report.sentence.startswith(FILLED):
        advice.steps.append(
            "Remove files that are not needed any more before it is run again, or have it write "
            "less: more memory does not help."
        )
        advice.tells_admission = False
        return True
    if not report.sentence.startswith(WROTE_TOO_MUCH):
        return False
    wanted = size_text(2 * report.grant.disk_max_bytes)
    advice.enough["disk_max"] = wanted
    advice.steps.append(
        f"Find out what it writes without end, or, if all of that is wanted, run it again with "
        f"disk_max={wanted} (twice that)."
    )
    return True


# Other limits


def _of_timeout(
    report: pb.Report, argv: Sequence[str], whole: int, room: Room, advice: _Advice
) -> None:
    if report.verdict != pb.VERDICT_TIMEOUT:
        return
    limit, most = report.grant.timeout_usec, room.timeout_most_usec
    less = smaller_work(argv, Scarce.TIME)
    paused = ""
    if report.frozen_usec * 4 >= limit:
        paused = "It was paused for much of that, for which others were the reason. "
    if most is not None and most <= limit:
        advice.steps.append(f"{paused}No longer timeout is to be had. {less}")
        return
    seconds = -(-min(2 * limit, most or 2 * limit) // 1_000_000)
    advice.enough["timeout"] = f"{seconds}s"
    advice.steps.append(
        f"{paused}Run it again with timeout={seconds}s (twice that), or in a smaller form: {less}"
    )


def _of_pids(
    report: pb.Report, argv: Sequence[str], whole: int, room: Room, advice: _Advice
) -> None:
    told = _told(report, pb.FEEDBACK_CODE_PIDS_LIMIT)
    if told is None or report.verdict == pb.VERDICT_OK:
        return
    limit, fewer = report.grant.pids_max, smaller_work(argv, Scarce.PROCESSES)
    if not limit or told.numbers.get("pids_max") != limit or limit >= (room.pids_most or 1 << 30):
        advice.steps.append(fewer)
        return
    refused = int(told.numbers.get("refused", 0))
    wanted = max(2 * limit, limit + refused)
    if room.pids_most:
        wanted = min(wanted, room.pids_most)
    advice.enough["pids_max"] = str(wanted)
    advice.steps.append(f"Run it again with pids_max={wanted}, or: {fewer}")


def _of_gpu(
    report: pb.Report, argv: Sequence[str], whole: int, room: Room, advice: _Advice
) -> None:
    denied = _told(report, pb.FEEDBACK_CODE_GPU_MEMORY_DENIED, pb.FEEDBACK_CODE_GPU_MEMORY_OVER)
    if denied is None or report.verdict == pb.VERDICT_OK:
        return
    quota = report.grant.gpu_memory_bytes
    less = smaller_work(argv, Scarce.GPU)
    if quota:
        advice.enough["gpu_memory"] = size_text(2 * quota)
        less = f"Ask for gpu_memory={size_text(2 * quota)}, or: {less}"
    advice.steps.append(less)
    advice.tells_admission = False  # who has which part of a GPU changes until it is asked for


# Ended by others


def _of_signal(
    report: pb.Report, argv: Sequence[str], whole: int, room: Room, advice: _Advice
) -> None:
    advice.steps.extend(_signal_steps(report))
    advice.tells_admission = False


def _signal_steps(report: pb.Report) -> Iterator[str]:
    if report.verdict == pb.VERDICT_CANCELLED:
        yield "It was ended on purpose: find out why before you start it again."
    elif report.term_signal == signal.SIGXFSZ:
        yield "It wrote a file larger than it may (RLIMIT_FSIZE): write less, or to several files."
    elif report.term_signal == signal.SIGXCPU:
        yield "It used all the CPU time that it may (RLIMIT_CPU): do less at a time."
    elif report.term_signal == signal.SIGKILL:
        yield (
            "No limit of agentcgroup was reached. Run it once more as it is; if it is killed "
            "again, something else on this host kills it, and more memory here will not help."
        )
    elif report.verdict == pb.VERDICT_FAILED and report.exit_code == _SHELL_KILLED:
        yield "No limit of agentcgroup was reached. Run it once more as it is."
