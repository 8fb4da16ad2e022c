"""Predictors of what a call will take, and scores for them: the benchmark without its I/O."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from agentcgroup_lab.trace import format as trace_format
from agentcgroup_lab.trace import plan
from agentcgroupd.policy.command_shape import shape_of
from agentcgroupd.policy.learning import Learned, Peaks
from agentcgroupd.policy.schema import Learning
from bench.report import quantile

MB = 1_000_000
LARGE_BYTES = 64 * MB
TELLING_BYTES = 16 * MB
"""A ratio of two smaller numbers is noise, and nobody waits for either."""
APART = 2.0
"""Factor between two calls from which it matters which is the larger."""
OURS = "same shape, most of 8"
BY_TOOL = "same tool, most of 8"


@dataclass(frozen=True, slots=True)
class Row:
    """A recorded call."""

    session: int
    shape: str
    began_s: float
    ended_s: float
    peak_bytes: int
    seen: bool
    """Whether the call held half its peak for two samples. Of the others the recording may have
    missed the peak: most seconds of a long call are often waiting, and one sample in a second is
    all there is."""
    rises: tuple[tuple[float, int], ...] = ()
    """Times at which it first held how much, ascending."""


def rises_of(began_s: float, steps: Sequence[plan.Step]) -> tuple[tuple[float, int], ...]:
    """(time, level) of every step that is above all before it."""
    rises: list[tuple[float, int]] = []
    at_s, highest = began_s, 0
    for step in steps:
        if step.memory_bytes > highest:
            highest = step.memory_bytes
            rises.append((at_s, highest))
        at_s += step.duration_ms / 1000
    return tuple(rises)


def held_s(steps: Sequence[plan.Step]) -> float:
    """Seconds for which a call held at least half its peak; 0 if it held nothing."""
    half = max(step.memory_bytes for step in steps) / 2
    return sum(step.duration_ms for step in steps if step.memory_bytes >= half > 0) / 1000


def rows_of(recording: trace_format.Trace, session: int) -> list[Row]:
    """The calls with a command."""
    commands = {(c.id, c.tool): c.command for c in recording.calls}
    rows: list[Row] = []
    for call in plan.make_plan(recording).calls:
        command = commands[call.id, call.tool]
        if command is None:
            continue
        rows.append(
            Row(
                session=session,
                shape=shape_of(call.tool, ["sh", "-c", command]),
                began_s=call.start_s,
                ended_s=call.end_s,
                peak_bytes=call.peak_bytes,
                seen=held_s(call.steps) >= 2 * recording.sample_period_s,
                rises=rises_of(call.start_s, call.steps),
            )
        )
    return rows


# Predictors: expected bytes when a call begins, or None.


class Predictor:
    """Something that is asked when a call begins, and told when it has ended."""

    def expect(self, row: Row) -> int | None:
        """Bytes, of a call that begins now; None: no idea."""
        raise NotImplementedError

    def ended(self, row: Row) -> None:
        """A call is over."""


class Zero(Predictor):
    """Says nothing."""

    def expect(self, row: Row) -> int | None:
        return 0


@dataclass
class PoolQuantile(Predictor):
    """Predicts for every call what this share of the pool's calls stayed below."""

    share: float = 0.95
    peaks: Peaks = field(default_factory=lambda: Peaks(least_bytes=0))

    def expect(self, row: Row) -> int | None:
        known = self.peaks.sorted_bytes
        return known[int(self.share * len(known))] if known else None

    def ended(self, row: Row) -> None:
        self.peaks.add(row.peak_bytes)


@dataclass
class InSession(Predictor):
    """The daemon's own: the most of the last runs of a shape in the session."""

    learning: Learning
    by_tool: bool = False
    learned: dict[int, Learned] = field(default_factory=dict)

    def _shape(self, row: Row) -> str:
        return row.shape.split(" ")[0] if self.by_tool else row.shape

    def expect(self, row: Row) -> int | None:
        learned = self.learned.get(row.session)
        found = learned.expect(self._shape(row), None) if learned else None
        # No run of the recordings was killed, so `runs_least` of them are enough.
        known = found is not None and found.runs >= self.learning.runs_least
        return found.expected_bytes if found is not None and known else None

    def ended(self, row: Row) -> None:
        learned = self.learned.setdefault(row.session, Learned(self.learning))
        learned.ended(self._shape(row), None, row.peak_bytes, False)


@dataclass
class OtherSessions(Predictor):
    """The most of the last runs of the shape in other sessions."""

    kept: int = 8
    runs: dict[str, deque[tuple[int, int]]] = field(default_factory=dict)

    def expect(self, row: Row) -> int | None:
        return max((b for s, b in self.runs.get(row.shape, ()) if s != row.session), default=None)

    def ended(self, row: Row) -> None:
        runs = self.runs.setdefault(row.shape, deque(maxlen=self.kept))
        runs.append((row.session, row.peak_bytes))


