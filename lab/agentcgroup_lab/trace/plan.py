"""Schedules, made from recordings, that real processes can follow. Pure: no I/O, no clock.

The plan keeps the recorded order and the think time: a call that ends late delays what follows it,
as it would a real agent (closed loop). Who holds what is decided in `attribute`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from agentcgroup_lab.trace.attribute import Piece, attribute
from agentcgroup_lab.trace.format import MEGABYTE_BYTES, Trace, TraceCall, TraceSample

PAGE_BYTES = 4096
CPU_MAX_PCT = 100.0
_CPU_SAME_PCT = 2.0


@dataclass(frozen=True, slots=True)
class Step:
    """Hold `memory_bytes` for `duration_ms` and burn `cpu_pct` of one core meanwhile."""

    duration_ms: int
    memory_bytes: int
    cpu_pct: int


@dataclass(frozen=True, slots=True)
class AgentStep:
    """Memory and CPU of the agent's own runtime from `at_s` on."""

    at_s: float
    memory_bytes: int
    cpu_pct: int


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A tool call. Times are the plan's: recorded ones, shifted to the window, over speed.

    `think_s` is the time between the end of the calls before it and its start.
    """

    index: int
    id: str
    tool: str
    start_s: float
    end_s: float
    think_s: float
    background: bool
    steps: tuple[Step, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that it holds."""
        return max(step.memory_bytes for step in self.steps)


@dataclass(frozen=True, slots=True)
class Options:
    """Scales by which a recording is shrunk. The window is in recorded seconds; None: all of it."""

    memory_scale: float = 1.0
    speed: float = 1.0
    window_s: tuple[float, float] | None = None
    max_calls: int | None = None
    cpu_max_pct: float = CPU_MAX_PCT

    def __post_init__(self) -> None:
        for name in ("memory_scale", "speed", "cpu_max_pct"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: more than 0")
        if self.max_calls is not None and self.max_calls < 1:
            raise ValueError(f"max_calls is {self.max_calls}; allowed: at least 1")
        if self.window_s is not None and not 0 <= self.window_s[0] < self.window_s[1]:
            raise ValueError(f"window is {self.window_s}; allowed: 0 <= start < end")


@dataclass(frozen=True, slots=True)
class Plan:
    """A session's schedule."""

    name: str
    duration_s: float
    agent: tuple[AgentStep, ...]
    calls: tuple[PlannedCall, ...]
    options: Options
    calls_left_out: int = 0

    def agent_bytes_at(self, at_s: float) -> int:
        """Bytes that the agent's own runtime holds when all runs on time."""
        held = self.agent[0].memory_bytes
        for step in self.agent:
            if step.at_s > at_s:
                break
            held = step.memory_bytes
        return held

    def held_bytes_at(self, at_s: float) -> int:
        """Bytes that the whole session holds when all runs on time."""
        held = self.agent_bytes_at(at_s)
        for call in self.calls:
            # To the microsecond: at a step's very start it is that step which holds.
            passed_ms = round((at_s - call.start_s) * 1000.0, 3)
            if passed_ms < 0.0:
                continue
            for step in call.steps:
                passed_ms -= step.duration_ms
                if passed_ms < 0.0:
                    held += step.memory_bytes
                    break
        return held

    def turns_s(self) -> list[float]:
        """The times at which the plan's demand may change, ascending."""
        times_ms = {0, round(self.duration_s * 1000)}
        times_ms.update(round(step.at_s * 1000) for step in self.agent)
        for call in self.calls:
            at_ms = round(call.start_s * 1000)
            times_ms.add(at_ms)
            for step in call.steps:
                at_ms += step.duration_ms
                times_ms.add(at_ms)
        return [at_ms / 1000.0 for at_ms in sorted(times_ms)]

    @property
    def peak_bytes(self) -> int:
        """The most that the session holds when all runs on time."""
        return max(self.held_bytes_at(at_s) for at_s in self.turns_s())

    @property
    def mean_bytes(self) -> float:
        """Bytes that the session holds on average when all runs on time."""
        turns = self.turns_s()
        area = sum(
            self.held_bytes_at(start) * (end - start) for start, end in itertools.pairwise(turns)
        )
        return area / self.duration_s if self.duration_s else float(self.held_bytes_at(0.0))

    @property
    def agent_peak_bytes(self) -> int:
        """The most that the agent's own runtime holds."""
        return max(step.memory_bytes for step in self.agent)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)


