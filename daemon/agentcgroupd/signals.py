"""Signals of the memory programs, and what the daemon does about each at once.

Also the keeper of what the programs know: an entry for the pool, each session, each agent leaf and
each call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import KnobError
from agentcgroupd.policy.actions import Actions
from agentcgroupd.policy.guard import Guard
from agentcgroupd.pool import Pool
from agentcgroupd.session import Call, Session
from agentcgroupd.units import show_bytes

log = logging.getLogger(__name__)

CONFIRM_USEC = 1_000_000
"""How long an urgent denial that the daemon agrees with goes on; then it is looked at anew."""


class Signals:
    """Turns events of memory.bpf.c into looks of the guard, feedback, metrics and audit entries."""

    def __init__(
        self,
        config: GuardConfig,
        memory: MemoryPrograms,
        pool: Pool,
        sessions: Callable[[], Iterable[Session]],
        actions: Actions,
    ) -> None:
        self._config = config
        self._memory = memory
        self._pool = pool
        self._sessions = sessions
        self._actions = actions
        self._metrics = actions.metrics
        self._audit = actions.audit
        self._guard: Guard | None = None
        self._of_cgroup: dict[int, Session | Call] = {}

    def start(self, guard: Guard | None) -> None:
        """Begin to listen. With a guard, the pool's mark is where it would act."""
        self._guard = guard
        if guard is not None:
            self._memory.set_mark(self._pool.cgroup.id, *guard.mark_bytes)
        self._memory.start(self._handle)

    # What is watched

    def watch_pool(self) -> None:
        """Know the pool. Raises BpfError."""
        self._memory.watch(self._pool.cgroup.id, abi.CgroupKind.POOL, None)

    def session_opened(self, session: Session) -> None:
        """Know its cgroup and its agent leaf; protect it if it is important. Raises BpfError."""
        above = None if session.adopted else self._pool.cgroup.id
        own, agent = session.cgroup.id, session.agent.id
        self._memory.watch(own, abi.CgroupKind.SESSION, above, session.limits.priority)
        self._memory.watch(agent, abi.CgroupKind.AGENT, own, session.limits.priority)
        config = self._config
        self._memory.set_rates(own, config.faults_per_s, config.refaults_per_s)
        self._of_cgroup[own] = session
        self._protect()

    def session_closed(self, session: Session) -> None:
        """No more. Raises BpfError."""
        self._of_cgroup.pop(session.cgroup.id, None)
        self._memory.forget(session.agent.id)
        self._memory.forget(session.cgroup.id)
        self._protect()

    def call_opened(self, call: Call) -> None:
        """Know its leaf. Raises BpfError."""
        self._memory.watch(call.cgroup.id, abi.CgroupKind.CALL, call.session.cgroup.id,
                           call.grant.priority)  # fmt: skip
        self._of_cgroup[call.cgroup.id] = call

    def call_closed(self, call: Call) -> None:
        """No more. Raises BpfError."""
        self._of_cgroup.pop(call.cgroup.id, None)
        self._memory.forget(call.cgroup.id)

    def _protect(self) -> None:
        important = [s for s in self._sessions()
                     if s.limits.priority >= self._config.protect_priority]  # fmt: skip
        important.sort(key=lambda s: -s.limits.priority)
        chosen = ((s.cgroup.id, s.limits.priority) for s in important)
        pool = self._pool.cgroup.id if self._guard is not None else None
        fitted = self._memory.protect(chosen, pool)
        if fitted < len(important):
            log.warning("%d sessions are important, %d fit into the kernel's table: the others "
                        "are not protected by it", len(important), fitted)  # fmt: skip

    # Signals

    def _handle(self, batch: list[AnyEvent]) -> None:
        for event in batch:
            match event:
                case abi.MarkEvent():
                    self._mark(event)
                case abi.HighEvent():
                    self._metrics.signals.labels("high").inc()
                case abi.RatesEvent():
                    self._rates(event)
                case abi.DeniedEvent():
                    self._denied(event)
                case abi.UrgentEvent():
                    self._urgent(event)

    def _mark(self, event: abi.MarkEvent) -> None:
        self._metrics.signals.labels("mark_above" if event.above else "mark_below").inc()
        if event.event.cgroup_id == self._pool.cgroup.id and self._guard is not None:
            self._guard.look_now()

    def _rates(self, event: abi.RatesEvent) -> None:
        session = self._of_cgroup.get(event.event.cgroup_id)
        if not isinstance(session, Session):
            return
        self._metrics.signals.labels("rates_above" if event.above else "rates_below").inc()
        self._audit.write("rates", session=session.id, above=bool(event.above),
                          faults_per_s=event.faults_per_s,
                          refaults_per_s=event.refaults_per_s)  # fmt: skip

    def _denied(self, event: abi.DeniedEvent) -> None:
        call = self._of_cgroup.get(event.event.cgroup_id)
        if not isinstance(call, Call):
            return
        self._metrics.signals.labels("denied_urgent" if event.urgent else "denied").inc()
        asked, held = show_bytes(event.request_bytes), show_bytes(event.usage_bytes)
        reason = (
            "a more important session was stalled for memory"
            if event.urgent
            else f"it is held at {show_bytes(event.mark_bytes)} for now"
        )
        why = f"A request for {asked} was refused (ENOMEM): the call has {held} and {reason}."
        self._audit.write("denied", session=call.session.id, call=call.id, pid=event.pid, why=why)
        numbers = {"request_bytes": float(event.request_bytes),
                   "usage_bytes": float(event.usage_bytes)}  # fmt: skip
        self._actions.tell(call.session, call.id, pb.Feedback(
            code=pb.FEEDBACK_CODE_GROWTH_DENIED, sentence=why, numbers=numbers,
        ))  # fmt: skip

    def _urgent(self, event: abi.UrgentEvent) -> None:
        """The program has acted already: agree for a while, or take it back."""
        session = self._of_cgroup.get(event.event.cgroup_id)
        try:
            agree = self._guard is None or self._guard.still_short()
        except KnobError as error:
            log.warning("the pool cannot be read: %s", error)
            agree = False
        if agree:
            self._memory.confirm_urgent(CONFIRM_USEC)
        else:
            self._memory.lift_urgent()
        self._metrics.signals.labels("urgent").inc()
        self._metrics.actions.labels("confirm_urgent" if agree else "lift_urgent").inc()
        self._audit.write("urgent", session=session.id if isinstance(session, Session) else "",
                          stalled_usec=event.stalled_ns // 1000, confirmed=agree)  # fmt: skip
        if agree and self._guard is not None:
            self._guard.look_now()