@dataclass
class FirstOf(Predictor):
    """The first that knows anything."""

    parts: tuple[Predictor, ...]

    def expect(self, row: Row) -> int | None:
        return next((n for p in self.parts if (n := p.expect(row)) is not None), None)

    def ended(self, row: Row) -> None:
        for part in self.parts:
            part.ended(row)


def predictors() -> dict[str, Predictor]:
    """Make all predictors that are compared."""
    one, eight, least = (Learning(runs_least=1, runs_kept=1), Learning(runs_least=1), Learning())
    return {
        "nothing": Zero(),
        "p95 of the pool": PoolQuantile(),
        "same shape, last": InSession(one),
        OURS: InSession(eight),
        "same shape, 2 runs at least": InSession(least),
        BY_TOOL: InSession(eight, by_tool=True),
        "shape, else tool": FirstOf((InSession(eight), InSession(eight, by_tool=True))),
        "same shape, other sessions": OtherSessions(),
    }


def in_order(rows: Sequence[Row]) -> Iterator[tuple[float, bool, Row]]:
    """(time, whether it ends, call); of what happens at once, ends come first."""
    events = [(r.began_s, 1, i) for i, r in enumerate(rows)]
    # A call without length begins before it ends.
    events += [(max(r.ended_s, r.began_s + 1e-6), 0, i) for i, r in enumerate(rows)]
    for at_s, begins, index in sorted(events):
        yield at_s, not begins, rows[index]


def predict(rows: Sequence[Row], predictor: Predictor) -> list[tuple[Row, int | None]]:
    """Every call with what was expected of it when it began."""
    told: list[tuple[Row, int | None]] = []
    for _, ended, row in in_order(rows):
        if ended:
            predictor.ended(row)
        else:
            told.append((row, predictor.expect(row)))
    return told


def concordance(told: Sequence[tuple[Row, int]], least_bytes: int) -> tuple[float, int]:
    """Count pairs of calls of different sessions, the larger above `least_bytes` and `APART` times
    the other: the share whose larger one was expected to be larger (equal: half), and how many."""
    right, pairs = 0.0, 0
    for row, expected in told:
        if row.peak_bytes < least_bytes:
            continue
        for other, other_expected in told:
            if other.session == row.session or row.peak_bytes < APART * other.peak_bytes:
                continue
            pairs += 1
            right += 1.0 if expected > other_expected else 0.5 * (expected == other_expected)
    return (right / pairs if pairs else 0.0), pairs


@dataclass(frozen=True, slots=True)
class Score:
    """Worth of a predictor."""

    known: float
    """Part of the calls it said something of; then weighted by bytes; then of the large ones."""
    known_bytes: float
    known_large: float
    errors: int
    error_p50: float
    """Factor off, up or down, over the known calls of which either number is telling."""
    error_p90: float
    exceeded: float
    """Part of these that took more than expected."""
    ordered: float
    """Concordance of the known calls."""
    pairs: int
    ordered_common: float
    """Share among the calls that `OURS` knows, so that predictors can be compared; an unknown call
    counts as 0."""


Told = Sequence[tuple[Row, int | None]]


def score(told: Told, common: Told) -> Score:
    """Score predictions. `common`: the same calls with what `OURS` said."""
    known = [(row, n) for row, n in told if n is not None]
    telling = [(row.peak_bytes, n) for row, n in known if max(row.peak_bytes, n) >= TELLING_BYTES]
    errors = [max(peak, MB) / max(n, MB) for peak, n in telling]
    errors = [max(error, 1 / error) for error in errors] or [0.0]
    total = sum(row.peak_bytes for row, _ in told)
    large = sum(row.peak_bytes > LARGE_BYTES for row, _ in told)
    ordered, pairs = concordance(known, LARGE_BYTES // 2)
    shared = [
        (row, n or 0) for (row, n), (_, ours) in zip(told, common, strict=True) if ours is not None
    ]
    return Score(
        known=len(known) / max(1, len(told)),
        known_bytes=sum(row.peak_bytes for row, _ in known) / max(1, total),
        known_large=sum(row.peak_bytes > LARGE_BYTES for row, _ in known) / max(1, large),
        errors=len(telling),
        error_p50=statistics.median(errors),
        error_p90=quantile(errors, 0.9),
        exceeded=sum(peak > n for peak, n in telling) / max(1, len(telling)),
        ordered=ordered,
        pairs=pairs,
        ordered_common=concordance(shared, LARGE_BYTES // 2)[0],
    )


def scores(rows: Sequence[Row]) -> dict[str, Score]:
    """Score all predictors, by name."""
    told = {name: predict(rows, predictor) for name, predictor in predictors().items()}
    return {name: score(own, told[OURS]) for name, own in told.items()}