def busiest_window(trace: Trace, length_s: float) -> tuple[float, float]:
    """The window of `length_s` seconds around the recording's peak, which comes at its middle."""
    peak = max(trace.samples, key=lambda sample: sample.mem_mb)
    length_s = min(length_s, trace.duration_s)
    start_s = min(max(0.0, peak.t_s - length_s / 2), trace.duration_s - length_s)
    return start_s, start_s + length_s


def _cut(
    trace: Trace, window_s: tuple[float, float] | None
) -> tuple[list[TraceSample], list[TraceCall]]:
    """Samples and calls within the window, its start being time 0; calls are cut at its edges."""
    start_s, end_s = window_s or (0.0, trace.duration_s)
    end_s = min(end_s, trace.duration_s)
    samples = [sample for sample in trace.samples if start_s <= sample.t_s <= end_s]
    if not samples:
        raise ValueError(f"window {start_s:g}-{end_s:g} s of {trace.task} holds no sample")
    origin_s = samples[0].t_s
    calls = [
        replace(
            call,
            start_s=max(call.start_s, origin_s) - origin_s,
            end_s=min(call.end_s, end_s) - origin_s,
        )
        for call in trace.calls
        if call.end_s > origin_s and call.start_s < end_s
    ]
    return [replace(sample, t_s=sample.t_s - origin_s) for sample in samples], calls


def _pages(mem_mb: float, scale: float) -> int:
    return round(mem_mb * MEGABYTE_BYTES * scale / PAGE_BYTES) * PAGE_BYTES


def _grid_ms(recorded_s: float, options: Options) -> int:
    """Plan time in milliseconds: one grid for all, so that handing over has no gap or overlap."""
    return round(recorded_s * 1000.0 / options.speed)


def _steps(pieces: Sequence[Piece], options: Options) -> tuple[Step, ...]:
    """Pieces to whole milliseconds. Rounding does not add up, and no level is lost to it."""
    steps: list[Step] = []
    done_ms = _grid_ms(pieces[0].start_s, options)
    lost_bytes = 0
    for piece in pieces:
        until_ms = _grid_ms(piece.end_s, options)
        memory_bytes = max(_pages(piece.mem_mb, options.memory_scale), lost_bytes)
        if until_ms <= done_ms:
            lost_bytes = memory_bytes
            continue
        lost_bytes = 0
        step = Step(until_ms - done_ms, memory_bytes, round(piece.cpu_pct))
        done_ms = until_ms
        last = steps[-1] if steps else None
        if (
            last is not None
            and last.memory_bytes == step.memory_bytes
            and abs(last.cpu_pct - step.cpu_pct) <= _CPU_SAME_PCT
        ):
            total_ms = last.duration_ms + step.duration_ms
            burnt = last.cpu_pct * last.duration_ms + step.cpu_pct * step.duration_ms
            steps[-1] = Step(total_ms, step.memory_bytes, round(burnt / total_ms))
        else:
            steps.append(step)
    if not steps:
        return (Step(1, lost_bytes, round(pieces[-1].cpu_pct)),)
    if lost_bytes > steps[-1].memory_bytes:
        steps.append(Step(1, lost_bytes, steps[-1].cpu_pct))
    return tuple(steps)


def _agent_steps(pieces: Sequence[Piece], options: Options) -> tuple[AgentStep, ...]:
    steps: list[AgentStep] = []
    for piece in pieces:
        memory_bytes = _pages(piece.mem_mb, options.memory_scale)
        step = AgentStep(
            _grid_ms(piece.start_s, options) / 1000.0, memory_bytes, round(piece.cpu_pct)
        )
        if steps and steps[-1].at_s == step.at_s:
            steps[-1] = step
        elif (
            not steps
            or steps[-1].memory_bytes != memory_bytes
            or abs(steps[-1].cpu_pct - step.cpu_pct) > _CPU_SAME_PCT
        ):
            steps.append(step)
    return tuple(steps)


def _largest(calls: Sequence[TraceCall], pieces: Sequence[Sequence[Piece]], n: int) -> list[int]:
    """The n calls that hold most; where they hold the same, those that last longest."""

    def weight(index: int) -> tuple[float, float]:
        call = calls[index]
        return max(piece.mem_mb for piece in pieces[index]), call.end_s - call.start_s

    return sorted(sorted(range(len(calls)), key=weight, reverse=True)[:n])


