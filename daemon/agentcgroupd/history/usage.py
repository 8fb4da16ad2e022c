"""Sums over ended calls by day, session, tool and labels of the session, which outlive the calls
themselves."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.schema import USAGE_MORE

DAY_USEC = 86_400_000_000
TOOLS_MOST = 50
"""So many tools of a session and day have sums of their own: their names are the agent's choice."""
OTHERS = "others"
ROWS_MAX = 500

Sums = Mapping[str, float | None]

_ADD = """
UPDATE usage SET calls = calls + :calls, calls_not_ok = calls_not_ok + :calls_not_ok,
  wall_usec = wall_usec + :wall_usec, waited_usec = waited_usec + :waited_usec,
  frozen_usec = frozen_usec + :frozen_usec, cpu_usage_usec = cpu_usage_usec + :cpu_usage_usec,
  memory_byte_seconds = coalesce(memory_byte_seconds + :held, memory_byte_seconds, :held),
  {more}
WHERE day = :day AND name = :name AND tool = :tool AND labels = :labels
""".format(more=", ".join(f"{c} = coalesce({c} + :{c}, {c}, :{c})" for c in USAGE_MORE))
_KEYS = {
    pb.USAGE_BY_SESSION: "name",
    pb.USAGE_BY_TOOL: "tool",
    pb.USAGE_BY_DAY: "day",
    pb.USAGE_BY_LABEL: "labels",
}


def day_of(unix_usec: int) -> int:
    """Tell the day of a moment, since 1970 in UTC."""
    return unix_usec // DAY_USEC


def added(before: Sums | None, more: Sums) -> Sums:
    """Add up what calls took. Memory that was not measured is absent; of peaks the largest
    counts."""
    if before is None:
        return more
    total: dict[str, float | None] = {}
    for name, value in more.items():
        other = before[name]
        if value is None or other is None:
            total[name] = other if value is None else value
        else:
            total[name] = max(value, other) if name == "peak" else value + other
    return total


def text_of(labels: Mapping[str, str]) -> str:
    """Write labels as sums have them: a line each, as key=value, sorted. Neither has a line's end
    in it, and no key an equals sign (units.parse_labels)."""
    return "\n".join(f"{key}={value}" for key, value in sorted(labels.items()))


def add_usage(
    db: sqlite3.Connection, day: int, session: str, tool: str, labels: str, sums: Sums
) -> None:
    """Add what calls took to the sums of their day, their session's name and labels (`text_of`) and
    their tool. Raises sqlite3.Error."""
    values = {**sums, "day": day, "name": session, "tool": tool, "labels": labels}
    if db.execute(_ADD, values).rowcount:
        return
    count = db.execute(
        "SELECT count(*) FROM usage WHERE day = :day AND name = :name AND labels = :labels", values
    ).fetchone()[0]
    if count >= TOOLS_MOST:
        values["tool"] = OTHERS
    db.execute(
        "INSERT OR IGNORE INTO usage (day, name, tool, labels) "
        "VALUES (:day, :name, :tool, :labels)",
        values,
    )
    db.execute(_ADD, values)


def drop_oldest(db: sqlite3.Connection, rows_most: int) -> bool:
    """Remove the sums of the oldest day where there are too many; returns whether that is to be
    done again. Raises sqlite3.Error."""
    if db.execute("SELECT count(*) FROM usage").fetchone()[0] <= rows_most:
        return False
    db.execute("DELETE FROM usage WHERE day = (SELECT min(day) FROM usage)")
    return True


_SUMMED = (
    *("calls", "calls_not_ok", "wall_usec", "waited_usec", "frozen_usec", "cpu_usage_usec"),
    *("memory_byte_seconds", *USAGE_MORE),
)
_SELECT = ", ".join(f"sum({name})" for name in _SUMMED)


def usages(
    db: sqlite3.Connection, by: pb.UsageBy.ValueType, session: str, since_usec: int, limit: int
) -> list[pb.Usages]:
    """Sums by session, tool, day or label (UsageBy), days in their order, newest first, else the
    largest use of CPU first. `session`: empty: of every name. Raises sqlite3.Error."""
    key = _KEYS.get(by, "name")
    found = {
        str(row[0]): dict(zip(_SUMMED, row[1:], strict=True))
        for row in db.execute(
            f"SELECT {key}, {_SELECT} FROM usage WHERE day >= ? AND (? = '' OR name = ?) "
            f"GROUP BY {key}",
            (since_usec // DAY_USEC, session, session),
        )
    }
    if by == pb.USAGE_BY_DAY:
        order = sorted(found, key=int, reverse=True)
    else:
        found = _by_label(found) if by == pb.USAGE_BY_LABEL else found
        order = sorted(found, key=lambda k: (-(found[k]["cpu_usage_usec"] or 0), k))
    return [
        pb.Usages(
            key=_day(int(name)) if by == pb.USAGE_BY_DAY else name,
            sums=pb.SessionSums(**_measured(found[name])),
        )
        for name in order[: min(limit, ROWS_MAX)]
    ]


def _by_label(by_labels: Mapping[str, Sums]) -> dict[str, dict[str, float | None]]:
    """Add up for each label what sessions that have it took; under "" what those without any
    took."""
    found: dict[str, Sums] = {}
    for labels, sums in by_labels.items():
        for label in labels.split("\n"):
            found[label] = added(found.get(label), sums)
    return {label: dict(sums) for label, sums in found.items()}


def _measured(sums: Sums) -> dict[str, Any]:
    """Give the sums that were measured, as the fields of SessionSums have them."""
    known = {name: value for name, value in sums.items() if value is not None}
    return {n: v if n.endswith("_seconds") else int(v) for n, v in known.items()}


def _day(number: int) -> str:
    return datetime.fromtimestamp(number * 86_400, UTC).strftime("%Y-%m-%d")
