"""Which recordings the benchmark `isolation` puts together, how they are shrunk, and the pool.

A mix is one important session and some others. Everything follows from the mix's number, the folder
of recordings and how fast this machine is, so that the same command draws the same mixes again.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from agentcgroup_lab.replay.backends import ReplayError
from agentcgroup_lab.replay.engine import SessionSpec
from agentcgroup_lab.trace import format as trace_format
from agentcgroup_lab.trace import plan
from bench.isolation.bound import makespan_bound_s
from bench.isolation.machine import RECORDINGS, ROOT, Speed

WINDOW_S = 60.0
"""Recorded seconds replayed, around the recording's peak."""
SIZES = (5, 6, 7, 8)
"""Sessions of a mix to begin with; more are added where demand cannot reach the wanted ratio."""
WANTED = (2.0, 3.0)
"""Ratios, taken in turns, of demand to pool that a mix should be able to reach."""
MARGIN = 1.05
"""The pool at that ratio over what must fit: one that is full to the last page leaves no room
for the kernel's own."""
TRIES = 60
DRAWS = 4
"""Recordings are drawn by their headers alone, then read; so often until they are as wanted."""
IMPORTANT_RISE_MB = 100.0
"""The important session's calls should rise by this much, or there is no allocation to time."""
FIXED_BYTES = 4_000_000
"""A session's part that does not shrink: what its processes hold beyond their plan."""
MEMORY_SHARE = 0.45
"""Share of this machine's free memory that all pools together may have."""
RISE_SHARE = 0.12
"""Share of the time in which all sessions may rise to their peaks: slower than that the peaks,
which recorded calls reach in a second or two, would not meet."""
SPAWN_SHARE, SPAWNS_PER_CALL = 0.25, 3.0
"""Share of the time that may go into starting calls, and how many plain spawns a call costs."""
SCALES = (1.0, 0.75, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1)


@dataclass(frozen=True, slots=True)
class Header:
    """First line of a recording, read without the rest."""

    name: str
    path: Path
    peak_mb: float
    mean_mb: float

    @property
    def rise_mb(self) -> float:
        """Distance of the peak from the mean."""
        return self.peak_mb - self.mean_mb


@dataclass(frozen=True, slots=True)
class Settings:
    """Scales of the runs, and what this machine can do."""

    length_s: float
    speed: Speed
    cpus: int
    emulated: bool
    lanes: int = 1
    sessions_max: int = 12


@dataclass(frozen=True, slots=True)
class Mix:
    """Sessions, the first of them important, and what they ask for together."""

    number: int
    names: tuple[str, ...]
    plans: tuple[plan.Plan, ...]
    offsets_s: tuple[float, ...]
    options: plan.Options
    demand_bytes: int
    floor_bytes: int

    @property
    def ratio_max(self) -> float:
        """The highest ratio of demand to pool at which some order lets everything finish."""
        return self.demand_bytes / self.floor_bytes

    def feasible(self, ratio: float) -> bool:
        """Return whether any strategy could succeed at this ratio."""
        return ratio <= self.ratio_max

    def pool_bytes(self, ratio: float) -> int:
        """The pool that makes demand / pool this ratio."""
        return int(self.demand_bytes / ratio)

    def specs(self) -> list[SessionSpec]:
        """The sessions for the replay's engine."""
        return [
            SessionSpec(f"s{number}", name, one, important=number == 1, delay_s=offset_s)
            for number, (name, one, offset_s) in enumerate(
                zip(self.names, self.plans, self.offsets_s, strict=True), 1
            )
        ]

    def alone(self) -> list[SessionSpec]:
        """The important session by itself."""
        return [replace(self.specs()[0], delay_s=0.0)]

    def bound_s(self, ratio: float, cpus: int) -> float:
        """Give the time before which no order of things ends."""
        return makespan_bound_s(self.plans, self.offsets_s, self.pool_bytes(ratio), cpus)

    def to_json(self) -> dict[str, Any]:
        """The choice as plain values, without the schedules."""
        sessions = [
            {
                "recording": name,
                "important": number == 0,
                "planned_s": one.duration_s,
                "starts_s": round(offset_s, 3),
                "peak_bytes": one.peak_bytes,
                "agent_peak_bytes": one.agent_peak_bytes,
                "calls": len(one.calls),
                "largest_call_bytes": largest_call_bytes(one),
            }
            for number, (name, one, offset_s) in enumerate(
                zip(self.names, self.plans, self.offsets_s, strict=True)
            )
        ]
        return {
            "mix": self.number,
            "memory_scale": self.options.memory_scale,
            "demand_bytes": self.demand_bytes,
            "floor_bytes": self.floor_bytes,
            "ratio_max": round(self.ratio_max, 3),
            "sessions": sessions,
        }


