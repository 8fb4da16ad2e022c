"""Everything that follows the kernel's programs, behind one door: who needs them asks here, and
works the same where this kernel has none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from agentcgroupd.boundaries.events import Boundaries
from agentcgroupd.bpf import features
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.bpf.plane import DataPlane
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.config import Config
from agentcgroupd.cpu.scheduling import CpuScheduling
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.gpu.service import Gpus
from agentcgroupd.guard.assembly import Control
from agentcgroupd.guard.signals import Signals
from agentcgroupd.intents.grant import Grant
from agentcgroupd.policy.snapshot import Host
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import Call, Session

log = logging.getLogger(__name__)


class Watchers:
    """The data plane with its signals and boundaries. Is told of sessions and calls."""

    def __init__(
        self, config: Config, actions: Callable[[], Actions], cpu: CpuScheduling, gpus: Gpus
    ) -> None:
        """Nothing is loaded yet. `actions` is asked from `follow` on."""
        self.cpu = cpu
        self._config = config
        self._actions = actions
        self.plane = DataPlane(config.bpf, config.guard)
        self.gpus = gpus
        self._control: Control | None = None
        self._signals: Signals | None = None
        self._boundaries: Boundaries | None = None

    @property
    def memory(self) -> MemoryPrograms | None:
        """The memory programs, if they work here."""
        return self.plane.memory

    def abilities(self) -> Host:
        """What decisions can count on."""
        watches = self._signals is not None
        return Host(
            can_deny=watches and self.plane.works(features.DENY),
            can_penalize=watches and self.cpu.penalizes,
        )

    @property
    def tells_marks(self) -> bool:
        """Whether passing the pool's mark is told by a program."""
        return self._signals is not None and self.plane.works(features.MARKS)

    def follow(self, pool: Pool, calls: Calls, sessions: Callable[[], Iterable[Session]]) -> None:
        """Make what follows the programs; before the first session is told of."""
        actions, plane, config = self._actions(), self.plane, self._config
        if plane.memory is not None and "memory" in pool.controllers:
            signals = Signals(config.guard, plane, plane.memory, pool, sessions, actions)
            if plane.attempt("the pool cannot be watched", signals.watch_pool):
                self._signals = signals
        if self._signals is None:
            plane.drop_memory("the pool has no memory controller")
        if plane.lifecycle is not None:
            self._boundaries = Boundaries(
                config.boundaries,
                plane.lifecycle,
                calls,
                sessions,
                actions,
                pool.settled_ticks,
            )
        states_fd = plane.memory.states_fd if plane.memory is not None else None
        cpu = self.cpu.open(pool, states_fd, sessions, config.bpf.enabled)
        for state in (*plane.states.values(), cpu):
            actions.metrics.features.labels(state.name).set(int(state.works))

    def start(self, control: Control | None) -> None:
        """Listen from now on. `control`: None where the guard does not run."""
        self._control = control
        if self._signals is not None:
            self._signals.start(None if control is None else control.guard)
        if self._boundaries is not None:
            self.plane.attempt("processes cannot be followed", self._boundaries.start)

    def catch_up(self) -> None:
        """Before a call is judged: its exit event may be there, unread."""
        if self._boundaries is not None:
            self._boundaries.catch_up()

    def behind(self) -> bool:
        """Whether events of processes wait to be dealt with."""
        return self._boundaries is not None and self._boundaries.behind

    # What is watched

    def _each(self) -> tuple[Signals | Boundaries | CpuScheduling, ...]:
        return tuple(w for w in (self._signals, self._boundaries, self.cpu) if w is not None)

    def session_opened(self, session: Session) -> None:
        """Its agent leaf is there."""
        for watcher in self._each():
            self.plane.attempt("a session cannot be watched", watcher.session_opened, session)
        self.gpus.session_opened(session)

    def session_closed(self, session: Session) -> None:
        """Its cgroup is gone or given back."""
        for watcher in self._each():
            self.plane.attempt("a session cannot be let go", watcher.session_closed, session)
        self.gpus.session_closed(session)

    def call_opened(self, call: Call) -> None:
        """See calls.lifecycle.CallObserver."""
        for watcher in self._each():
            self.plane.attempt("a call cannot be watched", watcher.call_opened, call)
        self.gpus.call_opened(call)

    def call_begun(self, call: Call) -> None:
        """Have the guard sample soon."""
        if self._control is not None:
            self._control.guard.call_began()

    def regrant(self, call: Call, grant: Grant) -> Grant:
        """Change an open call's part of GPUs."""
        return self.gpus.grants.regrant(call, grant)

    def call_ending(self, call: Call) -> None:
        """Have what the call did with its part of GPUs kept for its report."""
        self.gpus.call_ending(call)

    def call_ended(self, call: Call, held_bytes: int) -> None:
        """Tell the guard that memory may be free now."""
        if self._control is not None:
            self._control.call_ended(call, held_bytes)

    def call_closed(self, call: Call) -> None:
        """See calls.lifecycle.CallObserver."""
        for watcher in self._each():
            self.plane.attempt("a call cannot be let go", watcher.call_closed, call)
        self.gpus.call_closed(call)

    def entered(self, pid: int) -> None:
        """See calls.lifecycle.CallObserver."""
        self.cpu.entered(pid)

    def sweep(self) -> None:
        """Now and then: forget what nobody will tell the end of."""
        self.cpu.sweep()
        if self._signals is not None:
            self._signals.sweep()
        if self._boundaries is not None:
            self._boundaries.catch_up()
            self._boundaries.prune()
        self.gpus.sweep()
        self._actions().metrics.bpf_failures.set(self.plane.failures)

    def close(self) -> None:
        """Detach everything; no error if nothing is loaded."""
        if self._boundaries is not None:
            self._boundaries.close()
        self._signals = self._boundaries = None
        self.cpu.close()
        self.plane.close()
