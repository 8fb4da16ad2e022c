"""A tenant of GPUs: a call or a session that has a part of some devices."""

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
    """Processes that NVML has shown on a device."""
    memory_peak_bytes: int | None = None
    """By the driver's account; None: it has told none."""
    sm_sum: float = 0.0
    """Percent times microseconds, over all its devices."""
    sm_usec: int = 0
    """The time over which `sm_sum` was gathered; 0: the driver does not tell."""
    energy_mj: float = 0.0
    energy_known: bool = False
    over_since_usec: int | None = None
    """When it began to hold more than its quota; None: it holds no more."""
    told: set[str] = field(default_factory=set)
    """Feedback codes that it need not be sent again."""
    launch_links: dict[int, int] = field(default_factory=dict)
    """Descriptors of the probes on launches, by pid; -1: not attached yet."""
    launches: int = 0
    """Launches that had been seen at the last sample."""
    searched_pids: set[int] = field(default_factory=set)
    """Processes that NVML has shown and whose libcuda was then looked for."""
    held_since_usec: int | None = None
    """When it was held back for another's time slice; None: it runs."""
    held_usec: int = 0
    ran_before_usec: int = 0
    """How long it had been let run when it was last seen to use a device."""
    feedback: list[pb.Feedback] = field(default_factory=list)
    """Feedback for the report."""
    busy_usec: int = 0
    """When it was last seen to use a device, since boot."""

    @property
    def holding(self) -> Holding:
        """The tenant's part, as admission counts it."""
        return Holding(tuple(d.uuid for d in self.devices), self.percent, self.memory_bytes)

    def held_back_usec(self, now_usec: int) -> int:
        """How long it has been held back altogether."""
        if self.held_since_usec is None:
            return self.held_usec
        return self.held_usec + now_usec - self.held_since_usec

    def ran_usec(self, now_usec: int) -> int:
        """How long it has been let run altogether."""
        return now_usec - self.since_usec - self.held_back_usec(now_usec)

    def note_use(self, now_usec: int) -> None:
        """Note that it is seen to use a device."""
        self.busy_usec, self.ran_before_usec = now_usec, self.ran_usec(now_usec)

    @property
    def watched(self) -> bool:
        """Whether the launches of all its processes are seen."""
        links = self.launch_links
        return bool(links) and min(links.values()) >= 0 and self.pids <= links.keys()

    @property
    def quota_bytes(self) -> int:
        """The quota on all its devices together: probes do not see which device is used."""
        return self.memory_bytes * len(self.devices)

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"call {self.call.id}" if self.call else f"session {self.session.id}"


def session_tenant_id(session: Session) -> str:
    """The id of a session's own tenant; a call's tenant has the call's id."""
    return f"session:{session.id}"
