"""Tables and targets of the benchmark `isolation`, made from its runs. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from agentcgroup import tables
from bench.isolation.runs import ALONE, Run
from bench.report import Target

OURS = "ours"
TARGET_RATIO = 2.0
SLOWDOWN_MOST, LATENCY_MOST, MAKESPAN_MOST = 1.05, 1.2, 1.25
QUANTILES = ("p50", "p95", "p99")
_AT = f"at {TARGET_RATIO:g}x"

Key = tuple[int, float, int]
Stat = dict[str, float] | None


def stat(values: Iterable[float]) -> Stat:
    """Median and spread; None where nothing was measured."""
    known = sorted(values)
    if not known:
        return None
    return {"n": len(known), "median": statistics.median(known), "min": known[0], "max": known[-1]}


def _alone(runs: Sequence[Run]) -> dict[Key, Run]:
    return {(run.mix, run.ratio, run.repeat): run for run in runs if run.strategy == ALONE}


def _over_alone(
    runs: Iterable[Run], alone: dict[Key, Run], value: Callable[[Run], float | None]
) -> list[float]:
    """Ratios to the run alone of the same group. Only an important session that finished all of
    its calls has done the same work."""
    found = []
    for run in runs:
        reference = alone.get((run.mix, run.ratio, run.repeat))
        if reference is None or not run.important_finished or not reference.important_finished:
            continue
        mine, theirs = value(run), value(reference)
        if mine is not None and theirs:
            found.append(mine / theirs)
    return found


def _latency(quantile: str) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        latency = run.important_latency
        return None if latency is None else float(getattr(latency, f"{quantile}_usec"))

    return value


def cell(runs: Sequence[Run], alone: dict[Key, Run]) -> dict[str, Any]:
    """Summarize a strategy on a mix at a ratio, or on several of them together."""
    return {
        "runs": len(runs),
        "calls": sum(run.calls for run in runs),
        "calls_finished": sum(run.calls_finished for run in runs),
        "calls_killed": sum(run.calls_killed for run in runs),
        "sessions": sum(run.sessions for run in runs),
        "sessions_finished": sum(run.sessions_finished for run in runs),
        "important_finished": sum(run.important_finished for run in runs),
        "slowdown": stat(_over_alone(runs, alone, lambda run: run.important_s)),
        "latency": {name: stat(_over_alone(runs, alone, _latency(name))) for name in QUANTILES},
        # A run that lost calls ends early: its makespan says nothing.
        "makespan": stat(run.seconds / run.bound_s for run in runs if run.survived),
        "pool_use_mean": stat(run.pool_use_mean for run in runs),
        "pool_use_peak": stat(run.pool_use_peak for run in runs),
        "frozen_s": stat(run.frozen_s for run in runs),
        "leaks": sum(run.leaks for run in runs),
    }


def cells(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per mix, ratio and strategy, in this order."""
    alone = _alone(runs)
    found: dict[tuple[int, float, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.strategy != ALONE:
            found[run.mix, run.ratio, run.strategy].append(run)
    return [
        {"mix": mix, "ratio": ratio, "strategy": strategy, **cell(mine, alone)}
        for (mix, ratio, strategy), mine in sorted(found.items())
    ]


def totals(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per ratio and strategy, over all mixes that could be run there."""
    alone = _alone(runs)
    found: dict[tuple[float, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.strategy != ALONE:
            found[run.ratio, run.strategy].append(run)
    return [
        {
            "ratio": ratio,
            "strategy": strategy,
            "mixes": len({run.mix for run in mine}),
            **cell(mine, alone),
        }
        for (ratio, strategy), mine in sorted(found.items())
    ]


def targets(runs: Sequence[Run], emulated: bool) -> list[Target]:
    """Judge what ours does at twice the pool. Each ratio twice: the median over all runs, and the
    median of the mix where it is worst.

    Where one emulated core is all that the sessions share, allocations wait for that core, whatever
    is done about memory: the latency is in the table there, and no target is judged by it.
    """
    alone = _alone(runs)
    mine = [run for run in runs if run.strategy == OURS and run.ratio == TARGET_RATIO]
    if not mine:
        return []
    whole = cell(mine, alone)
    found = []
    for what in ("calls", "sessions"):
        share = 100.0 * whole[f"{what}_finished"] / whole[what]
        survived = whole[f"{what}_finished"] == whole[what]
        found.append(Target(f"{what} that survive {_AT}", share, "%", "= 100", survived))
    by_mix = [
        cell([run for run in mine if run.mix == mix], alone)
        for mix in sorted({run.mix for run in mine})
    ]
    judged: list[tuple[str, float, Callable[[dict[str, Any]], Stat]]] = [
        ("important session's time over alone", SLOWDOWN_MOST, lambda one: one["slowdown"]),
        ("makespan over the best order's bound", MAKESPAN_MOST, lambda one: one["makespan"]),
    ]
    if not emulated:
        name = "its p95 allocation latency over alone"
        judged.insert(1, (name, LATENCY_MOST, lambda one: one["latency"]["p95"]))
    for name, most, pick in judged:
        found += _ratio_targets(f"{name} {_AT}", most, pick(whole), [pick(one) for one in by_mix])
    return found


def _ratio_targets(name: str, most: float, every: Stat, by_mix: Sequence[Stat]) -> list[Target]:
    """Over all runs, and of the worst mix. What could not be measured because nothing survived is
    not met, and its value is 0."""
    limit = f"<= {most:g}"
    medians = [one["median"] for one in by_mix if one is not None]
    lost = len(by_mix) - len(medians)
    if lost:
        name += f" ({lost} of {len(by_mix)} mixes without one)"
    worst = max(medians, default=0.0)
    middle = every["median"] if every else 0.0
    return [
        Target(name, middle, "x", limit, not lost and middle <= most),
        Target(f"{name}, worst mix", worst, "x", limit, not lost and worst <= most),
    ]


_COLUMNS = (
    "mix",
    "ratio",
    "strategy",
    "calls",
    "sessions",
    "important",
    "slowdown",
    "p50",
    "p95",
    "p99",
    "makespan",
    "pool use",
)


def _ratio(value: Stat) -> str:
    if value is None:
        return "-"
    text = f"{value['median']:.2f}"
    if value["n"] > 1:
        text += f" ({value['min']:.2f}-{value['max']:.2f})"
    return text


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    mean, peak = row["pool_use_mean"], row["pool_use_peak"]
    return (
        str(row["mix"]) if "mix" in row else f"{row['mixes']} mixes",
        f"{row['ratio']:g}",
        row["strategy"],
        f"{row['calls_finished']}/{row['calls']}",
        f"{row['sessions_finished']}/{row['sessions']}",
        f"{row['important_finished']}/{row['runs']}",
        _ratio(row["slowdown"]),
        *(_ratio(row["latency"][name]) for name in QUANTILES),
        _ratio(row["makespan"]),
        f"{mean['median']:.0%}, most {peak['max']:.0%}",
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `cells` or `totals`: survivors of all; the rest as ratios, median (min-max)."""
    return "\n".join(tables.table(_COLUMNS, [_cells(row) for row in rows]))
