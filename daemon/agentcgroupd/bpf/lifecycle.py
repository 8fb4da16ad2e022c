"""lifecycle.bpf.c on the daemon's side: which cgroups are watched, and what happens in them."""

from __future__ import annotations

from collections.abc import Callable

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent, RingBuffer
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.units import CgroupId


class Lifecycle:
    """Processes under managed cgroups, as they come and go."""

    def __init__(self, bpf: BpfObject) -> None:
        """Takes over a loaded and attached object."""
        self._bpf = bpf
        self._managed = bpf.map("managed", abi.Managed)
        self.counters = bpf.shared("counters", abi.LifecycleCounters)
        self._ring: RingBuffer | None = None

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Hand over events on the running loop from now on."""
        self._ring = RingBuffer(self._bpf.map_fd("events"), handle)
        self._ring.start()

    def manage(self, cgroup: CgroupId, kind: abi.CgroupKind) -> None:
        """Watch a cgroup and what is below it. Raises BpfError; E2BIG: no room for another."""
        self._managed[cgroup] = abi.Managed(kind=kind)

    def unmanage(self, cgroup: CgroupId) -> None:
        """Stop watching; no error if it was not watched. Raises BpfError."""
        self._managed.pop(cgroup)

    def drain(self) -> None:
        """Hand over at once what is there."""
        if self._ring is not None:
            self._ring.drain()

    def read(self, on: bool) -> None:
        """Go on handing over events, or leave them in the ring buffer for a while."""
        if self._ring is not None:
            self._ring.read(on)

    def lost(self) -> dict[str, int]:
        """Events without room in the ring buffer since the load, by type."""
        return {kind.name.lower(): count for kind, count in
                zip(abi.EventType, self.counters.lost, strict=False) if count}  # fmt: skip

    def missed(self) -> dict[str, int]:
        """Events for which a program did not run, because another task had interrupted it on that
        CPU, by type. Raises BpfError."""
        programs = {"fork": "on_fork", "exec": "on_exec", "exit": "on_exit"}
        counts = {kind: self._bpf.missed(name) for kind, name in programs.items()}
        return {kind: count for kind, count in counts.items() if count}

    def close(self) -> None:
        """Detach and give up everything."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._bpf.close()
