"""A plan as the simulator follows it: each call as stretches of even growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agentcgroup_lab.trace import format as trace_format
from agentcgroup_lab.trace.plan import AgentStep, Options, Plan, PlannedCall, make_plan

JUMP_BYTES = 1 << 20
"""A rise by less is taken at once: nothing depends on it, and it would be an event of its own."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of `duration_s` in which a call holds `start_bytes`, and `rate` bytes more with
    every second."""

    duration_s: float
    start_bytes: float
    rate: float
    cores: float


@dataclass(frozen=True, slots=True)
class CallProfile:
    """A call of a plan: when it runs, and the stretches that it passes through."""

    name: str
    start_s: float
    end_s: float
    duration_s: float
    background: bool
    peak_bytes: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """A session's plan as the simulator runs it: the agent's own use, and its calls."""

    name: str
    duration_s: float
    agent: tuple[AgentStep, ...]
    calls: tuple[CallProfile, ...]
    peak_bytes: int
    mean_bytes: float


def _segments(call: PlannedCall, rise_bytes_per_s: float | None) -> tuple[Segment, ...]:
    found: list[Segment] = []
    held = 0.0
    for step in call.steps:
        length_s, rise = step.duration_ms / 1000.0, step.memory_bytes - held
        cores = step.cpu_pct / 100.0
        if rise <= JUMP_BYTES:
            held = float(step.memory_bytes)
            last = found[-1] if found else None
            if last is not None and last.rate == 0.0 and last.start_bytes == held:
                total_s = last.duration_s + length_s
                cores = (last.cores * last.duration_s + cores * length_s) / total_s
                found[-1] = Segment(total_s, held, 0.0, cores)
            else:
                found.append(Segment(length_s, held, 0.0, cores))
            continue
        rate = max(rise / length_s, rise_bytes_per_s or 0.0)
        rise_s = rise / rate
        found.append(Segment(rise_s, held, rate, cores))
        held = float(step.memory_bytes)
        if length_s - rise_s > 0.001:
            found.append(Segment(length_s - rise_s, held, 0.0, cores))
    return tuple(found)


def _call_profile(call: PlannedCall, rise_bytes_per_s: float | None) -> CallProfile:
    segments = _segments(call, rise_bytes_per_s)
    duration_s = sum(segment.duration_s for segment in segments)
    return CallProfile(
        name=call.tool,
        start_s=call.start_s,
        end_s=call.start_s + duration_s,
        duration_s=duration_s,
        background=call.background,
        peak_bytes=float(call.peak_bytes),
        segments=segments,
    )


def compile_plan(plan: Plan, rise_bytes_per_s: float | None = None) -> Profile:
    """Make a profile of a plan. `rise_bytes_per_s`: a call rises to each step's level at least as
    fast; None: evenly over the step, as a replayed call does."""
    calls = tuple(_call_profile(call, rise_bytes_per_s) for call in plan.calls)
    duration_s = max([plan.duration_s, *(call.end_s for call in calls if not call.background)])
    return Profile(plan.name, duration_s, plan.agent, calls, plan.peak_bytes, plan.mean_bytes)


def find_recordings(paths: Sequence[Path]) -> list[Path]:
    """Return files as they are, and all recordings of folders. Raises FileNotFoundError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted([*path.glob("*.jsonl.gz"), *path.glob("*.jsonl")])
        else:
            found.append(path)
    if not found:
        raise FileNotFoundError(
            f"no recordings (*.jsonl, *.jsonl.gz) in {', '.join(map(str, paths))}"
        )
    return found


def load_profiles(
    paths: Sequence[Path], options: Options, rise_bytes_per_s: float | None = None
) -> list[Profile]:
    """Read each recording as a profile. Raises TraceError, OSError, ValueError."""
    return [
        compile_plan(make_plan(trace_format.read(path), options), rise_bytes_per_s)
        for path in paths
    ]
