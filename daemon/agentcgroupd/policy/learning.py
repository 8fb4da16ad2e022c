"""What the last calls took, remembered in the small: per session and shape of command, and how far
calls of the pool went. For ordering and advice only, never for limits. Pure: no I/O, no clock.

History tells nothing from one run of a task to the next (arXiv 2602.09345). Within one session the
same command, run again, takes much the same; what that is worth is measured by the benchmark
`learning`.
"""

from __future__ import annotations

import bisect
import statistics
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.policy.command_shape import shape_of
from agentcgroupd.policy.schema import Learning
from agentcgroupd.units import show_bytes

SHAPES_KEPT = 64
"""Of one session: five times what the recorded ones have at the median. Full, they take 0.12 MB."""
PEAKS_KEPT = 1024
PEAKS_LEAST_BYTES = 8 << 20
"""Room is kept only for calls that grow beyond this. The many smaller ones would push the few large
ones, which alone tell how far a call that got so far may go, out of what is kept."""
TOLD_LEAST_BYTES = 64 << 20
"""Where neither what was asked nor what was taken is more, nobody waits for it."""
HABIT_ASKS = 16
"""So many last intents show how a session asks; half as many must be there."""
_WHOLE = frozenset({pb.VERDICT_OK, pb.VERDICT_FAILED})


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """One ended call."""

    peak_bytes: int
    wall_usec: int
    cut_short: bool
    """Killed, or refused what it asked for: it would have taken at least this much."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a call will take."""

    expected_bytes: int
    """0: not known."""
    sentence: str
    """Why it is not what was asked; empty where it is."""
    runs: int
    """Of the same shape in this session, as far as they are kept."""
    order_bytes: int = 0
    """Only to tell larger calls from smaller ones: the most of the last runs of the shape, else of
    its tool, in this session; else what was asked. 0: not known."""
    wall_usec: int | None = None
    """How long the whole ones took, at the median."""


def _tool(shape: str) -> str:
    return shape.partition(" ")[0]


class Learned:
    """The last runs of the commands of one session. Not made for threads."""

    def __init__(self, learning: Learning | None = None, shapes_kept: int = SHAPES_KEPT) -> None:
        self.learning = learning or Learning()
        self._shapes_kept = shapes_kept
        self._runs: OrderedDict[str, deque[Run]] = OrderedDict()
        self._tools: OrderedDict[str, deque[int]] = OrderedDict()
        """Peaks by the first word of the shape, which orders calls nearly as well."""
        self._asks: deque[tuple[int, int]] = deque(maxlen=HABIT_ASKS)
        """Asked and taken, of whole runs."""

    def __len__(self) -> int:
        """So many shapes are known."""
        return len(self._runs)

    def ended(
        self, shape: str, asked_bytes: int | None, peak_bytes: int, wall_usec: int, killed: bool
    ) -> None:
        """A call of this shape is over. `killed`: by whom and for whatever reason, and also when it
        failed because its growth was denied."""
        peak_bytes = max(0, peak_bytes)
        self._of(self._runs, shape).append(Run(peak_bytes, max(0, wall_usec), killed))
        self._of(self._tools, _tool(shape)).append(peak_bytes)
        if asked_bytes and not killed:
            self._asks.append((asked_bytes, peak_bytes))

    def _of(self, known: OrderedDict[str, deque[T]], key: str) -> deque[T]:
        """What is kept under a key, which is now the newest; the oldest key goes."""
        kept = known.get(key)
        if kept is None:
            kept = known[key] = deque(maxlen=self.learning.runs_kept)
            if len(known) > self._shapes_kept:
                known.popitem(last=False)
        known.move_to_end(key)
        return kept

    def expect(self, shape: str, asked_bytes: int | None) -> Expectation:
        """What a call of this shape will take. What was asked stands unless the runs, at least
        `runs_least` whole ones, show that it is wrong. One that was cut short says nothing about
        the most, but that it is no less. Asking changes nothing of what is remembered."""
        asked = max(0, asked_bytes or 0)
        if not self.learning.enabled:
            return Expectation(asked, "", 0, asked)
        runs = self._runs.get(shape, ())
        peaks: Iterable[int] = [r.peak_bytes for r in runs] or self._tools.get(_tool(shape)) or ()
        likely = max(peaks, default=asked)
        whole = [run for run in runs if not run.cut_short]
        wall = int(statistics.median(run.wall_usec for run in whole)) if whole else None
        expected, sentence = asked, ""
        if len(whole) >= self.learning.runs_least:
            sentence = self._wrong(shape, asked, runs, likely) if asked else ""
            expected = likely if sentence or not asked else asked
        return Expectation(expected, sentence, len(runs), likely, wall)

    def advice(self, shape: str, asked_bytes: int | None) -> str:
        """One sentence for the agent when what it asks for is wrong, by what calls of this shape
        took or, for a new one, by how this session has asked so far; else nothing."""
        expectation = self.expect(shape, asked_bytes)
        if expectation.sentence or expectation.runs or not asked_bytes:
            return expectation.sentence
        return self._habit() if self.learning.enabled else ""

    def _wrong(self, shape: str, asked: int, runs: Sequence[Run], most: int) -> str:
        ratio, told = self.learning.tell_ratio, f"You asked for {show_bytes(asked)}; `{shape}`"
        if max(asked, most) < TOLD_LEAST_BYTES:
            return ""
        if most * ratio <= asked:
            return (
                f"{told} took {show_bytes(most)} at most in {len(runs)} of {len(runs)} runs. Ask "
                "for less, and calls will wait less for each other."
            )
        if most >= asked * ratio:
            over = sum(run.peak_bytes > asked for run in runs)
            return (
                f"{told} took more in {over} of {len(runs)} runs, up to {show_bytes(most)}. Ask "
                "for what it takes, and it will be paused less."
            )
        return ""

    def _habit(self) -> str:
        ratio = self.learning.tell_ratio
        over = sum(
            peak * ratio <= asked for asked, peak in self._asks if asked >= TOLD_LEAST_BYTES
        )  # fmt: skip
        if len(self._asks) < HABIT_ASKS // 2 or over * 4 < len(self._asks) * 3:
            return ""
        return (
            f"{over} of your last {len(self._asks)} calls that said how much memory they expect "
            f"took less than one part in {ratio:g} of it. Ask for less, or leave it out."
        )


