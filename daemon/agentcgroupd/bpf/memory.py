"""Daemon's side of memory.bpf.c: marks, denied growth, and protected sessions."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent, RingBuffer
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.config import GuardConfig
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId

ALONE_UNTIL_NS = 60_000_000_000
"""A daemon that has been gone for so long has nothing denied any more."""


class MemoryPrograms:
    """Settings and findings of the memory programs for each managed cgroup."""

    def __init__(self, bpf: BpfObject, config: GuardConfig) -> None:
        """Take over a loaded and attached object. Raises BpfError."""
        self._bpf = bpf
        self._limits = bpf.map("limits", abi.MemoryLimits)
        self._states = bpf.map("states", abi.MemoryState)
        self._entries: dict[CgroupId, abi.MemoryLimits] = {}
        self.control = bpf.shared("control", abi.MemoryControl)
        self.control.allowance_bytes = config.deny_allowance
        self.control.stall_threshold_ns = config.stall_threshold * 1000
        self.control.stall_window_ns = config.stall_window * 1000
        self.control.urgent_lease_ns = config.urgent_lease * 1000
        self.control.alone_after_ns = config.alone_after * 1000
        self.control.alone_until_ns = ALONE_UNTIL_NS
        self._ring: RingBuffer | None = None

    def beat(self) -> None:
        """Tell the programs that the daemon's loop runs. Once told, they expect to be told again:
        while they are not, they deny growth by themselves where that is called for."""
        self.control.heartbeat_ns = time.monotonic_ns()

    def take_times_alone(self) -> int:
        """Return how often the programs had to do without a daemon while the pool was short, since
        this was asked last, by this daemon or one before."""
        times = int(self.control.alone_count)
        self.control.alone_count -= times
        return times

    def forget_others(self) -> None:
        """Drop what an earlier daemon had watched and this one does not: it ended meanwhile. Raises
        BpfError."""
        for cgroup in [c for c in self._limits.keys() if c not in self._entries]:
            self._limits.pop(cgroup)
            self._states.pop(cgroup)
        self._count_denied()

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Hand over events on the running loop from now on. Raises BpfError."""
        self._ring = RingBuffer(self._bpf.map_fd("events"), handle)
        self._ring.start()

    @property
    def states_fd(self) -> int:
        """Descriptor of the map of findings, which stays the object's. Raises BpfError."""
        return self._bpf.map_fd("states")

    # Cgroups

    def watch(
        self, cgroup: CgroupId, kind: abi.CgroupKind, parent: CgroupId | None, priority: int = 0
    ) -> None:
        """Make a cgroup known, without a mark. Raises BpfError; the cgroup is not known then."""
        entry = abi.MemoryLimits(parent_id=parent or 0, kind=kind, priority=priority)
        self._states[cgroup] = abi.MemoryState()
        try:
            self._limits[cgroup] = entry
        except BaseException:
            self._states.pop(cgroup)
            raise
        self._entries[cgroup] = entry

    def forget(self, cgroup: CgroupId) -> None:
        """Drop a cgroup; no error if it is not known. Raises BpfError."""
        if self._entries.pop(cgroup, None) is not None:
            self._limits.pop(cgroup)
            self._states.pop(cgroup)
            if self.control.denying:
                self._count_denied()

    def set_mark(self, cgroup: CgroupId, soft_bytes: int, low_bytes: int) -> None:
        """Have an event sent when usage rises above `soft_bytes`, and another when it then falls
        below `low_bytes`; 0: no mark. Raises BpfError."""
        self._change(cgroup, soft_mark_bytes=soft_bytes, soft_low_bytes=low_bytes)

    def set_throttle_mark(self, cgroup: CgroupId, mark_bytes: int, *, strict: bool = False) -> None:
        """Set the usage above which the CPU scheduler slows a call; 0: its memory.high. Raises
        BpfError; with `strict` also for a call that is not watched."""
        if strict and cgroup not in self._entries:
            raise BpfError(f"cgroup {cgroup} is not watched", errno.ENOENT)
        self._change(cgroup, throttle_mark_bytes=mark_bytes)

    def set_willing(self, cgroup: CgroupId, willing: bool) -> None:
        """Say whether a call would rather be refused memory than wait: only such calls are denied
        growth by the urgent reaction. Raises BpfError."""
        self._change(cgroup, willing=int(willing))

    def set_priority(self, cgroup: CgroupId, priority: int) -> None:
        """Say how important a session, or its agent, is. Raises BpfError."""
        self._change(cgroup, priority=priority)

    def set_rates(self, cgroup: CgroupId, faults_per_s: int, refaults_per_s: int) -> None:
        """Have an event sent when page faults or refaults come faster than this, and another when
        they have fallen to half of it; 0: not watched. Raises BpfError."""
        self._change(cgroup, faults_per_s=faults_per_s, refaults_per_s=refaults_per_s)

    def deny_above(self, cgroup: CgroupId, mark_bytes: int) -> None:
        """Refuse memory (ENOMEM) that would take a call above the mark. Small requests still pass,
        up to an allowance that all denied calls share, so that a program can report what happened.
        Raises BpfError, also for a call that is not watched."""
        entry = self._entries.get(cgroup)
        if entry is None:
            raise BpfError(f"cgroup {cgroup} is not watched", errno.ENOENT)
        self._change(
            cgroup,
            deny_mode=abi.DenyMode.OVER_MARK,
            deny_mark_bytes=mark_bytes,
            deny_round=(entry.deny_round + 1) & 0x7FFFFFFF,
        )
        self._count_denied()

    def allow(self, cgroup: CgroupId) -> None:
        """End `deny_above`. Raises BpfError."""
        self._change(cgroup, deny_mode=abi.DenyMode.NEVER, deny_mark_bytes=0)
        self._count_denied()

    def _count_denied(self) -> None:
        """Tell the programs how many calls are denied memory: with none, the one that runs at every
        mmap() returns at once."""
        entries = self._entries.values()
        denying = sum(e.deny_mode != abi.DenyMode.NEVER for e in entries)
        if denying and not self.control.denying:
            self.control.allowed_bytes = 0
        self.control.denying = denying

    def _change(self, cgroup: CgroupId, **values: int) -> None:
        entry = self._entries.get(cgroup)
        if entry is None:
            return  # watch() failed, and its caller was told
        for name, value in values.items():
            setattr(entry, name, value)
        self._limits[cgroup] = entry

    def state(self, cgroup: CgroupId) -> abi.MemoryState | None:
        """Findings for a cgroup; None: it is not known. Raises BpfError."""
        return self._states.get(cgroup)

    # The urgent reaction

    def protect(self, sessions: Iterable[tuple[CgroupId, int]], pool: CgroupId | None) -> int:
        """Set the protected sessions: (cgroup, priority), most important first. Returns how many of
        them there was room for. The protection holds while `pool` is above its soft mark; None: it
        never does."""
        control, before = self.control, self._slots()
        chosen = list(sessions)[: abi.ABI_PROTECTED_MAX]
        control.pool_id = pool or 0
        state = None if pool is None else self.state(pool)
        control.pool_above = 0 if state is None else state.above_mark
        # Programs read as many slots as the count says, so none reads one that is changing.
        control.protected_count = 0
        for slot, (cgroup, priority) in zip(control.protected_sessions, chosen, strict=False):
            old = before.get(cgroup, (0, 0, 0, 0))
            slot.cgroup_id, slot.priority = cgroup, priority
            slot.stalling, slot.stalling_since_ns, slot.window_ns, slot.stalled_ns = old
        control.protected_count = len(chosen)
        return len(chosen)

    def _slots(self) -> dict[int, tuple[int, int, int, int]]:
        """Stalls of the protected sessions, by cgroup: what a slot holds besides its owner."""
        slots = self.control.protected_sessions[: self.control.protected_count]
        return {
            slot.cgroup_id: (
                slot.stalling,
                slot.stalling_since_ns,
                slot.window_ns,
                slot.stalled_ns,
            )
            for slot in slots
        }

    def confirm_urgent(self, usec: int) -> None:
        """Extend the urgent reaction: deny growth for `usec` from now."""
        self.control.urgent_until_ns = time.monotonic_ns() + usec * 1000

    def lift_urgent(self, usec: int) -> None:
        """End the urgent reaction, and keep the program from another one for `usec` from now."""
        self.control.lifted_until_ns = time.monotonic_ns() + usec * 1000
        self.control.urgent_until_ns = 0

    def lost(self) -> dict[str, int]:
        """Number of losses since the load: events without room in the ring buffer ("memory"), and
        checks of marks and rates for want of a cgroup's state ("memory_state")."""
        counts = {"memory": self.control.lost, "memory_state": self.control.untracked}
        return {kind: count for kind, count in counts.items() if count}

    def close(self) -> None:
        """Detach the programs and unload them."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._bpf.close()
