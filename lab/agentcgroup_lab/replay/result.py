"""Results of a replay as plain values: written as JSON, read again by the plot and by
benchmarks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from agentcgroup import tables
from agentcgroup_lab.replay.progress import MIB

SCHEMA = "agentcgroup-replay/1"

Outcome = Literal["finished", "killed", "failed", "refused", "not run"]
SessionState = Literal["finished", "lost", "timed out"]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time, seconds since the strategy's start."""

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class CallResult:
    """A planned call and what became of it. Times are seconds since the strategy's start."""

    index: int
    tool: str
    outcome: Outcome
    planned_s: float
    planned_peak_bytes: int
    began_s: float | None = None
    ended_s: float | None = None
    exit_code: int | None = None
    term_signal: int | None = None
    verdict: str | None = None
    sentence: str | None = None
    frozen: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Latency:
    """Times that single allocations took, over all calls of a session."""

    n: int
    p50_usec: float
    p95_usec: float
    p99_usec: float
    max_usec: float


@dataclass(frozen=True, slots=True)
class SessionResult:
    """A session under a strategy."""

    id: str
    recording: str
    important: bool
    state: SessionState
    began_s: float
    ended_s: float
    planned_s: float
    planned_peak_bytes: int
    peak_bytes: int | None
    oom_kills: int | None
    """None: its cgroup was gone before they were read."""
    calls: tuple[CallResult, ...]
    alloc_latency: Latency | None = None

    def count(self, outcome: Outcome) -> int:
        """Number of calls with this outcome."""
        return sum(call.outcome == outcome for call in self.calls)

    @property
    def seconds(self) -> float:
        """Seconds from the session's start to its end."""
        return self.ended_s - self.began_s


@dataclass(frozen=True, slots=True)
class Timeline:
    """memory.current over time. `sessions_bytes`: by session id, as long as `at_s`; None where the
    session's cgroup was gone."""

    at_s: tuple[float, ...]
    pool_bytes: tuple[int, ...]
    sessions_bytes: Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """A strategy's run of all sessions."""

    strategy: str
    limit_bytes: int
    seconds: float
    sessions: tuple[SessionResult, ...]
    timeline: Timeline
    leaks: tuple[str, ...]
    notes: tuple[str, ...] = ()
    met: Mapping[str, str] = field(default_factory=dict)
    """What became of each session's call that was to hold its peak with the others'."""
    meeting_waited_s: float = 0.0
    """How long the leader held its peak for others that came late, beyond what was planned: no
    strategy's doing, but the machine's."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Several strategies on the same input, where they ran, and the rules that set the numbers."""

    kernel: str
    where: str
    memory_scale: float
    speed: float
    strategies: tuple[StrategyResult, ...]
    rules: Mapping[str, str] = field(default_factory=dict)
    alone: StrategyResult | None = None
    """The important session without the others, without control, at the same time as `ours`."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain values, with the schema's name."""
        return {"schema": SCHEMA, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")
        partial.replace(path)


def _call(value: Mapping[str, Any]) -> CallResult:
    frozen = tuple(Span(**span) for span in value["frozen"])
    return CallResult(**{**value, "frozen": frozen})


def _session(value: Mapping[str, Any]) -> SessionResult:
    latency = value["alloc_latency"]
    return SessionResult(
        **{
            **value,
            "calls": tuple(_call(call) for call in value["calls"]),
            "alloc_latency": Latency(**latency) if latency else None,
        }
    )


def _strategy(value: Mapping[str, Any]) -> StrategyResult:
    timeline = value["timeline"]
    series = timeline["sessions_bytes"]
    return StrategyResult(
        **{
            **value,
            "sessions": tuple(_session(session) for session in value["sessions"]),
            "timeline": Timeline(
                tuple(timeline["at_s"]),
                tuple(timeline["pool_bytes"]),
                {name: tuple(values) for name, values in series.items()},
            ),
            "leaks": tuple(value["leaks"]),
            "notes": tuple(value["notes"]),
        }
    )


def read(path: Path) -> ReplayResult:
    """Read a result. Raises ValueError where it is not one, OSError as open does."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path}: not a replay result of schema {SCHEMA}")
    strategies = tuple(_strategy(strategy) for strategy in value["strategies"])
    alone = value.get("alone")
    alone = None if alone is None else _strategy(alone)
    return ReplayResult(**{**value, "strategies": strategies, "alone": alone})


_COLUMNS = (
    "strategy",
    "session",
    ">finished",
    ">killed",
    ">failed",
    ">not run",
    ">time",
    ">peak",
    "end",
)


def _row(result: StrategyResult, session: SessionResult) -> tuple[str, ...]:
    peak = "-" if session.peak_bytes is None else f"{session.peak_bytes / MIB:.0f} MiB"
    return (
        result.strategy if session is result.sessions[0] else "",
        session.id + (" *" if session.important else ""),
        f"{session.count('finished')}/{len(session.calls)}",
        str(session.count("killed")),
        str(session.count("failed") + session.count("refused")),
        str(session.count("not run")),
        f"{session.seconds:.1f} s",
        peak,
        session.state,
    )


def table(results: Sequence[StrategyResult]) -> str:
    """Make a table with a line per strategy and session, and one with the leaks of each
    strategy."""
    rows = [_row(result, session) for result in results for session in result.sessions]
    head, rule, *sessions = tables.table(_COLUMNS, rows, rule=True)
    lines = [head, rule]
    indent = " " * max(len(row[0]) for row in [_COLUMNS, *rows])
    for result in results:
        count = len(result.sessions)
        lines += sessions[:count]
        sessions = sessions[count:]
        leaks = f"cgroups leaked: {len(result.leaks)}; {result.seconds:.1f} s in all"
        lines.append(f"{indent}  {leaks}")
    return "\n".join([*lines, "* the important session"])
