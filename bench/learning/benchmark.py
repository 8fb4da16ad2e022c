"""Benchmark `learning`: what the calls of recorded agents tell about the next ones.

All recordings of $TRACES are replayed on paper, side by side, from one common start; a predictor
knows only the calls that have ended by then. Three questions:
1. Is a call's shape known, and how well do the last runs of it tell what this one takes?
2. Of two calls of different agents, does the prediction tell the larger one?
3. When a call has grown past some level, does the room kept for it suffice as often as it should?

Only calls with a command count: the others ran inside the agent. What a call takes is its rise over
the level before it (replay/attribute.py).
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from agentcgroup_lab.trace import format as trace_format
from agentcgroupd.policy.learning import Peaks
from agentcgroupd.policy.schema import Learning
from agentcgroupd.policy.snapshot import Snapshot
from bench.learning.predictors import (
    BY_TOOL,
    LARGE_BYTES,
    MB,
    OURS,
    InSession,
    Row,
    Score,
    rows_of,
    scores,
)
from bench.report import BenchReport, Target, quantile, recordings

LEVELS_BYTES = tuple(n * MB for n in (16, 32, 64, 128))
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
RESAMPLES = 400
ORDERS = 25
ORDERS_OVER_S = 4 * 3600.0
"""The recordings begin at random within this time: what the pool has seen depends on it."""

Rule = Callable[[Row, int], int | None]
"""Call and what it holds: up to how much room is kept for it. None: cannot say."""


@dataclass
class Room:
    """Keeps the pool's peaks and each session's shapes, and answers by one of the rules."""

    peaks: Peaks = field(default_factory=Peaks)
    shapes: InSession = field(default_factory=lambda: InSession(Learning()))

    def ended(self, row: Row) -> None:
        """A call is over."""
        self.peaks.add(row.peak_bytes)
        self.shapes.ended(row)

    def likely(self, share: float) -> Rule:
        """Bytes of room that the engine would keep for the call."""

        def rule(row: Row, held: int) -> int | None:
            peaks = self.peaks.sorted_bytes
            return Snapshot(0, 1 << 62, 0, 0.0, (), peaks_bytes=peaks).likely_peak(held, share)

        return rule

    def by_shape(self, share: float, at_least_likely: bool) -> Rule:
        """The most of the last runs of its shape as long as it holds less, else `likely`; or the
        larger of the two."""

        def rule(row: Row, held: int) -> int | None:
            most, likely = self.shapes.expect(row), self.likely(share)(row, held)
            if most is None or most <= held:
                return likely
            return max(most, likely or 0) if at_least_likely else most

        return rule


def times(factor: float) -> Rule:
    """Room in multiples of what the call holds."""
    return lambda row, held: int(held * factor)


@dataclass(frozen=True, slots=True)
class Crossing:
    """A call has grown past a level: up to how much room was kept for it, and what it took."""

    session: int
    level_bytes: int
    peak_bytes: int
    kept_bytes: int | None
    """None: the rule could not say."""


def crossings(rows: Sequence[Row], room: Room, rule: Rule, level: int) -> list[Crossing]:
    """Every call that grew past the level. The rule is asked at the level itself: the daemon looks
    many times while a call grows, the recordings once a second."""
    events: list[tuple[float, int, int]] = []
    for index, row in enumerate(rows):
        passed = next((at_s for at_s, held in row.rises if held > level), None)
        if passed is not None:
            events.append((passed, 1, index))
        events.append((max(row.ended_s, row.began_s + 1e-6), 0, index))
    found: list[Crossing] = []
    for _, passes, index in sorted(events):
        row = rows[index]
        if passes:
            found.append(Crossing(row.session, level, row.peak_bytes, rule(row, level)))
        else:
            room.ended(row)
    return found


@dataclass(frozen=True, slots=True)
class Coverage:
    """Share of calls for which kept room sufficed."""

    rule: str
    level_bytes: int
    calls: int
    unsaid: int
    """Calls of which nothing could be said; the rest is about the others."""
    suffices: float
    low: float
    """95 of 100 resamples of whole sessions lie between these: calls of one are alike."""
    high: float
    room_mean_bytes: float
    """Kept beyond the level."""
    room_p50_bytes: float
    needed_mean_bytes: float


def coverage(name: str, found: Sequence[Crossing]) -> Coverage | None:
    """Sums up crossings of one level under one rule; None where there are none to say."""
    said = [(c, c.kept_bytes) for c in found if c.kept_bytes is not None]
    if not said:
        return None
    by_session: dict[int, list[bool]] = {}
    for crossing, kept in said:
        by_session.setdefault(crossing.session, []).append(crossing.peak_bytes <= kept)
    groups, chance = list(by_session.values()), random.Random(1)
    means = []
    for _ in range(RESAMPLES):
        drawn = list(itertools.chain.from_iterable(chance.choices(groups, k=len(groups))))
        means.append(sum(drawn) / len(drawn))
    level = said[0][0].level_bytes
    rooms = [kept - level for _, kept in said]
    return Coverage(
        rule=name,
        level_bytes=level,
        calls=len(found),
        unsaid=len(found) - len(said),
        suffices=sum(map(sum, groups)) / len(said),
        low=quantile(means, 0.025),
        high=quantile(means, 0.975),
        room_mean_bytes=statistics.fmean(rooms),
        room_p50_bytes=statistics.median(rooms),
        needed_mean_bytes=statistics.fmean(c.peak_bytes - level for c, _ in said),
    )


def rules() -> dict[str, Callable[[Room], Rule]]:
    """The rules that are compared."""
    made: dict[str, Callable[[Room], Rule]] = {}
    for share in SHARES:
        made[f"likely_peak {share:g}"] = lambda room, share=share: room.likely(share)  # type: ignore[misc]
    made["shape, else likely_peak 0.9"] = lambda room: room.by_shape(0.9, False)
    made["shape, or likely_peak 0.9"] = lambda room: room.by_shape(0.9, True)
    for factor in (2.0, 3.0, 4.0):
        made[f"{factor:g} times what it holds"] = lambda room, factor=factor: times(factor)  # type: ignore[misc]
    return made


def coverages(rows: Sequence[Row]) -> list[Coverage]:
    """Every rule at every level."""
    found: list[Coverage] = []
    for name, make in rules().items():
        for level in LEVELS_BYTES:
            room = Room()
            summed = coverage(name, crossings(rows, room, make(room), level))
            if summed is not None:
                found.append(summed)
    return found


def shifted(rows: Sequence[Row], offsets_s: Sequence[float]) -> list[Row]:
    """Shift the calls of each session by its delay."""
    moved: list[Row] = []
    for row in rows:
        by_s = offsets_s[row.session]
        rises = tuple((at_s + by_s, held) for at_s, held in row.rises)
        moved.append(
            replace(row, began_s=row.began_s + by_s, ended_s=row.ended_s + by_s, rises=rises)
        )
    return moved


@dataclass(frozen=True, slots=True)
class Orders:
    """Measure how often room by likely_peak sufficed, over random orders of the same sessions."""

    share: float
    level_bytes: int
    calls: int
    """Said of, in the median order."""
    low: float
    p50: float
    high: float


def orders(rows: Sequence[Row], share: float) -> list[Orders]:
    """Every level."""
    chance = random.Random(1)
    sessions = max(row.session for row in rows) + 1
    starts = [[chance.uniform(0, ORDERS_OVER_S) for _ in range(sessions)] for _ in range(ORDERS)]
    moved = [shifted(rows, offsets_s) for offsets_s in starts]
    found: list[Orders] = []
    for level in LEVELS_BYTES:
        rates, counts = [], []
        for own in moved:
            room = Room()
            kept = crossings(own, room, room.likely(share), level)
            said = [c.peak_bytes <= c.kept_bytes for c in kept if c.kept_bytes is not None]
            if said:
                rates.append(sum(said) / len(said))
                counts.append(len(said))
        if rates:
            calls = int(statistics.median(counts))
            middle = statistics.median(rates)
            found.append(Orders(share, level, calls, min(rates), middle, max(rates)))
    return found


def show_scores(title: str, found: dict[str, Score]) -> None:
    """Print a table of scores."""
    print(
        f"\n{title}\n  {'':<28}  known  bytes  large   times off p50, p90 (n)"
        "   took more  ordered (pairs)    of common"
    )
    for name, s in found.items():
        errors, pairs = f"({s.errors})", f"({s.pairs})"
        print(
            f"  {name:<28} {s.known:6.0%} {s.known_bytes:6.0%} {s.known_large:6.0%}"
            f" {s.error_p50:10.2f} {s.error_p90:6.1f} {errors:<7} {s.exceeded:8.0%}"
            f" {s.ordered:9.0%} {pairs:<9} {s.ordered_common:6.0%}"
        )


def show_coverages(found: Sequence[Coverage]) -> None:
    """Print a line for each rule and level."""
    print("\nroom kept for a call that grew past a level: how often it sufficed, and what it cost")
    for c in found:
        print(
            f"  {c.rule:<28} past {c.level_bytes / MB:4.0f} MB: {c.suffices:5.0%}"
            f" ({c.low:.0%} to {c.high:.0%}) of {c.calls - c.unsaid:3}, {c.unsaid:2} unsaid;"
            f" kept {c.room_mean_bytes / MB:5.0f} MB (p50 {c.room_p50_bytes / MB:4.0f}),"
            f" needed {c.needed_mean_bytes / MB:4.0f}"
        )


def show_orders(found: Sequence[Orders]) -> None:
    """Print a line for each level."""
    print(f"\nthe same in {ORDERS} random orders of the sessions: lowest, median, highest")
    for o in found:
        print(
            f"  likely_peak {o.share:<16g} past {o.level_bytes / MB:4.0f} MB: {o.low:5.0%}"
            f" {o.p50:5.0%} {o.high:5.0%} of {o.calls}"
        )


def targets_of(every: dict[str, Score], found: Sequence[Orders]) -> list[Target]:
    """Judge what the daemon builds on: that a share is what it says, and a shape more than the
    tool."""
    targets = [_sufficiency(orders) for orders in found if orders.share == 0.9]
    own, tool = every[OURS].ordered_common, every[BY_TOOL].ordered_common
    limit = f"> by tool, {tool:.3f}"
    targets.append(Target("larger of two calls told by shape", own, "", limit, own > tool))
    return targets


def _sufficiency(orders: Orders) -> Target:
    name = f"likely_peak 0.9 suffices past {orders.level_bytes / MB:.0f} MB, median order"
    return Target(name, orders.p50, "", "0.85 to 0.95", 0.85 <= orders.p50 <= 0.95)


def main() -> int:
    """Run the benchmark, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=recordings(), help="directory of recordings")
    folder = parser.parse_args().traces
    paths = sorted(folder.glob("*.jsonl*"))
    if not paths:
        raise SystemExit(f"{folder} holds no recordings (*.jsonl, *.jsonl.gz)")
    rows = [row for i, path in enumerate(paths) for row in rows_of(trace_format.read(path), i)]
    seen_rows = [row for row in rows if row.seen]
    every, seen = scores(rows), scores(seen_rows)
    found = coverages(rows)
    ordered = [o for share in (0.8, 0.9) for o in orders(rows, share)]
    print(
        f"{len(paths)} recordings, {len(rows)} calls with a command, {len(seen_rows)} of them"
        f" with a peak that was surely seen, {sum(r.peak_bytes > LARGE_BYTES for r in rows)}"
        f" above {LARGE_BYTES // MB} MB"
    )
    show_scores("All of these calls", every)
    show_scores("Only calls whose peak was surely seen, for history and truth", seen)
    show_coverages(found)
    show_orders(ordered)
    details = {
        "recordings": len(paths),
        "calls_seen": len(seen_rows),
        "scores": {name: asdict(s) for name, s in every.items()},
        "scores_seen": {name: asdict(s) for name, s in seen.items()},
        "coverage": [asdict(c) for c in found],
        "orders": [asdict(o) for o in ordered],
    }
    report = BenchReport("learning", "host", len(rows), targets_of(every, ordered), details)
    report.show()
    print(f"written: {report.write()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
