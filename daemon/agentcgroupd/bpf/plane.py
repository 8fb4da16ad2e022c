"""The data plane: every object that works here, and what became of the others.

A daemon without a feature does without it; that is said once in the log, in `doctor` and as a
metric. What fails while the daemon runs (a full map) is counted and said once too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec

from agentcgroupd.bpf import features, memcg_ops
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.bpf.memcg_ops import ReclaimHooks
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.config import BpfConfig, GuardConfig
from agentcgroupd.errors import BpfError

P = ParamSpec("P")

log = logging.getLogger(__name__)

OFF = "switched off in the configuration (bpf.enabled)"


class DataPlane:
    """Loaded objects. `open`, then `lifecycle` and `memory` where they are not None, `close`."""

    def __init__(self, config: BpfConfig, guard: GuardConfig) -> None:
        """Nothing is loaded yet."""
        self._config = config
        self._guard = guard
        self.states: dict[str, FeatureState] = {}
        self.lifecycle: Lifecycle | None = None
        self.memory: MemoryPrograms | None = None
        self.reclaim: ReclaimHooks | None = None
        self.failures = 0
        self._said: set[str] = set()

    def open(self) -> None:
        """Load what this kernel takes. Never raises BpfError."""
        if not self._config.enabled:
            off = (features.missing(d, OFF) for d in features.DEFINITIONS
                   if d.name != features.CPU_SCHEDULER)  # fmt: skip
            self.states = {state.name: state for state in off}
            log.info("in the kernel: nothing: %s", OFF)
            return
        for name, make in (("lifecycle", self._open_lifecycle), ("memory", self._open_memory)):
            bpf, states = features.load(name, self._config.objects, self._config.events_size)
            self.states.update((state.name, state) for state in states)
            if bpf is None:
                continue
            try:
                make(bpf)
            except BpfError as error:
                # Maps of other sizes than the daemon's types: an object of another release.
                bpf.close()
                for state in states:
                    if state.works:
                        self.states[state.name] = replace(
                            state, works=False, reason=features.one_line(error), programs=(),
                            remedy=features.remedy_of(error),
                        )  # fmt: skip
        self.reclaim, states = memcg_ops.load(self._config.objects)
        self.states.update((state.name, state) for state in states)
        for state in self.states.values():
            if not state.works:
                log.warning("%s: missing: %s; instead: %s", state.name, state.reason,
                            state.fallback)  # fmt: skip
        working = [state.name for state in self.states.values() if state.works]
        log.info("in the kernel: %s", ", ".join(working) or "nothing")

    def _open_lifecycle(self, bpf: BpfObject) -> None:
        self.lifecycle = Lifecycle(bpf)

    def _open_memory(self, bpf: BpfObject) -> None:
        self.memory = MemoryPrograms(bpf, self._guard)

    def drop_memory(self, reason: str) -> None:
        """Unload programs that nobody could use here."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        for definition in features.definitions_of("memory"):
            if self.works(definition.name):
                self.states[definition.name] = features.missing(definition, reason)
                log.warning("%s: missing: %s; instead: %s", definition.name, reason,
                            definition.fallback)  # fmt: skip

    def works(self, name: str) -> bool:
        """Whether a feature does."""
        state = self.states.get(name)
        return state is not None and state.works

    def attempt(self, what: str, action: Callable[P, None], *args: P.args, **kw: P.kwargs) -> bool:
        """Do something with a program that the daemon can go on without; False if it failed,
        which is counted, and said the first time for each `what`."""
        try:
            action(*args, **kw)
        except BpfError as error:
            self.failures += 1
            if what not in self._said:
                self._said.add(what)
                log.error("%s: %s (said once; counted in agentcg_bpf_failures)", what, error)
            return False
        return True

    def close(self) -> None:
        """Detach everything; no error if nothing is loaded."""
        for part in (self.reclaim, self.memory, self.lifecycle):
            if part is not None:
                part.close()
        self.reclaim = self.memory = self.lifecycle = None
