"""The story of a call, in order: what it asked for and got, what was done to it and why, and how it
ended. Made of its report and of what was kept about it; a decision is told in its own words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.read import Happened
from agentcgroupd.units import show_bytes, show_usec

STEPS_MOST = 120
"""Beyond, steps in the middle are left out."""
STEP_BYTES_MOST = 200
_OF_SESSION = "The whole session: "


def story(
    call_id: str,
    session_id: str,
    call: pb.Call | None,
    report: pb.Report | None,
    entries: Sequence[Happened],
) -> pb.Story:
    """Tell of a call. `call`: as it is now, if it is open; `report`: if it has ended. Without both
    it waits, or nobody saw how it ended."""
    known = report if report is not None else call
    began_usec = known.began_unix_usec if known is not None else _began_usec(entries)
    waited_usec = known.waited_usec if known is not None else 0
    steps = [step for e in entries for step in _steps_of(e, began_usec - waited_usec, began_usec)]
    if known is not None and known.HasField("grant"):
        steps.append(_granted(known.grant, began_usec))
    if waited_usec and not any(step.what == "call_started" for step in steps):
        sentence = f"It began after {show_usec(waited_usec)} in the queue."
        numbers = {"waited_usec": float(waited_usec)}
        steps.append(_step(began_usec, "call_started", sentence, numbers))
    if report is not None:
        steps += [_fact(fact, _ended_usec(report)) for fact in report.facts]
    # A fact whose time is not known is told right before the end.
    last = max((step.at_unix_usec for step in steps), default=0)
    steps.sort(key=lambda step: (step.at_unix_usec or last, _ORDER.get(step.what, 2)))
    if report is not None:
        steps.append(_end(report, last))
    kept = _middle_left_out(steps)
    return pb.Story(
        call_id=call_id,
        session_id=session_id,
        name=known.name if known is not None else _name(entries),
        steps=kept,
        steps_left_out=len(steps) - len(kept),
        report=report,
        advice=[] if report is None else _advice(report),
        state=pb.CALL_STATE_UNSPECIFIED if call is None else call.state,
    )


def _began_usec(entries: Sequence[Happened]) -> int:
    of_call = (entry.at_usec for entry in entries if not entry.of_session)
    return min(of_call, default=0)


def _name(entries: Sequence[Happened]) -> str:
    names = (str(e.fields["name"]) for e in entries if not e.of_session and "name" in e.fields)
    return next(names, "")


_ORDER = {"asked": -2, "call_waiting": -1, "call_started": 0, "granted": 1}
"""What comes first of steps of the same moment."""


def _middle_left_out(steps: Sequence[pb.Step]) -> Sequence[pb.Step]:
    if len(steps) <= STEPS_MOST:
        return steps
    half = STEPS_MOST // 2
    return [*steps[:half], *steps[-half:]]


def _step(
    at_usec: int, what: str, sentence: str, numbers: Mapping[str, float] | None = None
) -> pb.Step:
    cut = sentence if len(sentence) <= STEP_BYTES_MOST else f"{sentence[:STEP_BYTES_MOST]}..."
    return pb.Step(at_unix_usec=at_usec, what=what, sentence=cut, numbers=dict(numbers or {}))


# What was asked and granted


def _limits(grant: pb.Grant) -> dict[str, tuple[float, str]]:
    """Limits of a grant by the names of their fields: the number, and words for it."""
    shown: dict[str, Callable[[float], str]] = {
        "memory_high_bytes": lambda v: f"memory high {show_bytes(v)}",
        "memory_max_bytes": lambda v: f"at most {show_bytes(v)} of memory",
        "cpu_max_millicores": lambda v: f"{v / 1000:g} cores",
        "pids_max": lambda v: f"{v:.0f} processes",
        "timeout_usec": lambda v: f"{show_usec(v)} of time",
        "disk_max_bytes": lambda v: f"{show_bytes(v)} written to disks",
        "net_send_bytes_per_s": lambda v: f"{show_bytes(v)} a second sent",
    }
    given = {field.name: value for field, value in grant.ListFields()}
    values = {name: float(given[name]) for name in shown if name in given}
    return {name: (value, shown[name](value)) for name, value in values.items()}


def _granted(grant: pb.Grant, at_usec: int) -> pb.Step:
    limits = _limits(grant)
    numbers = {name: number for name, (number, _) in limits.items()}
    words = [words for _, words in limits.values()] or ["no limit of its own"]
    words.append(f"priority {grant.priority}")
    if grant.memory_expected_bytes:
        words.append(f"{show_bytes(grant.memory_expected_bytes)} expected")
    advice = "".join(f" {sentence}" for sentence in grant.advice)
    not_enforced = ", ".join(grant.not_enforced)
    here = f" Not enforced here: {not_enforced}." if not_enforced else ""
    return _step(at_usec, "granted", f"It was granted {', '.join(words)}.{advice}{here}", numbers)


# What happened


def _steps_of(entry: Happened, asked_usec: int, began_usec: int) -> list[pb.Step]:
    """Tell an entry. `asked_usec`, `began_usec`: when the call was asked for, and when it began."""
    fields = entry.fields
    numbers = {
        name: float(value)
        for name, value in fields.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if entry.event == "call_begun":
        intent = fields.get("intent")
        if not isinstance(intent, dict):
            return []
        asked = ", ".join(f"{name} {value}" for name, value in intent.items())
        sentence = f"It asked for {asked}." if asked else "It asked for nothing in particular."
        if fields.get("observed"):
            sentence = "Nobody declared it: the agent was seen to execute a tool."
        return [_step(asked_usec, "asked", sentence)]
    words = _WORDS.get(entry.event)
    why = str(fields.get("why") or "")
    sentence = words(fields) if words is not None else f"{entry.event.replace('_', ' ')}."
    if why and entry.event in _WHOLE:
        sentence = why
    elif why:
        sentence = f"{sentence.removesuffix('.')}: {why}" if words is not None else why
    of_session = _OF_SESSION if entry.of_session else ""
    at_usec = began_usec if entry.event == "call_started" else entry.at_usec
    return [_step(at_usec, entry.event, f"{of_session}{sentence}", numbers)]


def _bytes(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return show_bytes(value) if isinstance(value, int) else "some memory"


def _usec(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return show_usec(value) if isinstance(value, int) else "some time"


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "call_waiting": lambda f: f"It waited in the queue, as number {f.get('position', '?')}.",
    "call_started": lambda f: f"It began after {_usec(f, 'waited_usec')} in the queue.",
    "call_updated": lambda f: "Its grant was changed.",
    "call_moved": lambda f: (
        f"Its process was moved into its cgroup {_usec(f, 'since_exec_usec')} after its exec."
    ),
    "freeze": lambda f: "It was paused.",
    "thaw": lambda f: "It went on.",
    "hold": lambda f: "The operator paused it.",
    "unhold": lambda f: "The operator let it go on.",
    "pause_late": lambda f: f"The pause had not stopped all of it after {_usec(f, 'passed_usec')}.",
    "deny": lambda f: "It was allowed to grow no further.",
    "allow": lambda f: "It was allowed to grow again.",
    "denied": lambda f: "It was refused memory.",
    "throttle": lambda f: "It was slowed.",
    "unthrottle": lambda f: "It was not slowed any more.",
    "kill": lambda f: "It was ended by policy.",
    "io_weight": lambda f: "It was given a smaller share of disks.",
    "io_unweight": lambda f: "It was given disks as before.",
    "io_max": lambda f: "It was held to a rate on disks.",
    "io_unmax": lambda f: "It was held to no rate on disks any more.",
    "disk_hold": lambda f: "It was paused, for a file system was filling.",
    "disk_unhold": lambda f: "It went on, for there was room on the file system.",
    "disk_kill": lambda f: "It was ended for what it wrote.",
    "oom_victim": lambda f: (
        f"The kernel's OOM killer chose {f.get('comm', 'a process')} ({f.get('pid', '?')})."
    ),
    "left_call": lambda f: f"Its main process left its cgroup for {f.get('to', 'another')}.",
    "process_left": lambda f: (
        f"{f.get('name', 'A process')} ({f.get('pid', '?')}) was moved to {f.get('to', 'another')} "
        f"by {f.get('mover', 'somebody')} ({f.get('mover_pid', '?')})."
    ),
    "more_left": lambda f: "More of its processes were moved out of it.",
    "reclaim": lambda f: (
        f"{_bytes(f, 'reclaimed_bytes')} were reclaimed in {_usec(f, 'took_usec')}."
    ),
    "slow": lambda f: "Its CPU weight was lowered.",
    "restore": lambda f: "Its CPU weight was put back.",
    "urgent": lambda f: f"It stalled on memory for {_usec(f, 'stalled_usec')}.",
    "rates": lambda f: (
        f"{f.get('faults_per_s', 0)} page faults and {f.get('refaults_per_s', 0)} refaults a second"
        f", {'above' if f.get('above') else 'not above'} what is told of."
    ),
    "call_refused": lambda f: f"A call was refused: {f.get('sentence', '')}",
}
"""Words for entries by their event; a `why` is put behind them."""

_WHOLE = frozenset({"hold", "unhold"})
"""Events whose `why` says all of it."""


# The end


def _ended_usec(report: pb.Report) -> int:
    return report.began_unix_usec + report.wall_usec


def _fact(fact: pb.Fact, ended_usec: int) -> pb.Step:
    # What was found out a moment after the end is about the end.
    what = fact.what[:1].upper() + fact.what[1:]
    return _step(min(fact.at_unix_usec, ended_usec), "fact", f"{what} ({fact.source}).")


def _end(report: pb.Report, last_usec: int) -> pb.Step:
    numbers: dict[str, float] = {
        "wall_usec": report.wall_usec,
        "cpu_usage_usec": report.cpu_usage_usec,
    }
    for name in ("memory_peak_bytes", "memory_throttled_usec", "cpu_throttled_usec", "oom_kills"):
        if report.HasField(name):
            numbers[name] = float(getattr(report, name))
    if report.frozen_usec:
        numbers["frozen_usec"] = report.frozen_usec
    ended = max(_ended_usec(report), last_usec)
    verdict = pb.Verdict.Name(report.verdict).removeprefix("VERDICT_").lower()
    took = [f"{show_usec(report.wall_usec)} of time", f"{show_usec(report.cpu_usage_usec)} of CPU"]
    if report.HasField("memory_peak_bytes"):
        took.append(f"at most {show_bytes(report.memory_peak_bytes)} of memory")
    sentence = f"{report.sentence} Verdict: {verdict}. It took {', '.join(took)}."
    return _step(ended, "ended", sentence, numbers)


def _advice(report: pb.Report) -> list[str]:
    """What was said at the end, each sentence once, but for the verdict's own."""
    found: list[str] = []
    for feedback in report.feedback:
        if feedback.sentence not in (*found, report.sentence):
            found.append(feedback.sentence)
    return found
