"""Everything that follows sessions and calls: the kernel's programs, the CPU scheduler, the GPUs.

Whoever opens or closes a session or a call tells it here, and need not know which of them work on
this kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from agentcgroupd.boundaries.events import Boundaries, Declared
from agentcgroupd.bpf import features
from agentcgroupd.bpf.plane import DataPlane
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.traffic import Traffic
from agentcgroupd.config import Config
from agentcgroupd.cpu.scheduling import CpuScheduling
from agentcgroupd.gpu.service import Gpus
from agentcgroupd.guard.assembly import PoolGuard
from agentcgroupd.guard.high_mark import PoolMark, ProgramMark
from agentcgroupd.guard.signals import Signals
from agentcgroupd.intents.grant import Grant
from agentcgroupd.policy.snapshot import Host
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.sessions.protection import Protection
from agentcgroupd.state.session import Call, Session
from agentcgroupd.telemetry.labels import feature_label
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)


class Observers:
    """Passes sessions and calls on to each observer that works here. One that fails to follow a
    session or call does not keep the others from it, but for GPUs: without them a call that was
    granted a part cannot begin."""

    def __init__(
        self,
        config: Config,
        plane: DataPlane,
        cpu: CpuScheduling,
        gpus: Gpus,
        pool: Pool,
        sessions: Callable[[], Iterable[Session]],
        notices: Notices,
    ) -> None:
        """`plane` is open. The pool is made known to the memory programs and the CPU scheduler is
        loaded; `sessions`: all that are open."""
        self._config, self._plane, self._cpu, self._gpus = config, plane, cpu, gpus
        self._pool, self._sessions, self._notices = pool, sessions, notices
        self._protection = Protection(pool, sessions)
        self._guard: PoolGuard | None = None
        self._boundaries: Boundaries | None = None
        self.declared: Declared = lambda session, key, head, is_whole: None
        """Told of launchers that declare a call without a socket; set once there is who listens."""
        self._signals = self._make_signals()
        if self._signals is None:
            plane.drop_memory("the pool has no memory controller")
        programs = plane.count_traffic(pool.cgroup)
        self._traffic = Traffic(programs) if programs is not None else None
        states_fd = plane.memory.states_fd if plane.memory is not None else None
        cpu_state = cpu.open(states_fd, config.bpf.enabled)
        for state in (*plane.states.values(), cpu_state):
            notices.metrics.features.labels(feature_label(state.name)).set(int(state.works))

    def features(self) -> list[tuple[str, bool]]:
        """Features of the programs by name, and whether each works here."""
        states = (*self._plane.states.values(), self._cpu.state)
        return [(state.name, state.works) for state in states]

    def _make_signals(self) -> Signals | None:
        plane, pool = self._plane, self._pool
        if plane.memory is None or "memory" not in pool.controllers:
            return None
        signals = Signals(
            self._config.guard, plane, plane.memory, pool, self._sessions, self._notices
        )
        if not plane.attempt("the pool cannot be watched", signals.watch_pool):
            return None
        return signals

    def follow(self, calls: Calls) -> None:
        """Follow processes from now on, into `calls` of their own where a rule names them; to be
        called before the first session is told of."""
        if self._plane.lifecycle is not None:
            self._boundaries = Boundaries(
                self._config.boundaries,
                self._plane.lifecycle,
                calls,
                self._sessions,
                self._notices,
                self._pool.settled_ticks,
                lambda *launcher: self.declared(*launcher),
                self._cpu.let_go,
            )

    def start(self, guard: PoolGuard | None) -> None:
        """Listen to the programs from now on; `guard` decides on what they tell, and is told of
        calls. None: it does not run here. Raises BpfError."""
        self._guard = guard
        if self._signals is not None:
            self._signals.start(guard.loop if guard is not None else None)
        if self._boundaries is not None:
            self._plane.attempt("processes cannot be followed", self._boundaries.start)

    def abilities(self) -> Host:
        """What decisions can count on the programs for."""
        watches = self._signals is not None
        return Host(
            can_deny=watches and self._plane.works(features.DENY),
            can_penalize=watches and self._cpu.penalizes,
        )

    def program_mark(self) -> PoolMark | None:
        """The pool's mark as the memory programs keep it; None where they do not work here."""
        if self._signals is None or self._plane.memory is None:
            return None
        return ProgramMark(self._plane, self._plane.memory, self._pool.cgroup)

    @property
    def tells_marks(self) -> bool:
        """Whether a program tells that use of the pool has passed its mark."""
        return self._signals is not None and self._plane.works(features.MARKS)

    # Sessions and calls

    def _programs(self) -> tuple[Signals | Boundaries | CpuScheduling | Traffic, ...]:
        found = (self._signals, self._boundaries, self._cpu, self._traffic)
        return tuple(observer for observer in found if observer is not None)

    def session_opened(self, session: Session) -> None:
        """Follow a session whose agent leaf is there."""
        for observer in self._programs():
            self._plane.attempt("a session cannot be watched", observer.session_opened, session)
        self._protection.keep()
        self._gpus.session_opened(session)

    def session_changed(self, session: Session) -> None:
        """Tell the programs of a session's new priority."""
        for observer in (self._signals, self._cpu):
            if observer is not None:
                what = "a session's new priority is not known to the programs"
                self._plane.attempt(what, observer.session_changed, session)

    def session_given_back(self, session: Session) -> None:
        """Leave the processes of an adopted session to their runtime."""
        self._cpu.given_back(session)

    def session_closed(self, session: Session) -> None:
        """Forget a session whose cgroup is gone or given back."""
        for observer in self._programs():
            self._plane.attempt("a session cannot be let go", observer.session_closed, session)
        self._protection.keep()
        self._gpus.session_closed(session)

    def call_opened(self, call: Call) -> None:
        """Follow a call whose cgroup is there, with no process in it or, after a restart, with
        some. Raises BpfError where it cannot be given what it was granted of GPUs."""
        for observer in self._programs():
            self._plane.attempt("a call cannot be watched", observer.call_opened, call)
        self._gpus.call_opened(call)

    def call_begun(self, call: Call) -> None:
        """Have the guard look at a call, hold it to its credit, and sample the pool soon."""
        if self._guard is not None:
            self._guard.call_opened(call)
            self._guard.loop.call_began()

    def regrant(self, call: Call, grant: Grant) -> Grant:
        """Change an open call's part of GPUs; returns the grant with what follows from it. Raises
        RequestError, with nothing changed."""
        granted = self._gpus.grants.regrant(call, grant)
        if self._signals is not None:
            self._plane.attempt("a call cannot be watched", self._signals.regrant, call, granted)
        if self._traffic is not None:
            what = "what a call may send is as before"
            self._plane.attempt(what, self._traffic.regrant, call, granted)
        if self._guard is not None:
            self._guard.call_changed(call)
        return granted

    def call_ending(self, call: Call) -> None:
        """Keep what a call did with its part of GPUs for its report."""
        self._gpus.call_ending(call)
        if self._guard is not None:
            self._guard.call_changed(call)

    def call_ended(self, call: Call, held_bytes: int) -> None:
        """Tell the guard that a call has ended and how much it held at its peak, so that calls that
        wait can start. One inside another call is a part of that."""
        if self._guard is not None and call.parent is None:
            self._guard.call_ended(call, held_bytes)

    def room_given_up(self, call: Call) -> None:
        """Tell the guard that calls that wait may have the room that was kept for an empty one."""
        if self._guard is not None:
            self._guard.room_freed(call)

    def call_closed(self, call: Call) -> None:
        """Forget a call whose cgroup is gone or given up."""
        for observer in self._programs():
            self._plane.attempt("a call cannot be let go", observer.call_closed, call)
        self._gpus.call_closed(call)
        if self._guard is not None:
            self._guard.call_closed(call)

    def entered(self, pid: int) -> None:
        """Have our CPU scheduler run a process that is in a call or an agent leaf now."""
        self._cpu.entered(pid)

    def agent_entered(self, pid: int) -> None:
        """Know a process that was put into an agent leaf as the agent's own."""
        self.entered(pid)
        if self._boundaries is not None:
            self._boundaries.entered(pid)

    def catch_up(self) -> None:
        """Read what the kernel has told of processes: before a call is judged, its exit event may
        be there, unread."""
        if self._boundaries is not None:
            self._boundaries.catch_up()

    def behind(self) -> bool:
        """Whether events of processes wait to be dealt with."""
        return self._boundaries is not None and self._boundaries.behind

    def sweep(self) -> None:
        """Forget what nobody will tell the end of; to be called again and again."""
        self._cpu.sweep()
        self._protection.keep()
        if self._signals is not None:
            self._signals.sweep()
        if self._boundaries is not None:
            self._boundaries.catch_up()
            self._boundaries.prune()
        self._gpus.sweep()
        self._notices.metrics.bpf_failures.follow(self._plane.failures)

    def close(self) -> None:
        """Follow nothing any more, and take the CPU scheduler away; calls stay as they are."""
        if self._boundaries is not None:
            self._boundaries.close()
        if self._signals is not None:
            self._signals.close()
        self._signals = self._boundaries = None
        self._protection.close()
        self._cpu.close()
