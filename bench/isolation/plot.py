"""Pictures of the benchmark `isolation`, from what it wrote: python -m bench.isolation.plot

One with survival, slowdown, allocation latency and makespan over the ratio of demand to pool; and,
by the replay's own means, memory over time for the runs that were kept whole.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "none": ("no control", "#64748b", "o"),
    "static": ("static split", "#a16207", "s"),
    "high": ("memory.high only", "#0e7490", "^"),
    "oomd": ("oomd", "#7c3aed", "D"),
    "ours": ("agentcgroup", "#c2410c", "*"),
}
_LINES: Any = {"linewidth": 1.6, "elinewidth": 0.9, "capsize": 2}
_WIDTH_IN, _HEIGHT_IN, _DPI = 13.0, 8.6, 100

Pick = Callable[[Mapping[str, Any]], "tuple[float, float, float] | None"]


def _share(what: str) -> Pick:
    def pick(row: Mapping[str, Any]) -> tuple[float, float, float]:
        value = 100.0 * row[f"{what}_finished"] / row[what]
        return value, value, value

    return pick


def _stat(*path: str) -> Pick:
    def pick(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
        value: Any = row
        for name in path:
            value = value[name]
        return None if value is None else (value["median"], value["min"], value["max"])

    return pick


PANELS: tuple[tuple[str, str, Pick, float | None], ...] = (
    ("calls that survive", "%", _share("calls"), 100.0),
    ("sessions that survive", "%", _share("sessions"), 100.0),
    ("important session: time / alone", "x", _stat("slowdown"), 1.05),
    ("its p95 allocation latency / alone", "x", _stat("latency", "p95"), 1.2),
    ("makespan / best order, where all survived", "x", _stat("makespan"), 1.25),
    ("pool use, mean", "share", _stat("pool_use_mean"), None),
)


def _panel(axes: Axes, rows: list[dict[str, Any]], title: str, unit: str, pick: Pick) -> None:
    names = [name for name in STYLES if any(row["strategy"] == name for row in rows)]
    for number, name in enumerate(names):
        label, colour, marker = STYLES[name]
        points = [
            (row["ratio"] + 0.025 * (number - len(names) / 2), value)
            for row in rows
            if row["strategy"] == name and (value := pick(row)) is not None
        ]
        if not points:
            continue
        at = [ratio for ratio, _ in points]
        medians = [value[0] for _, value in points]
        below = [value[0] - value[1] for _, value in points]
        above = [value[2] - value[0] for _, value in points]
        style: Any = {"marker": marker, "markersize": 11 if marker == "*" else 6, "color": colour}
        axes.errorbar(at, medians, yerr=(below, above), label=label, **style, **_LINES)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(unit)
    axes.set_xlabel("demand / pool")
    ratios = sorted({row["ratio"] for row in rows})
    axes.set_xlim(ratios[0] - 0.2, ratios[-1] + 0.2)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])


def draw(document: Mapping[str, Any]) -> Figure:
    """The picture of a written result."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e5e7eb",
        "svg.hashsalt": "agentcgroup",
    }
    rows = list(document["totals"])
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), dpi=_DPI)
        grid = figure.subplots(2, 3)
        for axes, (title, unit, pick, target) in zip(grid.flat, PANELS, strict=True):
            _panel(axes, rows, title, unit, pick)
            if target is not None:
                axes.axhline(target, color="#111827", linewidth=1.0, linestyle=(0, (4, 3)))
            if unit == "x" and axes.get_ylim()[1] > 4:
                axes.set_yscale("log")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(0.01, 0.955),
            ncols=len(handles),
            frameon=False,
        )
        figure.suptitle(
            "The same recorded agents on ever smaller pools",
            x=0.012,
            y=0.985,
            ha="left",
            fontsize=14,
            fontweight="bold",
        )
        figure.text(
            0.988,
            0.008,
            f"{len(document['mixes'])} mixes of recordings; median and spread; dashed: target; "
            f"{document['where']}, Linux {document['kernel']}, no swap",
            ha="right",
            fontsize=8.5,
            color="#6b7280",
        )
        figure.tight_layout(rect=(0, 0.02, 1, 0.92))
    return figure


def draw_all(directory: Path = RESULTS) -> list[Path]:
    """Draw all that the written results hold; returns the pictures' paths."""
    import matplotlib as mpl

    from agentcgroup_lab.replay import plot, result

    document = json.loads((directory / "isolation.json").read_text(encoding="utf-8"))
    pictures = [directory / "isolation.png", directory / "isolation.svg"]
    figure = draw(document)
    with mpl.rc_context({"svg.hashsalt": "agentcgroup"}):
        for path in pictures:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=_DPI, metadata=metadata)
    for found in sorted((directory / "isolation").glob("mix*.json")):
        picture = found.with_suffix(".png")
        plot.save(result.read(found), [picture])
        pictures.append(picture)
    return pictures


def main() -> int:
    """Draw and print what was drawn."""
    for picture in draw_all():
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
