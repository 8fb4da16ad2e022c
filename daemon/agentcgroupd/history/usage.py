"""Sums over ended calls by day, session and tool, which outlive the calls themselves."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
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
WHERE day = :day AND name = :name AND tool = :tool
""".format(more=", ".join(f"{c} = coalesce({c} + :{c}, {c}, :{c})" for c in USAGE_MORE))
_KEYS = {
    pb.USAGE_BY_SESSION: "name",
    pb.USAGE_BY_TOOL: "tool",
    pb.USAGE_BY_DAY: "day",
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


def add_usage(db: sqlite3.Connection, day: int, session: str, tool: str, sums: Sums) -> None:
    """Add what calls took to the sums of their day, their session's name and their tool. Raises
    sqlite3.Error."""
    values = {**sums, "day": day, "name": session, "tool": tool}
    if db.execute(_ADD, values).rowcount:
        return
    count = db.execute(
        "SELECT count(*) FROM usage WHERE day = :day AND name = :name", values
    ).fetchone()[0]
    if count >= TOOLS_MOST:
        values["tool"] = OTHERS
    db.execute("INSERT OR IGNORE INTO usage (day, name, tool) VALUES (:day, :name, :tool)", values)
    db.execute(_ADD, values)


def drop_oldest(db: sqlite3.Connection, rows_most: int) -> bool:
    """Remove the sums of the oldest day where there are too many; returns whether that is to be
    done again. Raises sqlite3.Error."""
    if db.execute("SELECT count(*) FROM usage").fetchone()[0] <= rows_most:
        return False
    db.execute("DELETE FROM usage WHERE day = (SELECT min(day) FROM usage)")
    return True


def usages(
    db: sqlite3.Connection, by: pb.UsageBy.ValueType, session: str, since_usec: int, limit: int
) -> list[pb.Usages]:
    """Sums by session, tool or day (UsageBy), days in their order, newest first, else the largest
    use of CPU first. `session`: empty: of every name. Raises sqlite3.Error."""
    key = _KEYS.get(by, "name")
    order = "day DESC" if key == "day" else "6 DESC, 1"
    more = "".join(f", sum({name})" for name in USAGE_MORE)
    found = db.execute(
        f"SELECT {key}, sum(calls), sum(calls_not_ok), sum(wall_usec), sum(waited_usec), "
        f"sum(cpu_usage_usec), sum(frozen_usec), sum(memory_byte_seconds){more} FROM usage "
        f"WHERE day >= ? AND (? = '' OR name = ?) GROUP BY {key} ORDER BY {order} LIMIT ?",
        (since_usec // DAY_USEC, session, session, min(limit, ROWS_MAX)),
    )
    return [
        pb.Usages(
            key=_day(row[0]) if key == "day" else row[0],
            sums=pb.SessionSums(
                calls=row[1],
                calls_not_ok=row[2],
                wall_usec=row[3],
                waited_usec=row[4],
                cpu_usage_usec=row[5],
                frozen_usec=row[6],
                memory_byte_seconds=row[7],
                **_more(row[8:]),
            ),
        )
        for row in found
    ]


def _more(values: Sequence[float | None]) -> dict[str, Any]:
    """Give the sums of USAGE_MORE that were measured, as the fields of SessionSums have them."""
    known = zip(USAGE_MORE, values, strict=True)
    found = {name: value for name, value in known if value is not None}
    return {n: v if n.endswith("_seconds") else int(v) for n, v in found.items()}


def _day(number: int) -> str:
    return datetime.fromtimestamp(number * 86_400, UTC).strftime("%Y-%m-%d")