def make_plan(trace: Trace, options: Options | None = None) -> Plan:
    """Turn a recording into a plan. With `max_calls` the smallest calls are left out and what they
    held is the agent's. Raises ValueError for a window without samples."""
    options = options or Options()
    samples, calls = _cut(trace, options.window_s)
    agent, pieces = attribute(samples, calls, cpu_max_pct=options.cpu_max_pct)
    left_out = 0
    if options.max_calls is not None and len(calls) > options.max_calls:
        left_out = len(calls) - options.max_calls
        calls = [calls[index] for index in _largest(calls, pieces, options.max_calls)]
        agent, pieces = attribute(samples, calls, cpu_max_pct=options.cpu_max_pct)
    planned: list[PlannedCall] = []
    for index, (call, own) in enumerate(zip(calls, pieces, strict=True)):
        start_s = _grid_ms(call.start_s, options) / 1000.0
        steps = _steps(own, options)
        # A step lasts at least a millisecond, so the end is what the steps add up to.
        end_s = start_s + sum(step.duration_ms for step in steps) / 1000.0
        before_s = max(
            (other.end_s for other in planned if not other.background and other.end_s <= start_s),
            default=0.0,
        )
        planned.append(
            PlannedCall(
                index=index,
                id=call.id,
                tool=call.tool,
                start_s=start_s,
                end_s=end_s,
                think_s=start_s - before_s,
                background=call.background,
                steps=steps,
            )
        )
    ends = [_grid_ms(samples[-1].t_s, options) / 1000.0, *(call.end_s for call in planned)]
    return Plan(
        name=trace.task,
        duration_s=max(ends),
        agent=_agent_steps(agent, options),
        calls=tuple(planned),
        options=options,
        calls_left_out=left_out,
    )


def start_offsets_s(plans: Sequence[Plan]) -> list[float]:
    """Start times of the sessions at which the plans' peaks meet: the worst case, as early as it
    can be.

    A plan's peak is taken where it stays longest within a tenth of its highest level.
    """
    peaks_s = []
    for plan in plans:
        spans = [
            (plan.held_bytes_at(start), end - start, start)
            for start, end in itertools.pairwise(plan.turns_s())
        ]
        top_bytes = max((held for held, _, _ in spans), default=0)
        near = [(length, start) for held, length, start in spans if held >= 0.9 * top_bytes]
        length_s, start_s = max(near, default=(0.0, 0.0))
        peaks_s.append(start_s + length_s / 2)
    return [max(peaks_s) - peak_s for peak_s in peaks_s]


class Demand:
    """Memory that several plans hold together when all run on time, each shifted by its offset."""

    def __init__(self, plans: Sequence[Plan], offsets_s: Sequence[float]) -> None:
        times = {
            turn + offset
            for plan, offset in zip(plans, offsets_s, strict=True)
            for turn in plan.turns_s()
        }
        self.at_s = sorted(times)
        self.held_bytes = [
            sum(
                plan.held_bytes_at(max(0.0, at_s - offset))
                for plan, offset in zip(plans, offsets_s, strict=True)
                if at_s - offset <= plan.duration_s
            )
            for at_s in self.at_s
        ]

    @property
    def peak_bytes(self) -> int:
        """The most that they hold together."""
        return max(self.held_bytes)

    @property
    def mean_bytes(self) -> float:
        """Bytes that they hold together on average."""
        spans = itertools.pairwise(self.at_s)
        area = sum(
            held * (end - start) for held, (start, end) in zip(self.held_bytes, spans, strict=False)
        )
        return area / (self.at_s[-1] - self.at_s[0])

    def _above(self, limit_bytes: float) -> Iterator[tuple[float, float]]:
        """Spans where they hold more than the limit: seconds, and bytes above it."""
        for held, (start, end) in zip(self.held_bytes, itertools.pairwise(self.at_s), strict=False):
            if held > limit_bytes:
                yield end - start, held - limit_bytes

    def seconds_above(self, limit_bytes: float) -> float:
        """Seconds for which they hold more than `limit_bytes`."""
        return sum(length_s for length_s, _ in self._above(limit_bytes))

    def area_above(self, limit_bytes: float) -> float:
        """Excess over `limit_bytes` times its duration, in byte seconds."""
        return sum(length_s * over_bytes for length_s, over_bytes in self._above(limit_bytes))
