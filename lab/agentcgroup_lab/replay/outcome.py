"""Outcomes of calls: the drivers' logs put together with the daemon's reports."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentcgroup_lab.replay.result import CallResult, Latency, Outcome, Span
from agentcgroup_lab.trace.plan import Plan, PlannedCall

_REFUSED = 125  # agentcg-exec's own exit status, as env(1) has it
_SPAN_MIN_S = 0.001
_LATENCY_NAME = "call-{}.latency"
_LATENCY_PATTERN = re.compile(r"/call-(\d+)\.latency$")


@dataclass(slots=True)
class DaemonWord:
    """The daemon's words on a call. Times are seconds since the strategy's start."""

    verdict: str | None = None
    sentence: str | None = None
    freezes_s: list[tuple[float, bool]] = field(default_factory=list)

    def frozen(self, end_s: float) -> tuple[Span, ...]:
        """The stretches that the call was frozen; one that no thaw ended lasts to `end_s`."""
        spans: list[Span] = []
        since: float | None = None
        for at_s, froze in sorted(self.freezes_s):
            if froze and since is None:
                since = at_s
            elif not froze and since is not None:
                spans.append(Span(since, at_s))
                since = None
        if since is not None:
            spans.append(Span(since, end_s))
        # A call's end is told with all that was said of it before: such a span has no length.
        return tuple(span for span in spans if span.end_s - span.start_s > _SPAN_MIN_S)


def latency_file(work: Path, index: int) -> Path:
    """Path to which a call writes its allocation latencies. It stands in the call's command line,
    which is how the daemon's reports are matched with the plan."""
    return work / _LATENCY_NAME.format(index)


def _index_of(argv: Sequence[str]) -> int | None:
    for argument in argv:
        if match := _LATENCY_PATTERN.search(argument):
            return int(match.group(1))
    return None


def reports(
    events: Sequence[Any], session_id: str, unix_started: float
) -> Mapping[int, DaemonWord]:
    """The daemon's events about one session, by the index of the planned call."""
    if not events:
        return {}
    from agentcgroup.v1 import agentcgroup_pb2 as pb

    by_id: dict[str, int] = {}
    words: dict[int, DaemonWord] = {}
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "begun" and event.begun.session_id == session_id:
            index = _index_of(event.begun.argv)
            if index is not None:
                by_id[event.begun.id] = index
        elif kind == "ended" and event.ended.session_id == session_id:
            index = _index_of(event.ended.argv)
            if index is not None:
                word = words.setdefault(index, DaemonWord())
                word.verdict = pb.Verdict.Name(event.ended.verdict).removeprefix("VERDICT_").lower()
                word.sentence = event.ended.sentence
    told = (pb.FEEDBACK_CODE_FROZEN, pb.FEEDBACK_CODE_THAWED)
    for event in events:
        item = event.feedback
        if event.WhichOneof("event") == "feedback" and item.code in told and item.call_id in by_id:
            at_s = item.at_unix_usec / 1e6 - unix_started
            word = words.setdefault(by_id[item.call_id], DaemonWord())
            word.freezes_s.append((at_s, item.code == pb.FEEDBACK_CODE_FROZEN))
    return words


def _outcome(status: int) -> Outcome:
    """Read a wait status. A signal is a kill: nobody but limits, policy and the kernel sends
    any."""
    if os.WIFSIGNALED(status):
        return "killed"
    code = os.waitstatus_to_exitcode(status)
    if code == _REFUSED:
        return "refused"
    return "failed" if code else "finished"


def _call_result(
    call: PlannedCall,
    begun: float | None,
    end: Mapping[str, Any] | None,
    word: DaemonWord,
    started: float,
    session_ended: float,
) -> CallResult:
    outcome: Outcome = "not run"
    exit_code = term_signal = None
    ended_s = None
    if begun is not None:
        # A call that has no end was running when its session was lost.
        outcome, ended_s = "killed", session_ended - started
    if end is not None:
        status = int(end["status"])
        outcome, ended_s = _outcome(status), end["t"] - started
        if os.WIFSIGNALED(status):
            term_signal = os.WTERMSIG(status)
        else:
            exit_code = os.waitstatus_to_exitcode(status)
    return CallResult(
        index=call.index,
        tool=call.tool,
        outcome=outcome,
        planned_s=round(call.end_s - call.start_s, 4),
        planned_peak_bytes=call.peak_bytes,
        began_s=None if begun is None else begun - started,
        ended_s=ended_s,
        exit_code=exit_code,
        term_signal=term_signal,
        verdict=word.verdict,
        sentence=word.sentence or (end.get("why") if end else None),
        frozen=word.frozen(ended_s if ended_s is not None else session_ended - started),
    )


def call_results(
    plan: Plan,
    log: Sequence[Mapping[str, Any]],
    words: Mapping[int, DaemonWord],
    started: float,
    session_ended: float,
) -> tuple[CallResult, ...]:
    """Return a result for each planned call; `started` and the log's times are CLOCK_MONOTONIC."""
    begun = {event["i"]: float(event["t"]) for event in log if event["e"] == "begin"}
    ends = {event["i"]: event for event in log if event["e"] == "end"}
    return tuple(
        _call_result(
            call,
            begun.get(call.index),
            ends.get(call.index),
            words.get(call.index, DaemonWord()),
            started,
            session_ended,
        )
        for call in plan.calls
    )


def alloc_latency(work: Path) -> Latency | None:
    """Sum up how long single allocations took in a session's calls. None where none was made.

    Each call wrote its own quantiles (`agentcg-load --alloc-latency`); a killed one wrote none. The
    session's are their means weighted by the number of allocations; the maximum is exact.
    """
    calls = [
        json.loads(text)
        for path in work.glob(_LATENCY_NAME.format("*"))
        if (text := path.read_text(encoding="ascii"))
    ]
    calls = [call for call in calls if call["n"]]
    total = sum(call["n"] for call in calls)
    if not total:
        return None

    def mean(name: str) -> float:
        return float(sum(call["n"] * call[name] for call in calls) / total)

    return Latency(
        n=total,
        p50_usec=mean("p50_usec"),
        p95_usec=mean("p95_usec"),
        p99_usec=mean("p99_usec"),
        max_usec=max(call["max_usec"] for call in calls),
    )
