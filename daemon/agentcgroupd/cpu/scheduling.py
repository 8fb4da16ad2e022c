"""Scheduling of the CPU, by our sched_ext scheduler or by the kernel's own with cpu.weight and
cpu.max.

Weights and limits are written to the cgroups either way, so the two give the same kind of result.
Ours is loaded at the start where the kernel has what it needs and no other scheduler runs. When the
kernel lets go of it (a stall, an error, SysRq-S) its tasks go on in the fair class at once; the
daemon says why, and tries again later, at most `cpu.retries` times.

What enters a managed cgroup becomes SCHED_EXT, which its children inherit; what leaves is given
back. A SCHED_EXT task without a scheduler is one of the fair class, so that is always safe.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from agentcgroupd.bpf import abi, features, sched
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.bpf.sched import CpuNumbers, SchedSettings, Scheduler
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.config import CpuConfig
from agentcgroupd.errors import BpfError, CgroupGone, KnobError
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.intents.cpu_class import CpuClasses
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.session import Call, Session, all_inside
from agentcgroupd.telemetry.labels import (
    CPU_EVENTS,
    CPU_TIMES,
    SCHEDULER_EVENTS,
    SCHEDULER_STATES,
    feature_label,
)
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.units import CgroupId

log = logging.getLogger(__name__)

SCHED_EXT = 7
"""include/uapi/linux/sched.h"""
OURS = (os.SCHED_OTHER, os.SCHED_BATCH)
"""Policies that are changed; a task that has asked for another one keeps it."""
INTERACTIVE_FACTOR = 2
SESSION_FACTOR = 4
"""Budgets of an interactive call, and of a session, over that of a normal call."""
HURRY_USEC = 50_000
RETRY_MOST_S = 300.0
GOOD_S = 600.0
"""A scheduler that ran for so long has made up for the failures before."""


def set_policy(pid: int, policy: int, of: tuple[int, ...] = (*OURS, SCHED_EXT)) -> int:
    """Give every thread of a process the policy, if it has one that the daemon may change. Returns
    how many threads were changed; those made meanwhile inherit the policy, or are found when the
    threads are listed again."""
    changed = 0
    before: set[str] = set()
    while True:
        try:
            threads = set(os.listdir(f"/proc/{pid}/task"))
        except (FileNotFoundError, ProcessLookupError):
            return changed
        new = threads - before
        if not new:
            return changed
        before |= new
        for thread in map(int, new):
            try:
                found = os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK
                if found != policy and found in of:
                    os.sched_setscheduler(thread, policy, os.sched_param(0))
                    changed += 1
            except ProcessLookupError:
                continue
            except OSError as error:
                log.warning("scheduling policy of %d: %s", thread, error)


class CpuScheduling:
    """Keeps the scheduler running, and tells it of sessions and calls. Runs on the event loop."""

    def __init__(
        self,
        config: CpuConfig,
        objects: Path | None,
        metrics: Metrics,
        classes: Callable[[], CpuClasses],
        pool: Pool,
        sessions: Callable[[], Iterable[Session]],
    ) -> None:
        """Load nothing yet. `objects`: directory of the compiled programs, None: those that
        came with the daemon; `classes`: by the policy in force; `sessions`: all that are open."""
        self._config, self._objects, self._metrics = config, objects, metrics
        self._classes = classes
        self._pool, self._sessions = pool, sessions
        self._scheduler: Scheduler | None = None
        self._states_fd: int | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._left = 0
        self._attached_at = 0.0
        self.failures = 0
        """How often the kernel has let go of it, or did not take it again, one after another."""
        (definition,) = features.definitions_of(sched.OBJECT)
        self._definition = definition
        self.state = features.missing(definition, "it has not been tried yet")

    # Its life

    def open(self, states_fd: int | None, enabled: bool) -> FeatureState:
        """Load and attach the scheduler if this kernel takes it. `states_fd`: the memory programs'
        map of cgroups, None: there is none; `enabled`: whether programs are to be loaded at all.
        Never raises BpfError."""
        self._states_fd = states_fd
        if not enabled or self._config.scheduler == "off":
            key = "cpu.scheduler" if enabled else "bpf.enabled"
            self._is_missing(f"switched off in the configuration ({key})")
        elif "cpu" not in self._pool.controllers:
            self._is_missing("the pool has no cpu controller")
        else:
            state = sched.gate()
            if state.works:
                self._attach(self._load())
            else:
                self._set(state)
        if not self.state.works and enabled:  # else that is said once, for all programs
            state = self.state
            words = (state.name, state.reason, state.fallback)
            log.warning("%s: missing: %s; instead: %s", *words, extra=DETAIL)
        return self.state

    def _set(self, state: FeatureState) -> None:
        self.state = state
        self._metrics.features.labels(feature_label(state.name)).set(int(state.works))

    def _is_missing(self, reason: str, remedy: str = "") -> None:
        self._set(features.missing(self._definition, reason, remedy))

    def _load(self) -> Scheduler | BpfError:
        """Load the scheduler. Most of the time goes into the kernel's verifier, so this may run in
        a thread."""
        config = self._config
        settings = SchedSettings(
            slice_usec=config.slice,
            wait_max_usec=config.wait_max,
            boost_lead_usec=config.boost_lead,
            penalty_most=config.penalty_most,
            stall_timeout_usec=config.stall_timeout,
            exec_hold_usec=config.exec_hold,
        )
        try:
            return Scheduler.load(settings, self._states_fd, self._objects)
        except BpfError as error:
            return error

    def _attach(self, loaded: Scheduler | BpfError) -> None:
        """Let the kernel ask it from now on, and tell it of what is there already."""
        if isinstance(loaded, BpfError):
            self._is_missing(features.one_line(loaded), features.remedy_of(loaded))
            return
        try:
            loaded.attach()
        except BpfError as error:
            ending = loaded.ending()
            loaded.close()
            if error.errno == errno.EBUSY:
                self._is_missing(*sched.occupied())
            else:
                why = f": {ending.sentence}" if ending else ""
                self._is_missing(features.one_line(error) + why, features.remedy_of(error))
            return
        self._scheduler = loaded
        self._attached_at = time.monotonic()
        self._left = 0
        self._set(replace(sched.gate(), reason="", works=True))
        log.info("%s: attached, as %s", self.state.name, sched.running())
        for session in self._sessions():
            try:
                self.session_opened(session)
                for call in session.calls.values():
                    self.call_opened(call)
            except BpfError as error:
                log.error("session %s is not told to the CPU scheduler: %s", session.id, error)

    def check(self) -> None:
        """Notice if the kernel has let go of the scheduler; to be called again and again."""
        scheduler = self._scheduler
        if scheduler is None:
            return
        ending = scheduler.ending()
        if ending is None:
            self._show(scheduler)
            return
        self._scheduler = None
        scheduler.close()
        if time.monotonic() - self._attached_at > GOOD_S:
            self.failures = 0
        self.failures += 1
        self._metrics.scheduler_ejected.inc()
        self._is_missing(f"the kernel has let go of it: {ending.sentence}")
        name, fallback = self.state.name, self.state.fallback
        log.error(
            "%s: the kernel has let go of it: %s; instead: %s", name, ending.sentence, fallback
        )
        self._try_later()

    def _try_later(self) -> None:
        if self.failures > self._config.retries:
            log.error("%s: not tried again: it failed %d times", self.state.name, self.failures)
            return
        wait_s = min(RETRY_MOST_S, self._config.retry_after / 1e6 * 2 ** (self.failures - 1))
        log.info("%s: tried again in %.1f s", self.state.name, wait_s)
        self._retry = asyncio.get_running_loop().call_later(wait_s, self._begin_again)

    def _begin_again(self) -> None:
        self._retry = None
        self._task = asyncio.get_running_loop().create_task(self._again())

    async def _again(self) -> None:
        loaded = await asyncio.get_running_loop().run_in_executor(None, self._load)
        self._attach(loaded)
        if self._scheduler is None:
            self.failures += 1
            log.error("%s: %s", self.state.name, self.state.reason)
            self._try_later()

    @property
    def penalizes(self) -> bool:
        """Whether a call above its memory mark is slowed."""
        knows_memory = self._states_fd is not None
        return self._scheduler is not None and knows_memory and self._config.penalty_most > 1

    def close(self) -> None:
        """Detach the scheduler: everything goes on in the kernel's fair class."""
        if self._retry is not None:
            self._retry.cancel()
        if self._task is not None:
            self._task.cancel()
        if self._scheduler is not None:
            self._scheduler.close()
            self._scheduler = None

    # What it is told

    def session_opened(self, session: Session) -> None:
        """Make a session known to the scheduler, with the processes that are in its agent leaf
        already. Raises BpfError."""
        if self._scheduler is None:
            return
        self.session_changed(session)
        self._take_all(session.agent)

    def session_changed(self, session: Session) -> None:
        """Give a session and its agent what their priority comes with. Raises BpfError."""
        if self._scheduler is None:
            return
        boost, permille = self._budget(session.limits.priority)
        session_boost, session_permille = boost * SESSION_FACTOR, permille * SESSION_FACTOR
        self._scheduler.describe(
            session.cgroup.id, abi.CgroupKind.SESSION, session_boost, min(1000, session_permille)
        )
        self._scheduler.describe(session.agent.id, abi.CgroupKind.AGENT, boost, permille)

    def session_closed(self, session: Session) -> None:
        """Do nothing: the kernel tells the scheduler of a cgroup's end, and what becomes of the
        processes of an adopted one is in `given_back`."""

    def call_opened(self, call: Call) -> None:
        """Make a call known to the scheduler, with the processes that are in it after a restart.
        Raises BpfError."""
        if self._scheduler is None:
            return
        boost, permille = self._budget(call.grant.priority)
        self._scheduler.describe(call.cgroup.id, abi.CgroupKind.CALL, boost, permille)
        if call.entered:
            self._take_all(call.cgroup)

    def call_closed(self, call: Call) -> None:
        """Do nothing: the kernel tells the scheduler of a cgroup's end."""

    def _budget(self, priority: int) -> tuple[int, int]:
        """CPU time that may be taken ahead of others (usec), and how fast it comes back (permille
        of one CPU), by class."""
        classes, config = self._classes(), self._config
        if priority < classes.batch_below:
            return 0, 0
        factor = INTERACTIVE_FACTOR if priority >= classes.interactive_from else 1
        return config.boost * factor, min(1000, config.boost_refill_percent * 10 * factor)

    def entered(self, pid: int) -> None:
        """Have our scheduler run a process that has entered a managed cgroup."""
        if self._scheduler is not None:
            set_policy(pid, SCHED_EXT)

    def _take_all(self, cgroup: Cgroup) -> None:
        self._give_all(cgroup, SCHED_EXT, OURS)

    def _give_all(self, cgroup: Cgroup, policy: int, of: tuple[int, ...]) -> int:
        changed = 0
        waiting = [cgroup]
        while waiting:
            each = waiting.pop()
            seen = {0}
            try:
                # Until there is no new process: one that was forked meanwhile has the policy that
                # its parent had then.
                while new := set(each.procs()) - seen:
                    seen |= new
                    changed += sum(set_policy(pid, policy, of) for pid in new)
                waiting += [each.child(name) for name in each.children()]
            except CgroupGone:
                log.debug("%s is gone", each.path)
            except KnobError as error:
                log.warning("%s: %s", each.path, error)
        return changed

    def given_back(self, session: Session) -> None:
        """Have the kernel's fair class run the processes of an adopted session, which are its
        runtime's again."""
        self._give_all(session.cgroup, os.SCHED_OTHER, (SCHED_EXT,))

    def sweep(self) -> None:
        """Take back the threads that have left our class by themselves: anyone may set SCHED_OTHER,
        and would then go before everything that is ours."""
        scheduler = self._scheduler
        if scheduler is None or scheduler.control.left == self._left:
            return
        self._left = scheduler.control.left
        changed = 0
        for session in self._sessions():
            changed += self._give_all(session.cgroup, SCHED_EXT, OURS)
        if changed:
            log.info("%d threads had left the scheduling class, and were put back", changed)

    def hurry(self, call: Call) -> None:
        """Let a call that is about to be frozen or killed come to where it holds no lock of the
        kernel's. Never raises BpfError."""
        if self._scheduler is None:
            return
        for each in (call, *all_inside(call)):
            try:
                self._scheduler.hurry(each.leaf.id, HURRY_USEC)
            except BpfError as error:
                log.debug("call %s: %s", each.id, error)

    def let_go(self, pid: int, at_ns: int) -> None:
        """Let a program run that the daemon has decided on, which waits for that at its exec.
        `at_ns`: time of the event of that exec. Never raises BpfError."""
        if self._scheduler is None or not self._config.exec_hold:
            return
        try:
            self._scheduler.let_go(pid, at_ns)
        except BpfError as error:
            log.debug("process %d: %s", pid, error)

    # What it tells

    def numbers(self, cgroup: CgroupId) -> CpuNumbers | None:
        """What the scheduler counted of a cgroup; None where it does not run, or has never seen
        the cgroup."""
        if self._scheduler is None:
            return None
        try:
            return self._scheduler.numbers(cgroup)
        except BpfError as error:
            log.warning("cgroup %d: %s", cgroup, error)
            return None

    def _show(self, scheduler: Scheduler) -> None:
        """Show what the scheduler counts in the metrics."""
        metrics, control = self._metrics, scheduler.control
        for name in SCHEDULER_STATES:
            metrics.scheduler.labels(name).set(getattr(control, name))
        for name in SCHEDULER_EVENTS:
            metrics.scheduler_events.follow(getattr(control, name), name)
        found = self.numbers(self._pool.cgroup.id)
        if found is not None:
            for name in CPU_TIMES:
                metrics.cpu_seconds.follow(getattr(found, f"{name}_usec") / 1e6, name)
            for name in CPU_EVENTS:
                metrics.cpu_events.follow(getattr(found, name), name)