class Peaks:
    """What the newest calls of the pool took at most, as `Snapshot.peaks_bytes` wants it."""

    def __init__(self, kept: int = PEAKS_KEPT, least_bytes: int = PEAKS_LEAST_BYTES) -> None:
        if kept < 1:
            raise ValueError(f"kept is {kept}; allowed: at least 1")
        self._kept, self._least_bytes = kept, least_bytes
        self._by_age: deque[int] = deque()
        self._by_size: list[int] = []
        self._shown: tuple[int, ...] | None = ()

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, peak_bytes: int) -> None:
        """One more, however short it was; the oldest goes. A killed call's peak counts, too: that
        it would have gone further is known, how far is not."""
        if peak_bytes < self._least_bytes:
            return
        if len(self._by_age) == self._kept:
            oldest = self._by_age.popleft()
            del self._by_size[bisect.bisect_left(self._by_size, oldest)]
        self._by_age.append(peak_bytes)
        bisect.insort(self._by_size, peak_bytes)
        self._shown = None

    @property
    def sorted_bytes(self) -> tuple[int, ...]:
        """All of them, ascending; the same object until the next is added."""
        if self._shown is None:
            self._shown = tuple(self._by_size)
        return self._shown


def was_cut_short(report: pb.Report) -> bool:
    """Whether a call's peak is only a lower bound of what it would have taken. That a call failed
    because its growth was denied is not in its report: who knows it should say so."""
    return report.verdict not in _WHOLE or report.oom_kills > 0


def learn(learned: Learned, peaks: Peaks, report: pb.Report, denied: bool = False) -> None:
    """Add one report. One of a call that nothing entered, or whose peak this kernel does not tell,
    adds nothing. `denied`: its growth was denied, so that one that failed may have failed of it."""
    if report.verdict == pb.VERDICT_ABANDONED or not report.HasField("memory_peak_bytes"):
        return
    peaks.add(report.memory_peak_bytes)
    learned.ended(
        shape_of(report.name, report.argv), report.grant.memory_expected_bytes or None,
        report.memory_peak_bytes, report.wall_usec,
        was_cut_short(report) or (denied and report.verdict == pb.VERDICT_FAILED),
    )  # fmt: skip


def from_reports(
    reports: Iterable[pb.Report], learning: Learning | None = None
) -> tuple[dict[str, Learned], Peaks]:
    """What a restarted daemon can know again from kept reports, oldest first: by session id, and of
    the pool."""
    by_session: dict[str, Learned] = {}
    peaks = Peaks()
    for report in reports:
        learned = by_session.setdefault(report.session_id, Learned(learning))
        learn(learned, peaks, report)
    return by_session, peaks
