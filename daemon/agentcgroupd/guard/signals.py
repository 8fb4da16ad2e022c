"""Signals of the memory programs, and what the daemon does about each at once.

Also the keeper of what the programs know: an entry for the pool, each session, each agent leaf and
each call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.bpf.plane import DataPlane
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import KnobError
from agentcgroupd.guard.loop import GuardLoop
from agentcgroupd.intents.grant import Grant
from agentcgroupd.policy.schema import Deny
from agentcgroupd.policy.snapshot import Signal, SignalKind
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import Call, Session
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.units import show_bytes

log = logging.getLogger(__name__)

DELAY_PERCENT = 20
"""Milliseconds that a charge waits for each percent above memory.high while an important session
stalls: the kernel's own cap of 2 s is reached at twice the high."""
BEATS = 4
"""The programs are told that often that the loop runs, in the time after which they are alone."""
CONFIRM_USEC = 1_000_000
"""How long an urgent denial that the daemon agrees with goes on; then it is judged anew."""


class Signals:
    """Turns events of memory.bpf.c into decisions of the guard, feedback, metrics and audit
    entries."""

    def __init__(
        self,
        config: GuardConfig,
        plane: DataPlane,
        memory: MemoryPrograms,
        pool: Pool,
        sessions: Callable[[], Iterable[Session]],
        notices: Notices,
    ) -> None:
        self._config = config
        self._plane = plane
        self._memory = memory
        self._lost: dict[str, int] = {}
        self._calm_timer: asyncio.TimerHandle | None = None
        self._beat_timer: asyncio.TimerHandle | None = None
        self._pool = pool
        self._sessions = sessions
        self._notices = notices
        self._metrics = notices.metrics
        self._audit = notices.audit
        self._guard: GuardLoop | None = None
        self._of_cgroup: dict[int, Session | Call] = {}

    def start(self, guard: GuardLoop | None) -> None:
        """Listen from now on; `guard` is told what concerns it. Raises BpfError."""
        self._guard = guard
        if guard is not None:
            self._protect()
        self._memory.start(self._handle)
        self._plane.attempt("what has ended is still watched", self._memory.forget_others)
        self._loop = asyncio.get_running_loop()
        self._beat()

    def close(self) -> None:
        """Tell the programs nothing any more."""
        if self._beat_timer is not None:
            self._beat_timer.cancel()

    def _beat(self) -> None:
        self._memory.beat()
        self._beat_timer = self._loop.call_later(self._config.alone_after / BEATS / 1e6, self._beat)

    # What is watched

    def watch_pool(self) -> None:
        """Make the pool known to the programs. Raises BpfError."""
        pool, reclaim = self._pool.cgroup, self._plane.reclaim
        self._memory.watch(pool.id, abi.CgroupKind.POOL, None)
        if reclaim is not None:
            what = "the pool's reclaim cannot be hooked"
            self._plane.attempt(what, reclaim.attach, pool.dir_fd)

    def session_opened(self, session: Session) -> None:
        """Make a session's cgroup and agent leaf known to the programs, and have them protect it if
        it is important. Raises BpfError."""
        above = None if session.adopted else self._pool.cgroup.id
        own, agent = session.cgroup.id, session.agent.id
        self._memory.watch(own, abi.CgroupKind.SESSION, above, session.limits.priority)
        self._memory.watch(agent, abi.CgroupKind.AGENT, own, session.limits.priority)
        config = self._config
        self._memory.set_rates(own, config.faults_per_s, config.refaults_per_s)
        self._of_cgroup[own] = session
        self._protect()
        self._set_reclaim(session, stalled=False, urgent=False)

    def session_changed(self, session: Session) -> None:
        """Have the programs go by a session's new priority. Raises BpfError."""
        for cgroup in (session.cgroup.id, session.agent.id):
            self._memory.set_priority(cgroup, session.limits.priority)
        self._protect()
        self._set_reclaim(session, stalled=False, urgent=False)

    def session_closed(self, session: Session) -> None:
        """Have the programs forget a session. Raises BpfError."""
        self._of_cgroup.pop(session.cgroup.id, None)
        self._memory.forget(session.agent.id)
        self._memory.forget(session.cgroup.id)
        if self._plane.reclaim is not None:
            self._plane.reclaim.remove(session.cgroup.id)
        self._protect()

    def call_opened(self, call: Call) -> None:
        """Make a call's leaf known to the programs, which take what is below for a part of it, as
        calls inside it are. Raises BpfError."""
        if call.parent is not None:
            return
        above = call.session.cgroup.id
        self._memory.watch(call.cgroup.id, abi.CgroupKind.CALL, above, call.grant.priority)
        self._memory.set_willing(call.cgroup.id, self._is_willing(call.grant))
        self._of_cgroup[call.cgroup.id] = call

    def regrant(self, call: Call, grant: Grant) -> None:
        """Tell the programs what a call would rather suffer by its new grant. Raises BpfError."""
        self._memory.set_willing(call.cgroup.id, self._is_willing(grant))

    def _is_willing(self, grant: Grant) -> bool:
        """Tell whether a call may be refused memory: its intent says so, or the policy denies
        growth to all."""
        if grant.on_pressure == "deny":
            return True
        rulesets = () if self._guard is None else self._guard.policy.rulesets
        rules = (r.do for r in rulesets if r.enabled and isinstance(r.do, Deny))
        return any(rule.whom == "all" for rule in rules)

    def call_closed(self, call: Call) -> None:
        """Have the programs forget a call. Raises BpfError."""
        if call.parent is not None:
            return
        self._of_cgroup.pop(call.cgroup.id, None)
        self._memory.forget(call.cgroup.id)

    def _protect(self) -> None:
        important = [s for s in self._sessions() if self._important(s)]
        important.sort(key=lambda s: -s.limits.priority)
        chosen = ((s.cgroup.id, s.limits.priority) for s in important)
        pool = self._pool.cgroup.id if self._guard is not None else None
        fitted = self._memory.protect(chosen, pool)
        if fitted < len(important):
            log.warning(
                "%d sessions are important, %d fit into the kernel's table: the others are not "
                "protected by it",
                len(important),
                fitted,
            )

    def _important(self, session: Session) -> bool:
        return session.limits.priority >= self._config.protect_priority

    def _set_reclaim(self, session: Session, stalled: bool, urgent: bool) -> None:
        """Set what the kernel's reclaim does for a session: it spares an important one that
        stalls, and meanwhile delays the others above their memory.high. Raises BpfError."""
        if self._plane.reclaim is not None:
            important = self._important(session)
            delay = DELAY_PERCENT if urgent and not important else 0
            self._plane.reclaim.set(
                session.cgroup.id, protect=important, stalled=stalled, delay_percent=delay
            )

    def _set_reclaim_of_all(self, stalling: int | None) -> None:
        """`stalling`: cgroup id of the session that stalls; None: that is over."""
        if self._plane.reclaim is None:
            return
        for session in self._sessions():
            stalled, urgent = session.cgroup.id == stalling, stalling is not None
            what = "reclaim of a session cannot be changed"
            self._plane.attempt(what, self._set_reclaim, session, stalled, urgent)

    def sweep(self) -> None:
        """Count the events that were lost since the last sweep, and how often the programs had to
        do without the daemon."""
        alone = self._memory.take_times_alone()
        if alone:
            self._metrics.signals.labels("alone").inc(alone)
            self._audit.write("alone", times=alone)
        lost = self._memory.lost()
        fresh = {kind: n - self._lost.get(kind, 0) for kind, n in lost.items()}
        self._lost = lost
        for kind, count in fresh.items():
            self._metrics.events_lost.labels(kind).inc(count)

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
        if event.event.cgroup_id != self._pool.cgroup.id or self._guard is None:
            return
        applied = self._guard.applied
        self._guard.decide_now(Signal(SignalKind.MARK))
        reaction_ns = time.monotonic_ns() - event.event.at_ns
        acted = self._guard.applied - applied
        if event.above and acted:
            self._metrics.reaction.observe(reaction_ns / 1e9)
        self._audit.write(
            "mark",
            above=bool(event.above),
            usage_bytes=event.usage_bytes,
            mark_bytes=event.mark_bytes,
            reaction_usec=reaction_ns // 1000,
            decisions=acted,
        )

    def _rates(self, event: abi.RatesEvent) -> None:
        session = self._of_cgroup.get(event.event.cgroup_id)
        if not isinstance(session, Session):
            return
        self._metrics.signals.labels("rates_above" if event.above else "rates_below").inc()
        self._audit.write(
            "rates",
            session=session.id,
            above=bool(event.above),
            faults_per_s=event.faults_per_s,
            refaults_per_s=event.refaults_per_s,
        )

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
        self._audit.write(
            "denied",
            session=call.session.id,
            call=call.id,
            pid=event.pid,
            why=why,
            mark_bytes=event.mark_bytes,
            usage_bytes=event.usage_bytes,
            request_bytes=event.request_bytes,
        )
        asked_bytes, held_bytes = float(event.request_bytes), float(event.usage_bytes)
        feedback = pb.Feedback(
            code=pb.FEEDBACK_CODE_GROWTH_DENIED,
            sentence=why,
            numbers={"request_bytes": asked_bytes, "usage_bytes": held_bytes},
        )
        self._notices.tell(call.session, call.id, feedback)

    def _urgent(self, event: abi.UrgentEvent) -> None:
        """Judge what the program has done already: agree for a while, or take it back."""
        session = self._of_cgroup.get(event.event.cgroup_id)
        try:
            agree = self._guard is None or self._guard.still_short()
        except KnobError as error:
            log.warning("the pool cannot be read: %s", error)
            agree = False
        if agree:
            self._memory.confirm_urgent(CONFIRM_USEC)
            self._set_reclaim_of_all(event.event.cgroup_id)
            if self._calm_timer is not None:
                self._calm_timer.cancel()
            self._calm_timer = asyncio.get_running_loop().call_later(
                CONFIRM_USEC / 1e6, self._set_reclaim_of_all, None
            )
        else:
            self._memory.lift_urgent(CONFIRM_USEC)
        self._metrics.signals.labels("urgent").inc()
        self._metrics.actions.labels("confirm_urgent" if agree else "lift_urgent").inc()
        session_id = session.id if isinstance(session, Session) else ""
        stalled_usec = event.stalled_ns // 1000
        self._audit.write("urgent", session=session_id, stalled_usec=stalled_usec, confirmed=agree)
        if agree and self._guard is not None:
            self._guard.decide_now(Signal(SignalKind.URGENT))