def folders(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """$TRACES, or the project's own recordings and the larger collection beside the checkout where
    there is one."""
    if environ.get("TRACES"):
        return [Path(environ["TRACES"])]
    beside = ROOT.parent / "shared/traces"
    return [RECORDINGS, *([beside] if beside.is_dir() else [])]


def headers(directories: Sequence[Path]) -> list[Header]:
    """Read the headers of all recordings, by name. Raises ReplayError where there is none."""
    found = {}
    for directory in directories:
        for path in [*directory.glob("*.jsonl.gz"), *directory.glob("*.jsonl")]:
            name = path.name.removesuffix(".gz").removesuffix(".jsonl")
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as stream:
                first = json.loads(stream.readline())
            found[name] = Header(name, path, float(first["peak_mb"]), float(first["mean_mb"]))
    if not found:
        raise ReplayError(
            f"no recordings (*.jsonl.gz) in {', '.join(map(str, directories))}; "
            "TRACES=dir names another folder"
        )
    return [found[name] for name in sorted(found)]


def largest_call_bytes(one: plan.Plan) -> int:
    """The most that one of its calls holds."""
    return max((call.peak_bytes for call in one.calls), default=0)


def _ratio_max_told(drawn: Sequence[Header]) -> float:
    """Estimate `Mix.ratio_max` from headers: the mean is the agent's, the rest a call's."""
    demand = sum(header.peak_mb for header in drawn)
    return demand / (sum(h.mean_mb for h in drawn) + max(h.rise_mb for h in drawn))


def _wanted(number: int) -> float:
    return WANTED[number % len(WANTED)]


def draw(
    number: int, known: Sequence[Header], sessions_max: int = 12, again: int = 0
) -> list[Header]:
    """The recordings of mix `number`, the important session's first.

    Drawn with replacement (agents do work on the same task), those whose calls rise higher more
    often: what an idle agent holds cannot be had back without swap, so only sessions that are
    mostly their calls can ask for two or three times a pool that still holds all agents. The first
    draw that can reach the wanted ratio is taken; after every TRIES one session is added.
    """
    chance = random.Random(number * DRAWS + again)
    wanted = _wanted(number) * (MARGIN + 0.1 * again)
    size = min(SIZES[number % len(SIZES)], sessions_max)
    weights = [max(header.rise_mb, 1.0) ** (_wanted(number) / max(WANTED)) for header in known]
    best: list[Header] = []
    while size <= sessions_max:
        for _ in range(TRIES):
            drawn = chance.choices(known, weights, k=size)
            rising = [header for header in drawn if header.rise_mb >= IMPORTANT_RISE_MB]
            if rising:
                first = drawn.index(chance.choice(rising))
                drawn = [drawn[first], *drawn[:first], *drawn[first + 1 :]]
            if not best or _ratio_max_told(drawn) > _ratio_max_told(best):
                best = drawn
            if rising and _ratio_max_told(drawn) >= wanted:
                return drawn
        size += 1
    return best


@cache
def _read(path: Path) -> trace_format.Trace:
    return trace_format.read(path)


def _build(number: int, drawn: Sequence[Header], options: plan.Options) -> Mix:
    plans = []
    for header in drawn:
        recorded = _read(header.path)
        window_s = plan.busiest_window(recorded, WINDOW_S)
        plans.append(plan.make_plan(recorded, replace(options, window_s=window_s)))
    offsets_s = plan.start_offsets_s(plans)
    fixed = FIXED_BYTES * len(plans)
    return Mix(
        number=number,
        names=tuple(header.name for header in drawn),
        plans=tuple(plans),
        offsets_s=tuple(offsets_s),
        options=options,
        demand_bytes=plan.Demand(plans, offsets_s).peak_bytes + fixed,
        floor_bytes=sum(one.agent_peak_bytes for one in plans)
        + max(largest_call_bytes(one) for one in plans)
        + fixed,
    )


def scale_for(mix: Mix, settings: Settings) -> float:
    """The factor for memory: what this machine has and can touch in time, and no more than 1."""
    rises = [largest_call_bytes(one) for one in mix.plans]
    at_once = 1 if settings.emulated else max(1, settings.cpus // settings.lanes)
    rise_s = max(max(rises), sum(rises) / at_once) / settings.speed.touch_bytes_per_s
    by_time = RISE_SHARE * settings.length_s / max(rise_s, 1e-6)
    by_memory = MEMORY_SHARE * settings.speed.free_bytes / settings.lanes / mix.demand_bytes
    factor = min(1.0, by_time, by_memory)
    return next((scale for scale in SCALES if scale <= factor), SCALES[-1])


def _options(sessions: int, settings: Settings) -> plan.Options:
    room = 0.5 * (1 if settings.emulated else settings.cpus / settings.lanes)
    return plan.Options(
        speed=max(1.0, WINDOW_S / settings.length_s),
        # Memory is what is measured: together the sessions leave some CPU on any machine.
        cpu_max_pct=100.0 * min(1.0, room / sessions),
    )


def _chosen(number: int, known: Sequence[Header], settings: Settings) -> list[Header]:
    """Return the first of several draws that reaches the wanted ratio, else the one that comes
    closest. Judged at a given scale, so that it does not depend on how fast the machine was just
    now."""
    scale = SCALES[-1] if settings.emulated else 1.0
    best: tuple[float, list[Header]] | None = None
    for again in range(DRAWS):
        drawn = draw(number, known, settings.sessions_max, again)
        options = replace(_options(len(drawn), settings), memory_scale=scale)
        reached = _build(number, drawn, options).ratio_max
        if best is None or reached > best[0]:
            best = reached, drawn
        if best[0] >= _wanted(number) * MARGIN:
            break
    assert best is not None
    return best[1]


def make_mix(number: int, known: Sequence[Header], settings: Settings) -> Mix:
    """Draw, then shrink to what this machine can do. Pure but for reading the recordings."""
    drawn = _chosen(number, known, settings)
    spawn_s = SPAWNS_PER_CALL * settings.speed.spawn_s * (len(drawn) if settings.emulated else 1)
    options = replace(
        _options(len(drawn), settings),
        max_calls=max(4, int(SPAWN_SHARE * settings.length_s / spawn_s)),
    )
    whole = _build(number, drawn, options)
    scale = scale_for(whole, settings)
    return whole if scale == 1.0 else _build(number, drawn, replace(options, memory_scale=scale))
