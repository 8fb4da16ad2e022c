"""memory.bpf.c on the daemon's side: marks, denied growth, and who is protected."""

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


class MemoryPrograms:
    """What the programs know of each managed cgroup."""

    def __init__(self, bpf: BpfObject, config: GuardConfig) -> None:
        """Takes over a loaded and attached object. Raises BpfError."""
        self._bpf = bpf
        self._limits = bpf.map("limits", abi.MemoryLimits)
        self._states = bpf.map("states", abi.MemoryState)
        self._entries: dict[CgroupId, abi.MemoryLimits] = {}
        self.control = bpf.shared("control", abi.MemoryControl)
        self.control.allowance_bytes = config.deny_allowance
        self.control.stall_threshold_ns = config.stall_threshold * 1000
        self.control.stall_window_ns = config.stall_window * 1000
        self.control.urgent_lease_ns = config.urgent_lease * 1000
        self._ring: RingBuffer | None = None

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Hand over events on the running loop from now on."""
        self._ring = RingBuffer(self._bpf.map_fd("events"), handle)
        self._ring.start()

    @property
    def states_fd(self) -> int:
        """Descriptor of the map of what has been seen, which stays the object's."""
        return self._bpf.map_fd("states")

    # Cgroups

    def watch(
        self, cgroup: CgroupId, kind: abi.CgroupKind, parent: CgroupId | None, priority: int = 0
    ) -> None:
        """Know a cgroup, with no mark yet. Raises BpfError, and then it is not known."""
        entry = abi.MemoryLimits(parent_id=parent or 0, kind=kind, priority=priority)
        self._states[cgroup] = abi.MemoryState()
        try:
            self._limits[cgroup] = entry
        except BaseException:
            self._states.pop(cgroup)
            raise
        self._entries[cgroup] = entry

    def forget(self, cgroup: CgroupId) -> None:
        """No error if it is not known. Raises BpfError."""
        if self._entries.pop(cgroup, None) is not None:
            self._limits.pop(cgroup)
            self._states.pop(cgroup)
            if self.control.denying:
                self._count_denied()

    def set_mark(self, cgroup: CgroupId, soft_bytes: int, low_bytes: int) -> None:
        """Tell when usage rises above `soft_bytes`, and when it falls below `low_bytes` after
        that; 0: no mark. Raises BpfError."""
        self._change(cgroup, soft_mark_bytes=soft_bytes, soft_low_bytes=low_bytes)

    def set_throttle_mark(self, cgroup: CgroupId, mark_bytes: int, *, strict: bool = False) -> None:
        """A call that grows beyond the mark is told to the CPU scheduler, which slows it; 0: beyond
        its memory.high. Raises BpfError; `strict`: also for a call that is not watched."""
        if strict and cgroup not in self._entries:
            raise BpfError(f"cgroup {cgroup} is not watched", errno.ENOENT)
        self._change(cgroup, throttle_mark_bytes=mark_bytes)

    def set_rates(self, cgroup: CgroupId, faults_per_s: int, refaults_per_s: int) -> None:
        """Tell when page faults or refaults come faster, and when they have fallen to half of
        that; 0: not watched. Raises BpfError."""
        self._change(cgroup, faults_per_s=faults_per_s, refaults_per_s=refaults_per_s)

    def deny_above(self, cgroup: CgroupId, mark_bytes: int) -> None:
        """Refuse memory (ENOMEM) that would take a call above the mark. Small requests pass up to
        the allowance, so that a program can say what happened. Raises BpfError, also for a call
        that is not watched."""
        entry = self._entries.get(cgroup)
        if entry is None:
            raise BpfError(f"cgroup {cgroup} is not watched", errno.ENOENT)
        self._change(cgroup, deny_mode=abi.DenyMode.OVER_MARK, deny_mark_bytes=mark_bytes,
                     deny_round=(entry.deny_round + 1) & 0x7FFFFFFF)  # fmt: skip
        self._count_denied()

    def allow(self, cgroup: CgroupId) -> None:
        """Refuse nothing any more. Raises BpfError."""
        self._change(cgroup, deny_mode=abi.DenyMode.NEVER, deny_mark_bytes=0)
        self._count_denied()

    def _count_denied(self) -> None:
        """While there are none, the program on the way of every mapping ends at once."""
        entries = self._entries.values()
        self.control.denying = sum(e.deny_mode != abi.DenyMode.NEVER for e in entries)

    def _change(self, cgroup: CgroupId, **values: int) -> None:
        entry = self._entries.get(cgroup)
        if entry is None:
            return  # it could not be watched, which has been said
        for name, value in values.items():
            setattr(entry, name, value)
        self._limits[cgroup] = entry

    def state(self, cgroup: CgroupId) -> abi.MemoryState | None:
        """What has been seen of a cgroup. Raises BpfError."""
        return self._states.get(cgroup)

    # The urgent reaction

    def protect(self, sessions: Iterable[tuple[CgroupId, int]], pool: CgroupId | None) -> int:
        """Who is protected: (session's cgroup, priority), most important first, as many as fit;
        returns how many did. Only while the pool is above its soft mark; None: nobody is."""
        control, before = self.control, self._slots()
        chosen = list(sessions)[: abi.ABI_PROTECTED_MAX]
        control.pool_id = pool or 0
        # Readers stop at the count: those beyond it are not looked at while the slots change.
        control.protected_count = 0
        for slot, (cgroup, priority) in zip(control.protected_sessions, chosen, strict=False):
            old = before.get(cgroup, (0, 0, 0, 0))
            slot.cgroup_id, slot.priority = cgroup, priority
            slot.stalling, slot.stalling_since_ns, slot.window_ns, slot.stalled_ns = old
        control.protected_count = len(chosen)
        return len(chosen)

    def _slots(self) -> dict[int, tuple[int, int, int, int]]:
        slots = self.control.protected_sessions[: self.control.protected_count]
        return {s.cgroup_id: (s.stalling, s.stalling_since_ns, s.window_ns, s.stalled_ns)
                for s in slots}  # fmt: skip

    def confirm_urgent(self, usec: int) -> None:
        """Go on denying for this long from now."""
        self.control.urgent_until_ns = time.monotonic_ns() + usec * 1000

    def lift_urgent(self, usec: int) -> None:
        """Deny no more, and let the program not begin anew for this long."""
        self.control.lifted_until_ns = time.monotonic_ns() + usec * 1000
        self.control.urgent_until_ns = 0

    def lost(self) -> dict[str, int]:
        """What has not reached the daemon since the load: events without room in the ring buffer,
        and marks and rates of cgroups without a state."""
        counts = {"memory": self.control.lost, "memory_state": self.control.untracked}
        return {kind: count for kind, count in counts.items() if count}

    def close(self) -> None:
        """Detach and give up everything."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._bpf.close()
