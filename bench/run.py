"""`make bench BENCH=name`: run a benchmark where it can run.

One that needs cgroup controllers runs in the test guest on a host that has none of them; the others
run on the host, at full speed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.guest.where import decide

ANYWHERE = frozenset(
    {
        "calls",
        "boundaries",
        "misplaced",
        "sealed",
        "overhead",
        "learning",
        "density",
        "isolation",
        "gpu",
        "cpu",
        "hostile",
        "scale",
        "soak",
        "history",
        "containers",
        "traffic",
    }
)
"""Benchmarks that any cgroup2 mount will do for, or that start the guest for a part themselves."""
GUEST_OPTIONS = ("--memory", "2048", "--timeout", "1800")


def names() -> list[str]:
    """Every folder that holds a benchmark."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/benchmark.py"))


def main() -> int:
    """Replace this process by the benchmark, or by the guest with the benchmark in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=names(), help="which benchmark")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    chosen = parser.parse_args()
    command = [sys.executable, "-m", f"bench.{chosen.name}.benchmark", *chosen.arguments]
    forced = os.environ.get("AGENTCG_WHERE", "")
    where = decide()
    if where.kind == "guest" and (forced == "guest" or chosen.name not in ANYWHERE):
        command = [sys.executable, "-m", "tests.guest.vm", *GUEST_OPTIONS, "--", *command]
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
