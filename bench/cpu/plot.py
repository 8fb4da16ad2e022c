"""Picture of the benchmark `cpu`, from what it wrote: python -m bench.cpu.plot"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report import RESULTS

COLORS = {"plain": "#cbd5e1", "eevdf": "#64748b", "flatcg": "#0e7490", "ours": "#c2410c"}
LABELS = {
    "plain": "EEVDF, no\nweights",
    "eevdf": "EEVDF",
    "flatcg": "scx_flatcg",
    "ours": "agentcgroup",
}
PANELS = (
    ("late_p99_ms", "important call: wake-up latency p99, ms", None),
    ("share_error_points", "shares by weight: off by, points", 2.0),
    ("max_error_percent", "cpu.max: off by, percent", 2.0),
)


def draw(document: Mapping[str, Any]) -> Path | None:
    """The medians as bars, with least and most; None where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 4), layout="constrained")
    for axis, (field, title, target) in zip(axes, PANELS, strict=True):
        for i, (name, row) in enumerate(document["schedulers"].items()):
            if field not in row:
                continue
            found = row[field]
            error = [[found["median"] - found["min"]], [found["max"] - found["median"]]]
            axis.bar(i, found["median"], color=COLORS[name], yerr=error, capsize=4)
        names = [LABELS[name] for name in document["schedulers"]]
        axis.set_xticks(range(len(names)), names)
        axis.set_title(title, fontsize=10)
        if field == "max_error_percent" and "flatcg" in document["schedulers"]:
            axis.set_yscale("log")  # scx_flatcg ignores cpu.max, and would flatten the others
        if target is not None:
            axis.axhline(target, color="#334155", linestyle="--", linewidth=1)
    figure.suptitle(f"{document['where']}, {document['kernel']}, n = {document['n']}", fontsize=9)
    for suffix in ("svg", "png"):
        figure.savefig(RESULTS / f"cpu.{suffix}", dpi=100)
    pyplot.close(figure)
    return RESULTS / "cpu.png"


def main() -> int:
    """Draw build/bench/cpu.json."""
    path = draw(json.loads((RESULTS / "cpu.json").read_text()))
    print(f"drawn: {path}" if path else "matplotlib is not installed")
    return 0 if path else 1


if __name__ == "__main__":
    sys.exit(main())
