"""The last minutes of the pool: memory by session, calls as bars in lanes, decisions as marks.

All that is remembered has an upper bound, however many sessions and calls there are.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentcgroup.cli.live import Look, is_paused, is_waiting, memory_of
from agentcgroup.types import CallInfo, Feedback, PastSession, Report, Step

from .shown import command, text

SESSIONS_A_SAMPLE = 24
"""Sessions of which a sample keeps what they hold, the largest; the others are summed up."""
SESSIONS_DRAWN = 8
POINTS_MOST = 240
CALLS_KEPT = 4000
MARKS_KEPT = 4000
CALLS_DRAWN = 400
MARKS_DRAWN = 500
LANES_MOST, LANES_A_SESSION = 24, 6
ENDED_SESSIONS = 50
OTHERS = ""
"""Stands for all other sessions: no name that a session can have."""
GAP_USEC = 60_000_000
"""Two samples that are further apart have something between them that nobody saw."""
UNIX_USEC_MOST = 1 << 53
"""Above it a browser cannot tell one microsecond from the next."""

_KINDS = {
    "pause": ("freeze", "frozen", "hold"),
    "go": ("thaw", "thawed", "unhold", "growth_allowed", "cpu_restored"),
    "slow": ("throttle", "memory_throttled", "cpu_throttled", "cpu_lowered", "slow"),
    "deny": ("deny", "denied", "growth_denied", "gpu_memory_denied", "pids_limit"),
    "end": ("kill", "killed", "oom", "oom_victim", "timeout", "stopped", "gpu_fault"),
    "note": (
        "urgent",
        "left_call",
        "process_left",
        "leftovers",
        "gpu_lost",
        "gpu_closed",
        "fewer_cpus",
    ),
}
KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words}
"""Kinds of marks, by the word of the audit log or of the feedback. What has none is not drawn."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory at a moment, in bytes: of the pool, and of the sessions that held most."""

    at_unix_usec: int
    pool: int
    sessions: dict[str, int]

    @classmethod
    def of(cls, look: Look, at_unix_usec: int) -> Sample:
        """Take what is needed of a look."""
        largest = heapq.nlargest(SESSIONS_A_SAMPLE, look.sessions, key=memory_of)
        held = {each.id: memory_of(each) for each in largest}
        others = sum(map(memory_of, look.sessions)) - sum(held.values())
        if others:
            held[OTHERS] = others
        return cls(at_unix_usec, look.pool.memory_current_bytes or 0, held)


@dataclass(frozen=True, slots=True)
class Mark:
    """A thing that was decided about a call, or that happened to it."""

    at_unix_usec: int
    call_id: str
    session_id: str
    kind: str
    sentence: str

    @classmethod
    def of(cls, what: str, each: Feedback | Step, call_id: str, session_id: str) -> Mark | None:
        """Make a mark of feedback or of a step of a story; None for what is not drawn."""
        kind = KIND_OF.get(what)
        if kind is None or not 0 < each.at_unix_usec < UNIX_USEC_MOST:
            return None
        return cls(each.at_unix_usec, call_id, session_id, kind, text(each.sentence))


@dataclass(slots=True)
class Bar:
    """A call: when it asked, began and ended (None: it is open), and what it was."""

    call_id: str
    session_id: str
    name: str
    command: str
    asked_unix_usec: int
    began_unix_usec: int
    ended_unix_usec: int | None
    state: str
    sentence: str
    memory_bytes: int | None
    is_inner: bool

    @classmethod
    def of_report(cls, report: Report) -> Bar:
        """Make the bar of an ended call."""
        began = min(report.began_unix_usec, UNIX_USEC_MOST)
        return cls(
            report.call_id,
            report.session_id,
            text(report.name, 60),
            command(report.argv, report.name),
            max(0, began - report.waited_usec),
            began,
            min(began + report.wall_usec, UNIX_USEC_MOST),
            report.verdict.value,
            text(report.sentence),
            report.memory_peak_bytes,
            bool(report.parent_call_id),
        )

    @classmethod
    def of_call(cls, call: CallInfo, at_unix_usec: int) -> Bar:
        """Make the bar of a call that is open, or waits."""
        began = min(call.began_unix_usec, UNIX_USEC_MOST) or at_unix_usec
        asked = began - call.waited_usec
        if is_waiting(call):
            began = at_unix_usec
            asked = at_unix_usec - (call.place.waited_usec if call.place else 0)
        return cls(
            call.id,
            call.session_id,
            text(call.name, 60),
            command(call.argv, call.name),
            asked,
            began,
            None,
            call.state.value,
            text(call.paused_why) if is_paused(call) else "",
            memory_of(call),
            bool(call.parent_call_id),
        )


