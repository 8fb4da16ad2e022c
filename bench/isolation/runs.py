"""Runs of a mix under a strategy, and what is kept of them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from agentcgroup_lab.replay import backends, engine
from agentcgroup_lab.replay.result import Latency, SessionResult, StrategyResult
from bench.isolation.mixes import Header, Mix, Settings, make_mix
from bench.isolation.oomd import OOMD, OomdBackend

backends.register(OOMD, OomdBackend)

ALONE = "alone"
TIMEOUT_FACTOR, TIMEOUT_MORE_S = 3.0, 10.0
"""A run is over after so many times the planned time and so many seconds more: what has not ended
by then has not survived. The target for the makespan is 1.25."""


@dataclass(frozen=True, slots=True)
class Run:
    """Numbers of a strategy, or of the important session alone, on a pool."""

    mix: int
    ratio: float
    repeat: int
    strategy: str
    pool_bytes: int
    seconds: float
    bound_s: float
    sessions: int
    sessions_finished: int
    calls: int
    calls_finished: int
    calls_killed: int
    important_finished: bool
    """The important session's agent and all of its calls."""
    important_s: float
    important_planned_s: float
    important_latency: Latency | None
    pool_use_mean: float
    pool_use_peak: float
    frozen_s: float
    oom_kills: int
    """In all sessions whose cgroups were there to be read."""
    leaks: int
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Run:
        """The inverse of `to_json`, also after JSON."""
        latency = value["important_latency"]
        return cls(
            **{
                **value,
                "important_latency": Latency(**latency) if latency else None,
                "notes": tuple(value["notes"]),
            }
        )

    @property
    def survived(self) -> bool:
        """Every session and every call."""
        return self.calls_finished == self.calls and self.sessions_finished == self.sessions


@dataclass(frozen=True, slots=True)
class Group:
    """Runs to compare side by side: a mix at a ratio, alone and under every strategy."""

    number: int
    mix: int
    ratio: float
    repeat: int
    strategies: tuple[str, ...]

    @property
    def order(self) -> tuple[str, ...]:
        """Each group begins with another one, so that none is always first or last."""
        everything = (ALONE, *self.strategies)
        first = (self.mix + self.repeat) % len(everything)
        return everything[first:] + everything[:first]


def pool_use(result: StrategyResult) -> tuple[float, float]:
    """Mean over time, and peak, of what is used of the pool."""
    timeline = result.timeline
    spans = list(itertools.pairwise(timeline.at_s))
    area = sum(
        used * (end - start) for used, (start, end) in zip(timeline.pool_bytes, spans, strict=False)
    )
    length_s = sum(end - start for start, end in spans)
    mean = area / length_s if length_s else float(max(timeline.pool_bytes, default=0))
    return mean / result.limit_bytes, max(timeline.pool_bytes, default=0) / result.limit_bytes


def _frozen_s(sessions: Iterable[SessionResult]) -> float:
    spans = (span for session in sessions for call in session.calls for span in call.frozen)
    return sum(span.end_s - span.start_s for span in spans)


def makespan_s(result: StrategyResult, delays_s: Mapping[str, float]) -> float:
    """Seconds from the moment that the first agent is ready to the end of the last. Before,
    interpreters start, which no order can help."""
    began_s = min(one.began_s - delays_s[one.id] for one in result.sessions)
    return max(one.ended_s for one in result.sessions) - began_s


def condense(
    result: StrategyResult, group: Group, strategy: str, bound_s: float, seconds: float
) -> Run:
    """The numbers of a run that took so many seconds."""
    sessions = result.sessions
    important = next(session for session in sessions if session.important)
    mean, peak = pool_use(result)
    return Run(
        mix=group.mix,
        ratio=group.ratio,
        repeat=group.repeat,
        strategy=strategy,
        pool_bytes=result.limit_bytes,
        seconds=round(seconds, 4),
        bound_s=round(bound_s, 4),
        sessions=len(sessions),
        sessions_finished=sum(session.state == "finished" for session in sessions),
        calls=sum(len(session.calls) for session in sessions),
        calls_finished=sum(session.count("finished") for session in sessions),
        calls_killed=sum(session.count("killed") for session in sessions),
        important_finished=important.state == "finished"
        and important.count("finished") == len(important.calls),
        important_s=round(important.seconds, 4),
        important_planned_s=important.planned_s,
        important_latency=important.alloc_latency,
        pool_use_mean=round(mean, 4),
        pool_use_peak=round(peak, 4),
        frozen_s=round(_frozen_s(sessions), 3),
        oom_kills=sum(session.oom_kills or 0 for session in sessions),
        leaks=len(result.leaks),
        notes=result.notes,
    )


def run_one(mix: Mix, group: Group, strategy: str, cpus: int) -> tuple[Run, StrategyResult]:
    """Run it here. Raises ReplayError where that is impossible."""
    specs = mix.alone() if strategy == ALONE else mix.specs()
    longest_s = max(spec.planned_s for spec in specs)
    options = engine.EngineOptions(
        timeout_s=TIMEOUT_FACTOR * longest_s + TIMEOUT_MORE_S,
        memory_scale=mix.options.memory_scale,
    )
    pool_bytes = mix.pool_bytes(group.ratio)
    name = "none" if strategy == ALONE else strategy
    result = engine.run_strategy(name, specs, pool_bytes, options)
    seconds = makespan_s(result, {spec.id: spec.delay_s for spec in specs})
    bound_s = mix.bound_s(group.ratio, cpus)
    return condense(result, group, strategy, bound_s, seconds), result


def run_group(
    group: Group, known: Sequence[Header], settings: Settings
) -> list[tuple[Run, StrategyResult]]:
    """Run all of a group, one after the other, in this process."""
    mix = make_mix(group.mix, known, settings)
    found = []
    for strategy in group.order:
        started = time.monotonic()
        run, result = run_one(mix, group, strategy, settings.cpus)
        found.append((run, result))
        say(f"{os.getpid()} {line(run)}  ({time.monotonic() - started:.0f} s in all)")
    return found


def say(text: str) -> None:
    """Print progress, also from a worker process: one write, so that lines do not mix."""
    os.write(2, (text + "\n").encode())


def line(run: Run) -> str:
    """A run in one line."""
    latency = run.important_latency
    p95 = f"{latency.p95_usec:.0f} us" if latency else "-"
    return (
        f"mix {run.mix} x{run.ratio:g} #{run.repeat} {run.strategy:>6}: "
        f"calls {run.calls_finished}/{run.calls}, sessions {run.sessions_finished}/{run.sessions}, "
        f"{run.seconds:.1f} s (bound {run.bound_s:.1f}), important {run.important_s:.1f} s"
        f"{'' if run.important_finished else ' LOST'}, p95 {p95}, "
        f"pool {run.pool_use_mean:.0%}/{run.pool_use_peak:.0%}"
    )
