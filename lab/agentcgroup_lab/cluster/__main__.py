"""Recorded agents on many nodes, placed in three ways: python -m agentcgroup_lab.cluster"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from agentcgroup import tables
from agentcgroup_lab.cluster.plot import save
from agentcgroup_lab.cluster.run import Cluster, Outcome, simulate
from agentcgroup_lab.cluster.workload import kinds_of
from agentcgroup_lab.simulate.plans import find_recordings, load_profiles
from agentcgroup_lab.trace.format import TraceError
from agentcgroup_lab.trace.plan import Options
from agentcgroupd.errors import AgentcgroupdError
from agentcgroupd.units import parse_bytes

WAYS = (
    ("requests", False),
    ("packing", False),
    ("packing", True),
    ("headroom", True),
)
"""How agents are placed, and whether nodes have the daemon."""
HEADERS = ["PLACED BY", "DAEMON", ">KILLED", ">LOST", ">MAKESPAN", ">WAITED", ">SLOWER"]
HEADERS += [">NODES", ">NODE-S/H", ">USE", ">AGENTS"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m agentcgroup_lab.cluster", description=__doc__)
    add = parser.add_argument
    add("--trace", type=Path, action="append", required=True, help="a recording or a folder")
    add("--nodes", type=int, default=10)
    add("--memory", default="32G", help="of a node (default %(default)s)")
    add("--sessions", type=int, default=1000)
    add("--arrive", type=int, default=3600, metavar="SEC", help="agents come over this time")
    add("--seed", type=int, default=1)
    add("--out", type=Path, help="a picture")
    add("--json", action="store_true")
    given = parser.parse_args(argv)
    try:
        profiles = load_profiles(find_recordings(given.trace), Options())
        node_bytes = float(parse_bytes("--memory", given.memory))
    except (AgentcgroupdError, TraceError, OSError, ValueError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    cluster = Cluster(given.nodes, node_bytes, given.sessions, given.arrive, given.seed)
    kinds = kinds_of(profiles)
    try:
        outcomes = [simulate(kinds, cluster, placing, daemon) for placing, daemon in WAYS]
    except RuntimeError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    if given.out is not None:
        save(outcomes, cluster, given.out)
    if given.json:
        print(json.dumps([outcome.to_json() for outcome in outcomes], indent=1))
    else:
        for line in tables.table(HEADERS, [_row(outcome) for outcome in outcomes]):
            print(line)
    return 0


def _row(outcome: Outcome) -> list[str]:
    return [
        outcome.placing,
        "yes" if outcome.daemon else "no",
        str(outcome.calls_killed),
        str(outcome.agents_lost),
        f"{outcome.makespan_s / 3600:.2f} h",
        f"{outcome.waited_mean_s / 60:.1f} min",
        f"{outcome.slower:.3f}",
        f"{outcome.nodes_mean:.1f}",
        f"{outcome.nodes_of_load:.1f}",
        f"{100 * outcome.use_mean:.0f} %",
        str(outcome.agents_on_node_most),
    ]


if __name__ == "__main__":
    sys.exit(main())
