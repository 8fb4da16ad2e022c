"""Metrics of sessions: sums by priority, and single sessions where they were asked for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import CgroupGone
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.session_metrics import OTHERS, SessionMetrics


class FakeCgroup:
    """Holds so much memory; None: it has gone."""

    def __init__(self, held: int | None) -> None:
        self._held = held

    def read_if(self, knob: object) -> int:
        if self._held is None:
            raise CgroupGone(OSError(), "/x", "memory.current")
        return self._held


def session(name: str, held: int | None, priority: int = 50, paused: int = 0) -> Any:
    calls = {str(n): SimpleNamespace(state=pb.CALL_STATE_FROZEN) for n in range(paused)}
    limits = SimpleNamespace(priority=priority, memory_max_bytes=None)
    return SimpleNamespace(id=name, cgroup=FakeCgroup(held), limits=limits, calls=calls)


def shown(metrics: Metrics, name: str) -> dict[str, float]:
    """Samples of a gauge by its only label."""
    return {
        next(iter(sample.labels.values())): sample.value
        for family in metrics.registry.collect()
        if family.name == f"agentcg_{name}"
        for sample in family.samples
    }


def show(metrics: SessionMetrics, *sessions: Any) -> None:
    for _ in metrics.show(sessions):
        pass


def test_sums_by_priority_leave_out_a_session_that_goes_meanwhile() -> None:
    metrics = Metrics()
    show(
        SessionMetrics(metrics, 0),
        session("a", 10, 80),
        session("b", 20, 20),
        session("c", 30, 20),
        session("gone", None, 20),
    )
    assert shown(metrics, "sessions_memory_bytes") == {"important": 10, "normal": 0, "batch": 50}
    assert shown(metrics, "sessions_open") == {"important": 1, "normal": 0, "batch": 2}
    assert shown(metrics, "session_memory_bytes") == {}, "not asked for"


def test_single_sessions_are_bounded_and_go_when_they_are_closed() -> None:
    metrics = Metrics()
    own = SessionMetrics(metrics, 2)
    a, b, c = session("a", 10, paused=1), session("b", 20), session("c", 30, paused=2)
    show(own, a, b, c)
    assert shown(metrics, "session_memory_bytes") == {"a": 10, "b": 20, OTHERS: 30}
    assert shown(metrics, "session_calls_paused") == {"a": 1, "b": 0, OTHERS: 2}
    assert math.isnan(shown(metrics, "session_memory_max_bytes")["a"])
    show(own, b, c)
    assert shown(metrics, "session_memory_bytes") == {"b": 20, "c": 30, OTHERS: 0}
