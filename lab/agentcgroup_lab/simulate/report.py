"""Results of simulations as a table."""

from __future__ import annotations

from collections.abc import Sequence

from agentcgroup import tables
from agentcgroup_lab.simulate.plans import Profile
from agentcgroup_lab.simulate.run import Result, reserved

_COLUMNS = (
    "strategy",
    ">sessions",
    ">x peak",
    ">calls",
    ">killed",
    ">denied",
    ">agents lost",
    ">important",
    ">everyone",
    ">use",
    ">paused",
    "done",
)
_LEGEND = (
    "important, everyone: time taken over undisturbed, median and most; "
    "use: mean and p95 of the pool; x peak: over reserving everyone's peak"
)


def density(result: Result, profiles: Sequence[Profile]) -> float:
    """Sessions over the number that reserving everyone's peak would allow."""
    return result.sessions / max(1, reserved(result.pool_bytes, profiles))


def _row(result: Result, profiles: Sequence[Profile]) -> tuple[str, ...]:
    done = " ".join(f"{name} {count}" for name, count in result.actions.items())
    return (
        result.strategy,
        str(result.sessions),
        f"{density(result, profiles):.1f}",
        str(result.calls_finished),
        str(result.calls_killed + result.calls_oom),
        str(result.calls_denied),
        str(result.sessions_lost),
        f"{result.important.p50:.3f} {result.important.most:.3f}",
        f"{result.everyone.p50:.3f} {result.everyone.most:.3f}",
        f"{result.use_mean:.0%} {result.use_p95:.0%}",
        f"{result.paused_share:.2%}",
        done or "-",
    )


def table(results: Sequence[Result], profiles: Sequence[Profile]) -> str:
    """Make a table with a line for each result, and a legend."""
    rows = [_row(result, profiles) for result in results]
    return "\n".join([*tables.table(_COLUMNS, rows, rule=True), _LEGEND])
