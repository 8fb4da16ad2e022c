"""Tells who held the memory that a recording shows: the agent's own runtime or one of its calls.

A recording has one number for the whole session. The rules, for each sample:

- No call open: all of it is the agent's, with one exception (see "seen late").
- Calls open: the agent holds what it held before, or less where the samples fall below that (the
  running lower envelope); the rest is the calls'. A rise goes to the call that began last, a fall
  is taken from it first; calls that were started in the background come after all others in both.
- What an ended call leaves behind belongs to the calls still open, and to the agent as soon as none
  is.
- Seen late: a call shorter than the sample period has often ended when its burst is sampled. What
  the first sample after its end shows beyond both what the agent held before and what the next
  sample shows is therefore the call's, placed where the call ran. Of several such calls the longest
  gets it.

Between two samples the value of the later one holds (as an upper bound: a replayed call grows
evenly and reaches it at the later sample), but nobody rises before the calls that end in that
interval have ended, so that memory handed over is not counted twice. It follows that at each sample
the parts add up to the recording, except for what was seen late, which appears between that sample
and the one before; and that between two samples they never exceed the higher of the two.

CPU: the agent burns its usual share (the median of intervals without calls); what is beyond that
goes to the calls of the interval by the time each was open in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from agentcgroup_lab.trace.format import TraceCall, TraceSample

AGENT = -1  # the holder that is no call
_SHORT_CALL_PCT = 100.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A holder's level over a stretch of time, [start_s, end_s)."""

    start_s: float
    end_s: float
    mem_mb: float
    cpu_pct: float


@dataclass(slots=True)
class _Interval:
    """The time from a sample to the next, and who held what at its end."""

    start_s: float
    end_s: float
    cpu_pct: float
    open_at_end: list[int]
    touching: list[int]
    level_mb: dict[int, float] = field(default_factory=dict)
    late_call: int | None = None
    late_mb: float = 0.0
    cpu_by_holder: dict[int, float] = field(default_factory=dict)


def _overlap_s(call: TraceCall, interval: _Interval) -> float:
    return max(0.0, min(call.end_s, interval.end_s) - max(call.start_s, interval.start_s))


def _intervals(samples: Sequence[TraceSample], calls: Sequence[TraceCall]) -> list[_Interval]:
    # The last interval begins at the last sample: calls may outlive it by less than a period.
    intervals = []
    before_s = samples[0].t_s
    first = 0
    for sample in samples:
        while first < len(calls) and calls[first].end_s <= before_s:
            first += 1
        near = range(first, len(calls))
        touching = []
        for index in near:
            if calls[index].start_s >= sample.t_s:
                break
            if calls[index].end_s > before_s:
                touching.append(index)
        open_at_end = [index for index in touching if calls[index].end_s >= sample.t_s]
        intervals.append(_Interval(before_s, sample.t_s, sample.cpu_pct, open_at_end, touching))
        before_s = sample.t_s
    return intervals


def _share_excess(
    interval: _Interval, before: dict[int, float], excess_mb: float, calls: Sequence[TraceCall]
) -> None:
    """Give the open calls what is above the agent's level: the youngest rises and falls first."""
    # calls are sorted by start, so a higher index began later.
    by_age = sorted(interval.open_at_end, key=lambda index: (calls[index].background, -index))
    levels = {index: before.get(index, 0.0) for index in by_age}
    change_mb = excess_mb - sum(levels.values())
    for index in by_age:
        new_mb = max(0.0, levels[index] + change_mb)
        change_mb -= new_mb - levels[index]
        levels[index] = new_mb
        if abs(change_mb) < 1e-9:
            break
    interval.level_mb.update(levels)


def _levels(
    intervals: Sequence[_Interval], samples: Sequence[TraceSample], calls: Sequence[TraceCall]
) -> None:
    before: dict[int, float] = {}
    for position, interval in enumerate(intervals):
        now_mb = samples[position].mem_mb
        agent_before = before.get(AGENT, now_mb)
        if interval.open_at_end:
            agent_mb = min(agent_before, now_mb)
            _share_excess(interval, before, now_mb - agent_mb, calls)
        else:
            agent_mb = now_mb
            ended = interval.touching
            if ended and position + 1 < len(samples):
                stays_mb = max(agent_before, samples[position + 1].mem_mb)
                agent_mb = min(now_mb, stays_mb)
                if now_mb > stays_mb:
                    interval.late_call = max(
                        ended, key=lambda index: calls[index].end_s - calls[index].start_s
                    )
                    interval.late_mb = now_mb - min(agent_before, agent_mb)
        interval.level_mb[AGENT] = agent_mb
        before = interval.level_mb


