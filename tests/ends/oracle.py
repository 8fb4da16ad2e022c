"""What a report has to say of an end, from the plan and from what was seen; written without a look
at how the daemon judges."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.ends.carry import Seen
from tests.ends.plans import Plan

Verdict: TypeAlias = pb.Verdict.ValueType
Code: TypeAlias = pb.FeedbackCode.ValueType

CLOSE_S = 0.3
"""An end this shortly before the timeout may be taken for either."""
JUDGED: set[Code] = {
    pb.FEEDBACK_CODE_OOM,
    pb.FEEDBACK_CODE_TIMEOUT,
    pb.FEEDBACK_CODE_CANCELLED,
    pb.FEEDBACK_CODE_KILLED,
    pb.FEEDBACK_CODE_LEFTOVERS,
    pb.FEEDBACK_CODE_LEFT_CALL,
    pb.FEEDBACK_CODE_STOPPED,
    pb.FEEDBACK_CODE_ABANDONED,
}
"""The feedback that tells of an end; other feedback is of slowness and the like."""
OOM_VERDICTS: dict[str, tuple[Verdict, str]] = {
    "call": (pb.VERDICT_OOM_CALL, "the call reached its own limit of 64 MiB"),
    "nested": (pb.VERDICT_OOM_CALL, "the cgroup 'job' that the tool made"),
    "session": (pb.VERDICT_OOM_SESSION, "this session together reached its limit of 160 MiB"),
}
REASONS: dict[int, str] = {
    pb.END_REASON_TIMEOUT: "its caller says that a timeout of its own had passed",
    pb.END_REASON_CANCELLED: "its caller says that it was cancelled",
}
WHOLE = ("call", "session")
"""Levels at which the kernel ends a call as a whole."""


def mistakes(plan: Plan, seen: Seen) -> list[str]:
    """What is wrong with a report; empty: it says what happened."""
    wrong = list(_of_status(seen))
    wrong += [f"process {pid} lives on" for pid in seen.alive]
    found = min((list(_of_end(plan, seen, way)) for way in _ways(plan, seen)), key=len)
    return wrong + found


def _of_status(seen: Seen) -> Iterator[str]:
    report, status = seen.report, seen.status
    if not report.facts:
        yield "there are no facts"
    for note in seen.noted("child oom"):
        if note["status"] != signal.SIGKILL:
            yield f"the child ended with {note['status']}"
    if status is None:
        return
    told: int | None = None
    if report.HasField("exit_code"):
        told = report.exit_code
    elif report.HasField("term_signal"):
        told = -report.term_signal
    if told != status:
        yield f"the status is told as {told}, and was {status}"


@dataclass(frozen=True)
class Way:
    """A way in which it can have been."""

    ended: bool
    """Whether the plan's ender ended the main process."""
    together: bool
    """Whether what the main process had started was ended with it."""


BY_ENDER, BY_ITSELF = Way(True, True), Way(False, False)
IN_GRACE = Way(False, True)
"""It ran out of memory between SIGTERM and SIGKILL, which were meant for all."""


def _ways(plan: Plan, seen: Seen) -> list[Way]:
    """The ways that what was seen leaves open: more than one where the timeout was close."""
    if plan.end == "never":
        return [BY_ENDER if plan.ender != "caller" else Way(True, False)]
    if plan.ender != "timeout":
        return [BY_ITSELF if plan.oom not in WHOLE else Way(False, True)]
    ways = [BY_ITSELF if plan.oom not in WHOLE else Way(False, True)]
    left = seen.ended_before_s
    if left is not None and left > CLOSE_S:
        return ways
    ways.append(BY_ENDER)
    if left is None and not seen.noted("ending") and plan.end != "oom":
        return [BY_ENDER]
    return [*ways, IN_GRACE] if plan.end == "oom" else ways


