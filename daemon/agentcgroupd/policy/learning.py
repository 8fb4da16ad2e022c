"""Learning from ended calls: what the last runs of a command took in its session, and how far the
pool's calls went. Used for expectations and advice only, never for limits. Pure: no I/O, no clock.

History tells nothing from one run of a task to the next (arXiv 2602.09345). Within one session the
same command, run again, takes much the same; the benchmark `learning` measures what that is worth.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.policy.command_shape import shape_of
from agentcgroupd.policy.schema import Learning
from agentcgroupd.units import show_bytes

SHAPES_KEPT = 64
"""Shapes kept of one session: five times what the recorded sessions have at the median."""
PEAKS_KEPT = 1024
"""Peaks kept of the pool."""
PEAKS_LEAST_BYTES = 8 << 20
"""Least peak that is kept. The many smaller ones would push out the few large ones, which alone
tell how far a call may go that has grown."""
TOLD_LEAST_BYTES = 64 << 20
"""Amount of memory that other calls may have to wait for. Where neither the intent nor the peak is
as large, an intent is not called wrong."""
HABIT_ASKS = 16
"""Number of the last intents that show how a session asks. At least half as many are needed."""
_WHOLE = frozenset({pb.VERDICT_OK, pb.VERDICT_FAILED})
"""Verdicts on calls that were not cut short."""


@dataclass(frozen=True, slots=True)
class Run:
    """An ended call."""

    peak_bytes: int
    cut_short: bool
    """Whether the call was killed or refused memory, so that its peak is only a lower bound."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """Memory that a call is expected to take."""

    expected_bytes: int
    """0: not known."""
    sentence: str
    """Why the expectation is not what the intent says; empty where it is."""
    runs: int
    """Number of runs of the same shape that are kept of this session."""


class Learned:
    """The last runs of one session's commands, by their shapes. Not safe for threads."""

    def __init__(self, learning: Learning | None = None, shapes_kept: int = SHAPES_KEPT) -> None:
        self.learning = learning or Learning()
        self._shapes_kept = shapes_kept
        self._runs: OrderedDict[str, deque[Run]] = OrderedDict()
        self._asks: deque[tuple[int, int]] = deque(maxlen=HABIT_ASKS)
        """Bytes asked for and bytes taken, of runs that were not cut short."""

    def __len__(self) -> int:
        """Number of shapes that are known."""
        return len(self._runs)

    def ended(self, shape: str, asked_bytes: int | None, peak_bytes: int, cut_short: bool) -> None:
        """Add a call that has ended.

        `asked_bytes`: what its intent said; None: nothing. `cut_short`: it was killed, for whatever
        reason, or failed because its growth was denied.
        """
        peak_bytes = max(0, peak_bytes)
        runs = self._runs.setdefault(shape, deque(maxlen=self.learning.runs_kept))
        runs.append(Run(peak_bytes, cut_short))
        self._runs.move_to_end(shape)
        if len(self._runs) > self._shapes_kept:
            self._runs.popitem(last=False)
        if asked_bytes and not cut_short:
            self._asks.append((asked_bytes, peak_bytes))

    def expect(self, shape: str, asked_bytes: int | None) -> Expectation:
        """Return what a call of this shape will take, and remember nothing of the question.

        The intent stands unless at least `runs_least` runs that were not cut short show that it is
        wrong. A run that was cut short counts as a lower bound of what such a call takes.
        """
        asked = max(0, asked_bytes or 0)
        if not self.learning.enabled:
            return Expectation(asked, "", 0)
        runs = self._runs.get(shape, ())
        whole = [run for run in runs if not run.cut_short]
        if len(whole) < self.learning.runs_least:
            return Expectation(asked, "", len(runs))
        most = max(run.peak_bytes for run in runs)
        sentence = self._wrong(shape, asked, runs, most) if asked else ""
        return Expectation(most if sentence or not asked else asked, sentence, len(runs))

    def whole_peak(self, shape: str) -> int:
        """Return the most that a run of this shape took that was not cut short; 0: none is kept."""
        runs = self._runs.get(shape, ())
        return max((run.peak_bytes for run in runs if not run.cut_short), default=0)

    def advice(self, shape: str, asked_bytes: int | None) -> str:
        """Return a sentence for the agent where its intent is wrong, by what calls of this shape
        took or, for a new shape, by how this session has asked so far; else an empty one."""
        expectation = self.expect(shape, asked_bytes)
        if expectation.sentence or expectation.runs or not asked_bytes:
            return expectation.sentence
        return self._habit() if self.learning.enabled else ""

    def _wrong(self, shape: str, asked: int, runs: Sequence[Run], most: int) -> str:
        """Say why an intent is wrong; nothing where it is near enough. `most`: the largest peak."""
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
        """Say that three of four of the session's intents asked for too much, where that is so."""
        ratio = self.learning.tell_ratio
        large = [(asked, peak) for asked, peak in self._asks if asked >= TOLD_LEAST_BYTES]
        over = sum(peak * ratio <= asked for asked, peak in large)
        if len(self._asks) < HABIT_ASKS // 2 or over * 4 < len(self._asks) * 3:
            return ""
        return (
            f"{over} of your last {len(self._asks)} calls that said how much memory they expect "
            f"took less than one part in {ratio:g} of it. Ask for less, or leave it out."
        )


class Peaks:
    """Peaks of the newest calls of the pool, as `Snapshot.peaks_bytes` wants them."""

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
        """Add the peak of a call, however short it was; the oldest peak goes. A killed call's peak
        counts, too: the call would have gone further, but how far is not known."""
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
        """All peaks, ascending; the same object until the next peak is added."""
        if self._shown is None:
            self._shown = tuple(self._by_size)
        return self._shown


def was_cut_short(report: pb.Report) -> bool:
    """Tell whether a call's peak is only a lower bound of what it would have taken. A report does
    not say that a call failed because its growth was denied; `learn` has to be told."""
    return report.verdict not in _WHOLE or report.oom_kills > 0


def learn(learned: Learned, peaks: Peaks, report: pb.Report, denied: bool = False) -> None:
    """Add the report of an ended call to what is known of its session and of the pool.

    The report of a call that no process entered, or whose peak this kernel does not tell, adds
    nothing. `denied`: growth was denied to the call, so that a failure may have come from that.
    """
    if report.verdict == pb.VERDICT_ABANDONED or not report.HasField("memory_peak_bytes"):
        return
    peaks.add(report.memory_peak_bytes)
    failed_of_denial = denied and report.verdict == pb.VERDICT_FAILED
    learned.ended(
        shape_of(report.name, report.argv),
        report.grant.memory_expected_bytes or None,
        report.memory_peak_bytes,
        was_cut_short(report) or failed_of_denial,
    )
