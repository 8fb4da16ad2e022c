"""Conversion from the daemon's own types to those of agentcgroup.proto."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.sched import CpuNumbers
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import RequestError
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.session import (
    Call,
    Session,
    boottime_usec,
    frozen_usec,
    held_around,
    path_of,
    stands_for_disk,
)


def grant_to_proto(grant: Grant) -> pb.Grant:
    """A grant as sent."""
    return pb.Grant(
        memory_expected_bytes=grant.memory_expected_bytes,
        memory_high_bytes=grant.memory_high_bytes,
        memory_max_bytes=grant.memory_max_bytes,
        cpu_weight=grant.cpu_weight,
        cpu_max_millicores=grant.cpu_max_millicores,
        pids_max=grant.pids_max,
        timeout_usec=grant.timeout_usec,
        priority=grant.priority,
        on_pressure=grant.on_pressure,
        leftovers=grant.leftovers,
        advice=grant.advice,
        not_enforced=grant.not_enforced,
        gpu_percent=grant.gpu_percent,
        gpu_memory_bytes=grant.gpu_memory_bytes,
        gpu_priority=grant.gpu_priority,
        gpu_devices=grant.gpu_devices,
        environment=dict(word.split("=", 1) for word in grant.environment),
        settings=grant.settings,
        disk_max_bytes=grant.disk_max_bytes,
        net_send_bytes_per_s=grant.net_send_bytes_per_s,
    )


def cpu_to_proto(numbers: CpuNumbers) -> pb.CpuNumbers:
    """What the scheduler counted, as sent."""
    return pb.CpuNumbers(**asdict(numbers))


def usage_of(cgroup: Cgroup, traffic: Callable[[], pb.NetUsage | None] | None = None) -> pb.Usage:
    """What a cgroup uses now. `traffic` reads what its sockets have received and sent; None: nobody
    counts it. Raises CgroupGone."""
    found = cgroup.read_if(knobs.IO_STAT)
    devices = None if found is None else found.values()
    return pb.Usage(
        memory_current_bytes=cgroup.read_if(knobs.MEMORY_CURRENT),
        memory_peak_bytes=cgroup.read_if(knobs.MEMORY_PEAK),
        cpu_usage_usec=cgroup.read(knobs.CPU_STAT)["usage_usec"],
        pids_current=cgroup.read_if(knobs.PIDS_CURRENT),
        io_read_bytes=None if devices is None else sum(d.get("rbytes", 0) for d in devices),
        io_write_bytes=None if devices is None else sum(d.get("wbytes", 0) for d in devices),
        net=traffic() if traffic is not None else None,
    )


_PRESSURES = {
    "memory_some_percent": (knobs.MEMORY_PRESSURE, "some"),
    "memory_full_percent": (knobs.MEMORY_PRESSURE, "full"),
    "cpu_some_percent": (knobs.CPU_PRESSURE, "some"),
    "io_some_percent": (knobs.IO_PRESSURE, "some"),
}


def pool_pressure(cgroup: Cgroup) -> dict[str, float]:
    """Give the fields of the message Pool that tell how much its tasks wait; none where the kernel
    does not tell. Raises KnobError."""
    found = {}
    for name, (knob, kind) in _PRESSURES.items():
        pressure = cgroup.read_if(knob)
        if pressure is not None and kind in pressure:
            found[name] = pressure[kind].avg10
    return found


def error_to_proto(error: RequestError) -> pb.Error:
    """A refusal in parts."""
    return pb.Error(
        code=error.code,
        field=error.field,
        value=error.value,
        allowed=error.allowed,
        sentence=error.sentence,
    )


def call_to_proto(call: Call, admin: bool, usage: bool = False) -> pb.Call:
    """A call; where its cgroup is, is told to the operator only."""
    holder = held_around(call)
    stands = holder is not None or stands_for_disk(call)
    is_held = stands and call.state != pb.CALL_STATE_ENDING
    return pb.Call(
        id=call.id,
        session_id=call.session.id,
        name=call.name,
        argv=call.argv,
        state=pb.CALL_STATE_FROZEN if is_held else call.state,
        grant=grant_to_proto(call.grant),
        cgroup_id=call.cgroup.id,
        cgroup_path=path_of(call) if admin else "",
        began_unix_usec=call.began_unix_usec,
        observed=call.observed,
        waited_usec=call.waited_usec,
        parent_call_id=call.parent.id if call.parent is not None else "",
        usage=usage_of(call.cgroup, call.traffic) if usage else None,
        paused_why=_why_paused(holder or call) if is_paused(call) else "",
        frozen_usec=frozen_usec(call, boottime_usec()),
        memory_high_bytes=call.bounds.written[0] if call.bounds.written else None,
        held=holder is not None,
    )


def is_paused(call: Call) -> bool:
    """Tell whether a call is paused, by whomever."""
    if call.frozen_since_usec is not None or stands_for_disk(call):
        return True
    return held_around(call) is not None


def _why_paused(call: Call) -> str:
    """Say why a call is paused: what its agent was told then, of it or the call that it is in."""
    each: Call | None = call
    while each is not None:
        for feedback in reversed(each.history):
            if feedback.code == pb.FEEDBACK_CODE_FROZEN:
                return feedback.sentence
        each = each.parent
    return ""


def session_to_proto(
    session: Session, admin: bool, not_enforced: list[str], cpu: CpuNumbers | None = None
) -> pb.Session:
    """A session with what it uses now. Raises CgroupGone."""
    limits = session.limits
    return pb.Session(
        id=session.id,
        cgroup_path=session.cgroup_path if admin else "",
        cgroup_id=session.cgroup.id,
        adopted=session.adopted,
        priority=limits.priority,
        memory_low_bytes=limits.memory_low_bytes,
        memory_high_bytes=limits.memory_high_bytes,
        memory_max_bytes=limits.memory_max_bytes,
        cpu_weight=limits.cpu_weight,
        cpu_max_millicores=limits.cpu_max_millicores,
        pids_max=limits.pids_max,
        calls_max=limits.calls_max,
        calls_open=len(session.calls),
        calls_ended=session.calls_ended,
        usage=usage_of(session.cgroup, session.traffic),
        not_enforced=not_enforced,
        opened_unix_usec=session.opened_unix_usec,
        owner_pid=session.owner.pid if session.owner is not None and admin else 0,
        cpu=cpu_to_proto(cpu) if cpu is not None else None,
        container=session.container if admin else "",
        exec_is_call=limits.exec_is_call,
        labels=session.labels,
        io_weight=limits.io_weight,
        io_latency_usec=limits.io_latency_usec,
    )
