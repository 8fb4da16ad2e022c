"""The data plane: every object that works on this kernel, and the states of all features.

The daemon works without a feature that the kernel does not have, and says so once in its log, in
`doctor` and as a metric. What fails later, such as a map that is full, is counted and logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import ParamSpec

from agentcgroupd.bpf import features, look, memcg_ops, net
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.bpf.look import LookProgram
from agentcgroupd.bpf.memcg_ops import ReclaimHooks
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.bpf.net import NetPrograms
from agentcgroupd.bpf.pins import Pins, remove_stale
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.config import BpfConfig, GuardConfig
from agentcgroupd.errors import BpfError
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.units import CgroupId

P = ParamSpec("P")

log = logging.getLogger(__name__)

OFF = "switched off in the configuration (bpf.enabled)"


class DataPlane:
    """The loaded objects: `open` loads them, `close` unloads them. Between the two, `lifecycle`,
    `memory`, `reclaim`, `look` and `net` are there unless they are None."""

    def __init__(self, config: BpfConfig, guard: GuardConfig, pool: CgroupId | None = None) -> None:
        """Keep the configuration; nothing is loaded yet. `pool`: the cgroup whose programs outlive
        this process if it is killed; None: they end with it."""
        self._config = config
        self._guard = guard
        self._pool = pool
        self._pins: Pins | None = None
        self.outlives = False
        """Whether the memory programs outlive this process if it is killed."""
        self.states: dict[str, FeatureState] = {}
        self.lifecycle: Lifecycle | None = None
        self.memory: MemoryPrograms | None = None
        self.reclaim: ReclaimHooks | None = None
        self.look: LookProgram | None = None
        self.net: NetPrograms | None = None
        self.failures = 0
        self._said: set[str] = set()

    def open(self) -> None:
        """Load what this kernel takes. Raises no BpfError."""
        if not self._config.enabled:
            # The scheduler has a switch of its own.
            ours = [d for d in features.DEFINITIONS if d.name != features.CPU_SCHEDULER]
            self.states = {d.name: features.missing(d, OFF) for d in ours}
            log.info("in the kernel: nothing: %s", OFF, extra=DETAIL)
            return
        self._pins = self._make_pins()
        for name, make in (("lifecycle", self._open_lifecycle), ("memory", self._open_memory)):
            bpf, states = features.load(
                name, self._config.objects, self._config.events_size, self._lender(name)
            )
            self.states.update((state.name, state) for state in states)
            if bpf is None:
                continue
            try:
                make(bpf)
            except BpfError as error:
                # Maps of other sizes than the daemon's types: an object of another release.
                bpf.close()
                reason, remedy = features.one_line(error), features.remedy_of(error)
                for state in (state for state in states if state.works):
                    self.states[state.name] = replace(
                        state, works=False, reason=reason, programs=(), remedy=remedy
                    )
        self.reclaim, states = memcg_ops.load(self._config.objects)
        self.states.update((state.name, state) for state in states)
        self.look, states = look.load(self._config.objects)
        self.states.update((state.name, state) for state in states)
        self.net, states = net.load(self._config.objects)
        self.states.update((state.name, state) for state in states)
        _log_missing(state for state in self.states.values() if not state.works)
        working = [state.name for state in self.states.values() if state.works]
        log.info("in the kernel: %s", ", ".join(working) or "nothing", extra=DETAIL)

    def _open_lifecycle(self, bpf: BpfObject) -> None:
        self.lifecycle = Lifecycle(bpf)

    def _open_memory(self, bpf: BpfObject) -> None:
        self.memory = MemoryPrograms(bpf, self._guard)
        if self._pins is not None:
            self.outlives = self.attempt("the programs end with this process", self._pins.keep, bpf)

    def _make_pins(self) -> Pins | None:
        mount = self._config.pins
        if self._pool is None or mount is None:
            return None
        try:
            pins = Pins(mount, self._pool)
            remove_stale(mount, cgroup2_mount())
        except (BpfError, OSError) as error:
            log.warning("the programs end with this process: %s", error)
            return None
        return pins

    def _lender(self, name: str) -> Callable[[BpfObject], object]:
        """Whoever has an object use the maps that an earlier daemon left."""
        if name != "memory" or self._pins is None:
            return lambda bpf: None
        return self._pins.lend

    def count_traffic(self, pool: Cgroup) -> NetPrograms | None:
        """Have traffic below the pool counted from now on; None: that does not work here."""
        if self.net is None:
            return None
        try:
            self.net.attach(pool)
        except BpfError as error:
            (definition,) = features.definitions_of(net.OBJECT)
            remedy = features.remedy_of(error)
            gone = features.missing(definition, features.one_line(error), remedy)
            self.states[definition.name] = gone
            _log_missing([gone])
            self.net.close()
            self.net = None
        return self.net

    def drop_memory(self, reason: str) -> None:
        """Unload the memory programs, whose features are missing from now on for the reason."""
        if self.memory is not None:
            self._unpin()
            self.memory.close()
            self.memory = None
        gone: list[FeatureState] = []
        for definition in features.definitions_of("memory"):
            if self.works(definition.name):
                state = features.missing(definition, reason)
                self.states[definition.name] = state
                gone.append(state)
        _log_missing(gone)

    def works(self, name: str) -> bool:
        """Whether the feature of that name works."""
        state = self.states.get(name)
        return state is not None and state.works

    def attempt(self, what: str, action: Callable[P, None], *args: P.args, **kw: P.kwargs) -> bool:
        """Do something with a program that the daemon can go on without. Returns False if that
        raised BpfError, which is counted, and logged the first time for each `what`."""
        try:
            action(*args, **kw)
        except BpfError as error:
            self.failures += 1
            if what not in self._said:
                self._said.add(what)
                log.error("%s: %s (said once; counted in agentcg_bpf_failures_total)", what, error)
            return False
        return True

    def close(self) -> None:
        """Detach and unload everything; no error if nothing is loaded."""
        self._unpin()
        for part in (self.net, self.look, self.reclaim, self.memory, self.lifecycle):
            if part is not None:
                part.close()
        self.look = self.reclaim = self.memory = self.lifecycle = self.net = None

    def _unpin(self) -> None:
        """Have the memory programs end with this process, or before."""
        if self._pins is not None:
            self._pins.remove()
            self._pins, self.outlives = None, False


def _log_missing(states: Iterable[FeatureState]) -> None:
    """Say what is missing, in one line for each reason."""
    by_reason: dict[str, list[FeatureState]] = {}
    for state in states:
        by_reason.setdefault(state.reason, []).append(state)
    for reason, lacking in by_reason.items():
        names = ", ".join(state.name for state in lacking)
        instead = "; ".join(f"instead of {state.name}: {state.fallback}" for state in lacking)
        if len(lacking) == 1:
            instead = f"instead: {lacking[0].fallback}"
        log.warning("%s: missing: %s; %s", names, reason, instead, extra=DETAIL)