def _cpu(intervals: Sequence[_Interval], calls: Sequence[TraceCall], cpu_max_pct: float) -> None:
    quiet = [interval.cpu_pct for interval in intervals if not interval.touching]
    usual_pct = statistics.median(quiet) if quiet else 0.0
    for interval in intervals:
        length_s = interval.end_s - interval.start_s
        overlap_s = sum(_overlap_s(calls[index], interval) for index in interval.touching)
        agent_pct = interval.cpu_pct
        if overlap_s > 0.0:
            agent_pct = min(interval.cpu_pct, usual_pct)
            rate_pct = (interval.cpu_pct - agent_pct) * length_s / overlap_s
            for index in interval.touching:
                sampled = index in interval.open_at_end or calls[index].start_s < interval.start_s
                # What a call shorter than a sample burnt is a guess: not on several cores, too.
                limit_pct = cpu_max_pct if sampled else min(cpu_max_pct, _SHORT_CALL_PCT)
                interval.cpu_by_holder[index] = min(rate_pct, limit_pct)
        interval.cpu_by_holder[AGENT] = min(agent_pct, cpu_max_pct)


def attribute(
    samples: Sequence[TraceSample], calls: Sequence[TraceCall], *, cpu_max_pct: float
) -> tuple[list[Piece], list[list[Piece]]]:
    """Split a recording into the agent's pieces and those of each call, in the order of `calls`.

    `calls` are sorted by start and lie within the samples' time, but for the last, which may end
    later. `cpu_max_pct` limits what one holder burns: it should fit the machine that replays.
    """
    intervals = _intervals(samples, calls)
    _levels(intervals, samples, calls)
    _cpu(intervals, calls, cpu_max_pct)
    agent: list[Piece] = []
    pieces: list[list[Piece]] = [[] for _ in calls]
    before: dict[int, float] = {AGENT: samples[0].mem_mb}
    for interval in intervals:
        for holder, piece in _pieces(interval, before, calls):
            target = agent if holder == AGENT else pieces[holder]
            # A stretch of no length says nothing, but for a level that there is no other word of.
            if piece.end_s > piece.start_s or not target:
                target.append(piece)
        before = interval.level_mb
    for call, own in zip(calls, pieces, strict=True):
        # Calls that run on after the last sample keep what they had.
        own_end_s = own[-1].end_s if own else call.start_s
        if call.end_s > own_end_s or not own:
            own.append(Piece(own_end_s, call.end_s, own[-1].mem_mb if own else 0.0, 0.0))
    return agent, pieces


def _pieces(
    interval: _Interval, before: dict[int, float], calls: Sequence[TraceCall]
) -> Iterator[tuple[int, Piece]]:
    """Give each holder its level in an interval, or two where it may rise only later."""
    late = interval.late_call
    ended = [index for index in interval.touching if index not in interval.open_at_end]
    holding = [index for index in ended if before.get(index, 0.0) > 0.0]
    handing_over = [*holding, *([late] if late is not None else [])]
    handed_over_s = max((calls[i].end_s for i in handing_over), default=interval.start_s)
    for holder in (AGENT, *interval.touching):
        was_mb = before.get(holder, 0.0)
        start_s, end_s, rise_s = interval.start_s, interval.end_s, handed_over_s
        if holder != AGENT:
            start_s = max(start_s, calls[holder].start_s)
            end_s = min(end_s, calls[holder].end_s)
        if holder == AGENT or holder in interval.open_at_end:
            high_mb = interval.level_mb.get(holder, 0.0)
            low_mb = min(was_mb, high_mb)
        elif holder == late:
            others = [index for index in holding if index != late]
            others_mb = sum(before[index] for index in others)
            rise_s = max((calls[index].end_s for index in others), default=start_s)
            high_mb = max(was_mb, interval.late_mb)
            low_mb = max(was_mb, interval.late_mb - others_mb)
        else:
            low_mb = high_mb = was_mb
        cpu_pct = interval.cpu_by_holder.get(holder, 0.0)
        rise_s = min(max(rise_s, start_s), end_s)
        if low_mb != high_mb:
            yield holder, Piece(start_s, rise_s, low_mb, cpu_pct)
            yield holder, Piece(rise_s, end_s, high_mb, cpu_pct)
        else:
            yield holder, Piece(start_s, end_s, high_mb, cpu_pct)
