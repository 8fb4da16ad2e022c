"""A picture of how agents fared by how they were placed. matplotlib comes with the extra `lab`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentcgroup_lab.cluster.run import Cluster, Outcome

_COLOURS = {
    ("requests", False): "#0f766e",
    ("packing", False): "#475569",
    ("packing", True): "#94a3b8",
    ("headroom", True): "#c2410c",
}
_TITLES = {
    ("requests", False): "peaks requested",
    ("packing", False): "packed by means",
    ("packing", True): "packed by means,\nwith the daemon",
    ("headroom", True): "by headroom,\nwith the daemon",
}


def save(outcomes: Sequence[Outcome], cluster: Cluster, path: Path) -> None:
    """Draw outcomes into a file, whose form follows from its suffix."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "agentcgroup",
    }
    names = [_TITLES[o.placing, o.daemon] for o in outcomes]
    colours = [_COLOURS[o.placing, o.daemon] for o in outcomes]
    with mpl.rc_context(style):
        figure = Figure(figsize=(14.0, 4.4), dpi=100)
        lines, killed, makespan, nodes = figure.subplots(
            1, 4, gridspec_kw={"width_ratios": [1.6, 1, 1, 1]}
        )
        for outcome, colour, name in zip(outcomes, colours, names, strict=True):
            at = outcome.over_time["sessions"]
            hours = [minute / 60 for minute in range(len(at))]
            lines.plot(hours, at, color=colour, label=name.replace("\n", " "))
        lines.set_title("agents that run", loc="left", fontweight="bold")
        lines.set_xlabel("hours")
        lines.legend(frameon=False, fontsize=8)
        bars: tuple[tuple[Any, str, list[float]], ...] = (
            (killed, "calls killed", [float(o.calls_killed) for o in outcomes]),
            (makespan, "makespan (h)", [o.makespan_s / 3600 for o in outcomes]),
            (nodes, "node seconds per agent hour", [o.nodes_of_load for o in outcomes]),
        )
        for axes, title, values in bars:
            drawn = axes.bar(range(len(values)), values, color=colours)
            axes.bar_label(drawn, fmt="{:,.4g}", fontsize=8)
            axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
            axes.set_xticks(range(len(values)), names, fontsize=7, rotation=20)
        figure.suptitle(
            f"{cluster.sessions:,} recorded agents on {cluster.nodes} nodes of "
            f"{cluster.node_bytes / (1 << 30):.0f} GiB, simulated",
            fontsize=10,
            x=0.01,
            ha="left",
        )
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata)