@dataclass(slots=True)
class Memory:
    """What was seen, up to a bound. Used by one thread at a time."""

    samples_kept: int
    samples: deque[Sample] = field(init=False)
    marks: dict[tuple[int, str, str], Mark] = field(default_factory=dict)
    ended: dict[str, Bar] = field(default_factory=dict)
    past: list[PastSession] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples = deque(maxlen=self.samples_kept)

    def add_report(self, report: Report) -> None:
        """Remember an ended call with its feedback; one that is known already is no other."""
        self.ended[report.call_id] = Bar.of_report(report)
        _forget(self.ended, CALLS_KEPT)
        self.add_marks(
            Mark.of(each.code.value, each, report.call_id, report.session_id)
            for each in report.feedback
        )

    def add_marks(self, marks: Iterable[Mark | None]) -> None:
        """Remember marks. One thing may be told of twice, in other words and at almost the same
        moment: as it happens, and by the report or the story."""
        for mark in marks:
            if mark is not None:
                about = (mark.at_unix_usec // 100_000, mark.call_id, mark.kind)
                self.marks.setdefault(about, mark)
        _forget(self.marks, MARKS_KEPT)


def _forget(kept: dict[Any, Any], most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]


def document(memory: Memory, look: Look | None, since: int, until: int) -> dict[str, Any]:
    """Return all that is drawn of the time from `since` to `until`, in microseconds since 1970.

    memory.guessed: points before the first sample, of what calls held at most. A lane is a row of
    bars, of one session.
    """
    lanes, bars, left_out = _lanes(_bars(memory, look, since, until))
    shown: dict[str, list[Mark]] = {bar.call_id: [] for bar, _ in bars}
    marks = sorted(
        (m for m in memory.marks.values() if since <= m.at_unix_usec <= until),
        key=lambda m: m.at_unix_usec,
    )
    for mark in marks:
        if mark.call_id in shown:
            shown[mark.call_id].append(mark)
    return {
        "from_unix_usec": since,
        "to_unix_usec": until,
        "gap_usec": GAP_USEC,
        "memory": _memory(memory, look, since, until),
        "lanes": [text(name) for name in lanes],
        "calls": [_bar(bar, lane, shown[bar.call_id], until) for bar, lane in bars],
        "calls_left_out": left_out,
        "marks": [_mark(mark, mark.call_id in shown) for mark in marks[-MARKS_DRAWN:]],
        "marks_left_out": max(0, len(marks) - MARKS_DRAWN),
        "ended_sessions": list(_ended_sessions(memory.past)),
    }


# Memory


def _memory(memory: Memory, look: Look | None, since: int, until: int) -> dict[str, Any]:
    samples = _fewer([s for s in memory.samples if since <= s.at_unix_usec <= until], since, until)
    first = samples[0].at_unix_usec if samples else until
    guessed = _guessed(memory.ended.values(), since, first)
    most: dict[str, int] = {}
    for sample in (*guessed, *samples):
        for name, held in sample.sessions.items():
            most[name] = max(held, most.get(name, 0))
    most.pop(OTHERS, None)
    names = sorted(heapq.nlargest(SESSIONS_DRAWN, most, key=lambda name: (most[name], name)))
    return {
        "max_bytes": look.pool.memory_max_bytes if look is not None else None,
        "sessions": [text(name) for name in names],
        "points": [_point(sample, names) for sample in samples],
        "guessed": [_point(sample, names) for sample in guessed],
    }


def _point(sample: Sample, names: Sequence[str]) -> list[Any]:
    """Give time, the pool's bytes, those of the named sessions, and of all others."""
    held = [sample.sessions.get(name, 0) for name in names]
    others = sum(sample.sessions.values()) - sum(held)
    return [sample.at_unix_usec, sample.pool, [*held, others]]


def _fewer(samples: list[Sample], since: int, until: int) -> list[Sample]:
    """Leave out samples, but none that is the highest of its part of the time."""
    if len(samples) <= POINTS_MOST:
        return samples
    part = max(1, (until - since) // POINTS_MOST)
    highest: dict[int, Sample] = {}
    for sample in samples:
        number = (sample.at_unix_usec - since) // part
        if number not in highest or sample.pool > highest[number].pool:
            highest[number] = sample
    return list(highest.values())


def _guessed(bars: Iterable[Bar], since: int, until: int) -> list[Sample]:
    """Reckon what calls held at most before anybody looked, each with its peak from its beginning
    to its end; what agents held beside their calls is not known."""
    known = [
        bar
        for bar in bars
        if bar.memory_bytes and not bar.is_inner and since <= (bar.ended_unix_usec or 0)
    ]
    step = max(1_000_000, (until - since) // (POINTS_MOST // 2))
    if not known or until - since < 2 * step:
        return []
    first = max(since, min(bar.began_unix_usec for bar in known))
    found = []
    for at in range(first, until, step):
        held: dict[str, int] = {}
        for bar in known:
            # A call that began and ended between two points counts at the one before.
            if bar.began_unix_usec < at + step and (bar.ended_unix_usec or 0) >= at:
                held[bar.session_id] = held.get(bar.session_id, 0) + (bar.memory_bytes or 0)
        found.append(Sample(at, sum(held.values()), held))
    return found


# Calls


def _bars(memory: Memory, look: Look | None, since: int, until: int) -> list[Bar]:
    """Give the bars of a time, those that matter most first: what does not run, what runs, and
    then what ended last."""
    calls = sorted(look.calls, key=_matters) if look is not None else []
    opened = [Bar.of_call(call, until) for call in calls if call.id not in memory.ended]
    ended = [bar for bar in memory.ended.values() if since <= (bar.ended_unix_usec or 0)]
    ended.sort(key=lambda bar: -(bar.ended_unix_usec or 0))
    return [bar for bar in (*opened, *ended) if bar.asked_unix_usec <= until]


def _matters(call: CallInfo) -> tuple[bool, int]:
    return not (is_paused(call) or is_waiting(call)), -memory_of(call)


def _lanes(bars: list[Bar]) -> tuple[list[str], list[tuple[Bar, int]], int]:
    """Give each bar a lane of its session in which nothing lies over it, as far as there are some.
    Returns the session of each lane, bars with their lane, and how many have none."""
    lanes: list[str] = []
    taken: list[list[Bar]] = []
    own: dict[str, list[int]] = {}
    placed: list[tuple[Bar, int]] = []
    for bar in bars:
        mine = own.setdefault(bar.session_id, [])
        free = next((n for n in mine if not any(_overlap(bar, b) for b in taken[n])), None)
        if free is None and len(lanes) < LANES_MOST and len(mine) < LANES_A_SESSION:
            free = len(lanes)
            lanes.append(bar.session_id)
            taken.append([])
            mine.append(free)
        if free is not None:
            taken[free].append(bar)
            placed.append((bar, free))
            if len(placed) == CALLS_DRAWN:
                break
    # Lanes of one session stand together, in the order in which sessions came.
    order = [number for numbers in own.values() for number in numbers]
    where = {number: place for place, number in enumerate(order)}
    sessions = [lanes[number] for number in order]
    return sessions, [(bar, where[lane]) for bar, lane in placed], len(bars) - len(placed)


def _overlap(a: Bar, b: Bar) -> bool:
    return a.asked_unix_usec < _end(b) and b.asked_unix_usec < _end(a)


def _end(bar: Bar) -> int:
    return UNIX_USEC_MOST if bar.ended_unix_usec is None else bar.ended_unix_usec


def _bar(bar: Bar, lane: int, marks: Sequence[Mark], until: int) -> dict[str, Any]:
    return {
        "call_id": text(bar.call_id),
        "session_id": text(bar.session_id),
        "name": bar.name,
        "command": bar.command,
        "asked_unix_usec": bar.asked_unix_usec,
        "began_unix_usec": bar.began_unix_usec,
        "ended_unix_usec": bar.ended_unix_usec,
        "state": bar.state,
        "sentence": bar.sentence,
        "memory_bytes": bar.memory_bytes,
        "lane": lane,
        "pauses": list(_pauses(bar, marks, until)),
    }


def _pauses(bar: Bar, marks: Sequence[Mark], until: int) -> Iterator[list[Any]]:
    """Give the beginning, the end and the sentence of each pause of a call that is known of."""
    begun: Mark | None = None
    for mark in marks:
        if mark.kind == "pause":
            begun = begun or mark
        elif mark.kind == "go" and begun is not None:
            yield [begun.at_unix_usec, mark.at_unix_usec, begun.sentence]
            begun = None
    if begun is not None:
        yield [begun.at_unix_usec, bar.ended_unix_usec or until, begun.sentence]


def _mark(mark: Mark, has_bar: bool) -> dict[str, Any]:
    return {
        "at_unix_usec": mark.at_unix_usec,
        "call_id": text(mark.call_id),
        "session_id": text(mark.session_id),
        "kind": mark.kind,
        "sentence": mark.sentence,
        "has_bar": has_bar,
    }


def _ended_sessions(past: Iterable[PastSession]) -> Iterator[dict[str, Any]]:
    for each in past:
        session, sums = each.session, each.sums
        if session is not None and each.closed_unix_usec:
            yield {
                "id": text(session.id),
                "opened_unix_usec": session.opened_unix_usec,
                "closed_unix_usec": each.closed_unix_usec,
                "closed_why": text(each.closed_why),
                "calls": sums.calls if sums else 0,
                "calls_not_ok": sums.calls_not_ok if sums else 0,
                "cpu_usage_usec": sums.cpu_usage_usec if sums else 0,
                "memory_peak_bytes": sums.memory_peak_bytes if sums else None,
            }
