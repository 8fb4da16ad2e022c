"""A picture of a sweep: what survives, how late it is and how full the pool gets, against the
number of sessions. matplotlib comes with the extra `lab` and is imported only here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentcgroup_lab.simulate.plans import Profile
from agentcgroup_lab.simulate.run import Result, reserved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"ours": "#c2410c", "none": "#475569", "static": "#94a3b8", "reserve": "#0f766e"}
_TITLES = {
    "ours": "agentcgroup",
    "none": "no control",
    "static": "static split",
    "reserve": "peaks reserved",
}
_DELAY_MOST = 3.0
"""Later is as bad."""

_Line = Callable[[Result], float]
_PANELS: tuple[tuple[str, _Line, _Line | None], ...] = (
    ("calls that survive (%)", lambda r: 100 * r.calls_survived, None),
    (
        "time over undisturbed",
        lambda r: min(_DELAY_MOST, r.important.p95),
        lambda r: min(_DELAY_MOST, r.everyone.p95),
    ),
    ("pool used (%)", lambda r: 100 * r.use_mean, lambda r: 100 * r.use_p95),
)


def draw(results: Sequence[Result], profiles: Sequence[Profile]) -> Figure:
    """Draw the picture of at least one result."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#e5e7eb",
        "svg.hashsalt": "agentcgroup",
    }
    pool = results[0].pool_bytes
    fit = max(1, reserved(pool, profiles))
    with mpl.rc_context(style):
        figure = Figure(figsize=(14.0, 4.6), dpi=100)
        panels = figure.subplots(1, len(_PANELS))
        for axes, (title, solid, dashed) in zip(panels, _PANELS, strict=True):
            for strategy in dict.fromkeys(result.strategy for result in results):
                own = [result for result in results if result.strategy == strategy]
                own.sort(key=lambda result: result.sessions)
                x = [result.sessions for result in own]
                colour = _COLOURS[strategy]
                y, name = [solid(r) for r in own], _TITLES[strategy]
                axes.plot(x, y, color=colour, marker="o", markersize=4, label=name)
                if dashed is not None:
                    axes.plot(x, [dashed(r) for r in own], color=colour, linestyle="--", alpha=0.6)
            axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
            axes.set_xlabel("sessions")
            axes.secondary_xaxis("top", functions=(lambda n: n / fit, lambda k: k * fit))
        panels[0].legend(frameon=False)
        figure.suptitle(
            f"Recorded agents on a pool of {pool / 1e9:.0f} GB, simulated. Above: times the number "
            f"that reserving peaks allows ({fit}). Delay: important, p95 (dashed: everyone's); "
            "use: mean (dashed: p95)",
            fontsize=10,
            x=0.01,
            ha="left",
        )
        figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def save(results: Sequence[Result], profiles: Sequence[Profile], paths: Sequence[Path]) -> None:
    """Draw into each path; the format follows from its suffix (.png, .svg)."""
    import matplotlib as mpl

    figure = draw(results, profiles)
    with mpl.rc_context({"svg.hashsalt": "agentcgroup"}):
        for path in paths:
            figure.savefig(
                path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None
            )
