"""Metrics of sessions: by priority, and of as many single ones as the operator has asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.errors import KnobError
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.labels import PRIORITIES, priority_label
from agentcgroupd.telemetry.metrics import Metrics

OTHERS = "_others"
"""Stands for the sessions beyond the most; no session can be called so."""


class SessionMetrics:
    """Looks at all sessions now and then, a step each."""

    def __init__(self, metrics: Metrics, most: int) -> None:
        """`most`: sessions with series of their own, those opened first; 0: none has."""
        self._metrics, self._most = metrics, most
        self._of_sessions = (
            metrics.session_memory,
            metrics.session_memory_max,
            metrics.session_calls,
            metrics.session_paused,
        )
        self._shown: set[str] = set()

    def show(self, sessions: Sequence[Session]) -> Iterator[None]:
        """Read what sessions hold and set their metrics, one session a step. `sessions`: all that
        are open, the oldest first."""
        count, memory = Counter[str](), Counter[str]()
        own: list[tuple[Session, int | None]] = []
        others, others_held = list[Session](), 0
        for session in sessions:
            try:
                held = session.cgroup.read_if(knobs.MEMORY_CURRENT)
            except KnobError:  # gone, as a rule
                continue
            priority = priority_label(session.limits.priority)
            count[priority] += 1
            memory[priority] += held or 0
            if len(own) < self._most:
                own.append((session, held))
            else:
                others.append(session)
                others_held += held or 0
            yield
        for priority in PRIORITIES:
            self._metrics.sessions_open.labels(priority).set(count[priority])
            self._metrics.sessions_memory.labels(priority).set(memory[priority])
        if self._most:
            self._show_single(own, others, others_held)

    def _show_single(
        self, own: list[tuple[Session, int | None]], others: list[Session], others_held: int
    ) -> None:
        nan, now = float("nan"), {session.id for session, _ in own}
        for gone in self._shown - now:
            for gauge in self._of_sessions:
                gauge.remove(gone)
        for session, held in own:
            most = session.limits.memory_max_bytes
            self._set(session.id, nan if held is None else held, nan if most is None else most)
            self._set_calls(session.id, [session])
        self._set(OTHERS, others_held, nan)
        self._set_calls(OTHERS, others)
        self._shown = now

    def _set(self, name: str, held: float, most: float) -> None:
        self._metrics.session_memory.labels(name).set(held)
        self._metrics.session_memory_max.labels(name).set(most)

    def _set_calls(self, name: str, sessions: Sequence[Session]) -> None:
        calls = [call for session in sessions for call in session.calls.values()]
        paused = sum(call.state == pb.CALL_STATE_FROZEN for call in calls)
        self._metrics.session_calls.labels(name).set(len(calls))
        self._metrics.session_paused.labels(name).set(paused)
