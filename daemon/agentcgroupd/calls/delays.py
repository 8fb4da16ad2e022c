"""What a call waited for: CPUs, disks, memory.

Read from the pressure stall information of the call's cgroup, when it has ended. Compared with the
kernel's delay accounting of single tasks (taskstats), that needs no switch (kernel.task_delayacct
is off by default), no message for each process that ends on the host, and misses no process of the
call; and it is wall time, which can be compared with the call's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.units import show_usec

TOLD_SHARE = 0.25
"""Part of its wall time for which a call waited, from which on its sentence says so."""
TOLD_LEAST_USEC = 1_000_000


def delays_of(
    read: Callable[[Knob[dict[str, int]]], dict[str, int] | None],
    memory: Mapping[str, int] | None,
) -> pb.Delays | None:
    """Read what a call waited for; None: this kernel does not tell. `read`: reads a file of its
    cgroup, None where it is not offered. `memory`: the totals of its memory.pressure. Raises
    KnobError."""
    cpu, io = read(knobs.CPU_STALLED), read(knobs.IO_STALLED)
    if cpu is None and io is None and memory is None:
        return None
    return pb.Delays(
        cpu_usec=_total(cpu, "some"),
        io_usec=_total(io, "some"),
        memory_usec=_total(memory, "some"),
        io_full_usec=_total(io, "full"),
        memory_full_usec=_total(memory, "full"),
    )


def _total(pressure: Mapping[str, int] | None, kind: str) -> int:
    """Give the time in all; 0 where the controller is not there, so that nobody can wait."""
    return pressure.get(kind, 0) if pressure else 0


def told(delays: pb.Delays | None, wall_usec: int) -> str:
    """Say for what a call waited much of its time; empty: for nothing. That it waited for memory
    is told by feedback, with what to do."""
    if delays is None:
        return ""
    waits = [("disks", delays.io_usec), ("a CPU", delays.cpu_usec)]
    least = max(TOLD_LEAST_USEC, TOLD_SHARE * wall_usec)
    much = [f"{show_usec(usec)} for {what}" for what, usec in waits if usec >= least]
    return f" Of its {show_usec(wall_usec)} it waited {' and '.join(much)}." if much else ""
