"""The report that every benchmark prints and writes: build/bench/<name>.json, the same keys for
all."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agentcgroup import tables
from agentcgroupd.host.mounts import mounts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build/bench"


def recordings() -> Path:
    """The folder of recordings: $TRACES, else a larger collection beside the checkout where there
    is one, else the project's own."""
    known = os.environ.get("TRACES")
    if known:
        return Path(known)
    beside = ROOT.parent / "shared/traces"
    return beside if beside.is_dir() else ROOT / "bench/recordings"


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """A run directory for a daemon in memory, where a service has it: each call writes there.
    Raises SystemExit where there is no such file system."""
    in_memory = {mount.point for mount in mounts() if mount.kind == b"tmpfs"}
    places = [place for place in map(Path, ("/run", "/dev/shm")) if place in in_memory]
    if not places:
        raise SystemExit(
            "neither /run nor /dev/shm is a tmpfs: the run directory would be on a disk"
        )
    with tempfile.TemporaryDirectory(prefix="agentcg-", dir=places[0]) as directory:
        yield Path(directory) / "run"


@dataclass(frozen=True, slots=True)
class Target:
    """A number with what it should be. `met` is decided by whoever measured it."""

    name: str
    value: float
    unit: str
    target: str
    met: bool


@dataclass(slots=True)
class BenchReport:
    """The result of a benchmark."""

    bench: str
    where: str
    n: int
    targets: list[Target]
    details: dict[str, Any] = field(default_factory=dict)

    def write(self) -> Path:
        """Write the file; returns its path."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.bench}.json"
        document = {
            "bench": self.bench,
            "where": self.where,
            "kernel": os.uname().release,
            "cpus": os.cpu_count(),
            "n": self.n,
            "targets": [asdict(t) for t in self.targets],
            **self.details,
        }
        path.write_text(json.dumps(document, indent=2) + "\n")
        return path

    def show(self) -> None:
        """Print the table of targets."""
        print(f"\n{self.bench}: {self.where}, kernel {os.uname().release}, n = {self.n}")
        rows = [
            ("", mark(t), t.name, f"{t.value:.3f} {t.unit:<5}", f"target {t.target}")
            for t in self.targets
        ]
        print("\n".join(tables.aligned(rows, right={3})))


def mark(target: Target) -> str:
    """The table's word for a target that was met, or was not."""
    return "met" if target.met else "MISSED"


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and p99."""
    return {
        "p50": statistics.median(values),
        "p99": quantile(values, 0.99),
        "min": min(values),
        "max": max(values),
    }