def _of_end(plan: Plan, seen: Seen, way: Way) -> Iterator[str]:
    """Compare a report with what had to come if it was this way."""
    report = seen.report
    codes = {f.code for f in report.feedback} & JUDGED
    verdict, words, expected = _verdict(plan, way.ended)
    if report.verdict != verdict:
        yield f"verdict {pb.Verdict.Name(report.verdict)}, not {pb.Verdict.Name(verdict)}"
    left = 0 if way.together else len(plan.children)
    if left:
        expected.add(pb.FEEDBACK_CODE_LEFTOVERS)
        told = [f for f in report.feedback if f.code == pb.FEEDBACK_CODE_LEFTOVERS]
        if told and told[0].numbers["processes"] != left:
            yield f"{told[0].numbers['processes']:g} processes were left, not {left}"
        words += _sweeper(plan)
    if seen.noted("child oom"):
        expected.add(pb.FEEDBACK_CODE_OOM)
        words.append("not its main process: the cgroup 'job' that the tool made")
    if seen.noted("left"):
        expected.add(pb.FEEDBACK_CODE_LEFT_CALL)
    elif seen.noted("leaving"):
        codes.discard(pb.FEEDBACK_CODE_LEFT_CALL)  # it was ended at that very moment
    if codes != expected:
        yield f"feedback {_names(codes)}, not {_names(expected)}"
    for text in words:
        if text not in report.sentence:
            yield f"the sentence lacks {text!r}"


def _names(codes: set[Code]) -> list[str]:
    return sorted(pb.FeedbackCode.Name(code) for code in codes)


def _verdict(plan: Plan, ended: bool) -> tuple[Verdict, list[str], set[Code]]:
    """The verdict, words of the sentence, and the feedback that comes with it."""
    if plan.end == "oom" and not ended:
        verdict, text = OOM_VERDICTS[plan.oom]
        return verdict, [text], {pb.FEEDBACK_CODE_OOM}
    if ended:
        return _by_ender(plan)
    return _by_itself(plan)


def _by_ender(plan: Plan) -> tuple[Verdict, list[str], set[Code]]:
    if plan.ender == "timeout":
        return pb.VERDICT_TIMEOUT, ["at its timeout of"], {pb.FEEDBACK_CODE_TIMEOUT}
    if plan.ender == "caller":
        # Killed by its parent, which says so afterwards or not at all.
        said = ["by whom is not known", *_said_afterwards(plan)]
        return pb.VERDICT_SIGNALED, said, {pb.FEEDBACK_CODE_KILLED}
    text = {
        "operator": "the operator ended the call",
        "session": "its session was closed",
    }.get(plan.ender) or REASONS.get(plan.reason, "its agent ended the call")
    return pb.VERDICT_CANCELLED, [text], {pb.FEEDBACK_CODE_CANCELLED}


def _by_itself(plan: Plan) -> tuple[Verdict, list[str], set[Code]]:
    if plan.end == "exit":
        verdict = pb.VERDICT_FAILED if plan.code else pb.VERDICT_OK
        text = f"exit status {plan.code}" if plan.code else "It ended well."
        return verdict, [text], set()
    name = signal.Signals(plan.number).name
    said = []
    if plan.number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        said = _said_afterwards(plan)
    if plan.number == signal.SIGKILL:
        text = "by whom is not known"
        return pb.VERDICT_SIGNALED, [name, text, *said], {pb.FEEDBACK_CODE_KILLED}
    return pb.VERDICT_SIGNALED, [f"It died of {name}", *said], set()


def _said_afterwards(plan: Plan) -> list[str]:
    """What its agent says when it ends the call of a process that has died."""
    if plan.ender not in ("agent", "caller") or plan.reason not in REASONS:
        return []
    return [REASONS[plan.reason]]


def _sweeper(plan: Plan) -> list[str]:
    count = len(plan.children)
    ended = f"{count} process{'' if count == 1 else 'es'} that it had left running"
    if plan.ender == "timeout":
        return ["At the call's timeout of", ended]
    if plan.ender == "operator":
        return [f"{ended} {'was' if count == 1 else 'were'} ended by the operator"]
    if plan.ender == "session":
        return [f"{ended} {'was' if count == 1 else 'were'} ended with its session"]
    return []
