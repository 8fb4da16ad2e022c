"""Who has a part of a GPU, as the parts of this package see it."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.gpu.allocation import Holding
from agentcgroupd.intents.gpu import Device
from agentcgroupd.state.session import Call, Session


@dataclass(slots=True, eq=False)
class GpuTenant:
    """A call, or a session's own agent leaf (`call` None), with its part and what it did."""

    id: str
    session: Session
    call: Call | None
    cgroup: Cgroup
    devices: tuple[Device, ...]
    percent: int
    memory_bytes: int
    priority: int
    since_usec: int
    pids: set[int] = field(default_factory=set)
    """Those that NVML has shown on a device."""
    memory_now_bytes: int | None = None
    memory_peak_bytes: int | None = None
    sm_sum: float = 0.0
    """Percent times microseconds, over all its devices."""
    sm_usec: int = 0
    energy_mj: float = 0.0
    energy_known: bool = False
    over_since_usec: int | None = None
    """Since when more than the quota is held."""
    told: set[str] = field(default_factory=set)
    """What it was told and need not be again."""
    launch_links: dict[int, int] = field(default_factory=dict)
    """Probes on what it launches, by pid."""
    launches: int = 0
    """How many of them had been seen at the last look."""
    looked_at: set[int] = field(default_factory=set)
    """Processes that NVML has shown, and whose libcuda was then looked for."""
    held_since_usec: int | None = None
    held_usec: int = 0
    ran_before_usec: int = 0
    """For how long it had been let run when it was last seen to use a device."""
    feedback: list[pb.Feedback] = field(default_factory=list)
    """For the report."""
    busy_usec: int = 0
    """When it was last seen to use a device, since boot."""

    @property
    def holding(self) -> Holding:
        """For admission."""
        return Holding(tuple(d.uuid for d in self.devices), self.percent, self.memory_bytes)

    def ran_usec(self, now_usec: int) -> int:
        """For how long it has been let run altogether."""
        held = self.held_usec
        if self.held_since_usec is not None:
            held += now_usec - self.held_since_usec
        return now_usec - self.since_usec - held

    def uses(self, now_usec: int) -> None:
        """It is seen to use a device."""
        self.busy_usec, self.ran_before_usec = now_usec, self.ran_usec(now_usec)

    @property
    def watched(self) -> bool:
        """Whether the launches of all its processes are seen."""
        links = self.launch_links
        return bool(links) and min(links.values()) >= 0 and self.pids <= links.keys()

    @property
    def quota_bytes(self) -> int:
        """Of all its devices together: what a probe sees has no device."""
        return self.memory_bytes * len(self.devices)

    @property
    def name(self) -> str:
        """For messages."""
        return f"call {self.call.id}" if self.call else f"session {self.session.id}"
