"""A picture of the benchmark `gpu`, from what it wrote: python -m bench.gpu.plot [JSON [PICTURE]]

What each tenant was granted, and what it got by the driver's own time slices, by turns and by MPS;
and how long it took to take the GPU back for an important call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WAYS = {
    "wanted": ("granted", "#cbd5e1"),
    "sliced": ("the driver's time slices", "#64748b"),
    "turns": ("agentcgroup, turns", "#c2410c"),
    "mps": ("agentcgroup, MPS", "#0e7490"),
}
_WIDTH_IN, _HEIGHT_IN, _DPI = 13.0, 4.6, 100
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
}


def got(row: Mapping[str, Any]) -> list[float]:
    """Percent by tenant; the windows' medians where a result has no more than windows."""
    if "got_percent" in row:
        return [float(g) for g in row["got_percent"]]
    return [float(window["p50"]) for window in row["share_percent"]]


def bars(document: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Tenant set -> way -> percent by tenant; only what was measured."""
    found: dict[str, dict[str, list[float]]] = {}
    for way in ("turns", "mps"):
        for name, row in (document.get(way) or {}).items():
            entry = found.setdefault(name, {"wanted": [float(w) for w in row["wanted"]]})
            entry[way] = got(row)
    sliced = document.get("sliced") or {}
    for entry in found.values():
        same = sliced.get(str(len(entry["wanted"])))
        if same:
            entry["sliced"] = got(same)
    return found


def _shares(axes: Axes, name: str, entry: Mapping[str, list[float]]) -> None:
    ways = [way for way in WAYS if way in entry]
    width = 0.84 / len(ways)
    for number, way in enumerate(ways):
        label, color = WAYS[way]
        left = [i - 0.42 + width * (number + 0.5) for i in range(len(entry[way]))]
        drawn = axes.bar(left, entry[way], width * 0.92, label=label, color=color)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(entry["wanted"])), [f"{w:.0f} %" for w in entry["wanted"]])
    axes.set_title(f"shares {name}, percent of all work", loc="left", fontsize=10)
    axes.set_ylim(0, 85)


def _taken_back(axes: Axes, times_ms: list[float]) -> None:
    ordered = sorted(times_ms)
    parts = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
    axes.step(ordered, parts, where="post", color=WAYS["turns"][1], linewidth=2)
    axes.axvline(2.0, color="#111827", linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_xlim(0.05, 200)
    axes.set_ylim(0, 101)
    axes.set_title(f"taken back, {len(ordered)} bursts: % by ms", loc="left", fontsize=10)


def draw(document: Mapping[str, Any]) -> Figure:
    """The picture of a written result."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    sets = bars(document)
    # At a time of 0 the others were stopped already: nothing was taken back.
    times = [t for t in (document.get("taken_back") or {}).get("all_ms", ()) if t > 0]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), dpi=_DPI)
        grid = figure.subplots(1, max(1, len(sets) + bool(times)), squeeze=False)[0]
        for axes, (name, entry) in zip(grid, sets.items(), strict=False):
            _shares(axes, name, entry)
        if times:
            _taken_back(grid[-1], times)
        by_label = {
            label: handle
            for axes in grid
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            by_label.values(),
            by_label,
            loc="upper left",
            frameon=False,
            bbox_to_anchor=(0.005, 0.94),
            ncols=max(1, len(by_label)),
        )
        title = "One GPU, several tenants that all have work"
        figure.suptitle(title, x=0.012, y=0.985, ha="left", fontsize=14, fontweight="bold")
        note = f"Linux {document['kernel']}; dashed: target"
        figure.text(0.99, 0.01, note, ha="right", fontsize=8.5, color="#6b7280")
        figure.tight_layout(rect=(0, 0.03, 1, 0.87))
    return figure


def main() -> int:
    """Draw, and print what was drawn."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "gpu.json"
    picture = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    draw(json.loads(source.read_text(encoding="utf-8"))).savefig(picture, dpi=_DPI)
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
