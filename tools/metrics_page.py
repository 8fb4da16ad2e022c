"""Write docs/metrics.md, the reference of all metrics, from the code that makes them.

Run by hand after a change: `python -m tools.metrics_page`. A test fails when the page is not what
this would write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from prometheus_client import Metric

from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.units import show_bytes

PAGE = Path(__file__).parent.parent / "docs/metrics.md"
BEGIN = "<!-- table: written by tools.metrics_page -->"
END = "<!-- end of table -->"
VALUES_SHOWN = 12
_OTHERS = ("process_", "python_")


def families(metrics: Metrics) -> list[Metric]:
    """Give the project's own metrics, by name."""
    found = [f for f in metrics.registry.collect() if not f.name.startswith(_OTHERS)]
    return sorted(found, key=lambda family: family.name)


def full_name(family: Metric) -> str:
    """Give the name under which a metric is asked for: that of a counter ends in `_total`."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def table(metrics: Metrics) -> str:
    """Make the table of all metrics."""
    rows = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for family in families(metrics):
        name = full_name(family)
        labels = _labels(metrics.values[name])
        text = family.documentation + _buckets(family)
        rows.append(f"| `{name}` | {family.type} | {labels} | {text} |")
    return "\n".join(rows)


def _labels(labels: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"`{name}`{_values(values)}" for name, values in labels.items())


def _values(values: Sequence[str]) -> str:
    if not values:
        return ""
    more = f", and {len(values) - VALUES_SHOWN} more" if len(values) > VALUES_SHOWN else ""
    return ": " + ", ".join(values[:VALUES_SHOWN]) + more


def _buckets(family: Metric) -> str:
    bounds = [s.labels["le"] for s in family.samples if s.name.endswith("_bucket")]
    numbers = sorted({float(bound) for bound in bounds if bound != "+Inf"})
    if not numbers:
        return ""
    is_size = family.name.endswith("_bytes")
    first, last = (show_bytes(int(n)) if is_size else f"{n:g}" for n in (numbers[0], numbers[-1]))
    return f"; buckets from {first} to {last}"


def page(text: str, metrics: Metrics) -> str:
    """Put the table into the text of the page."""
    new = f"{BEGIN}\n{table(metrics)}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: new, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), Metrics()))
