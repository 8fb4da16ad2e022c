"""Conversion from the daemon's own types to those of agentcgroup.proto."""

from __future__ import annotations

from dataclasses import asdict

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.sched import CpuNumbers
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import RequestError
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.session import Call, Session, path_of


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
    )


def cpu_to_proto(numbers: CpuNumbers) -> pb.CpuNumbers:
    """What the scheduler counted, as sent."""
    return pb.CpuNumbers(**asdict(numbers))


def usage_of(cgroup: Cgroup) -> pb.Usage:
    """What a cgroup uses now. Raises CgroupGone."""
    return pb.Usage(
        memory_current_bytes=cgroup.read_if(knobs.MEMORY_CURRENT),
        memory_peak_bytes=cgroup.read_if(knobs.MEMORY_PEAK),
        cpu_usage_usec=cgroup.read(knobs.CPU_STAT)["usage_usec"],
        pids_current=cgroup.read_if(knobs.PIDS_CURRENT),
    )


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
    return pb.Call(
        id=call.id,
        session_id=call.session.id,
        name=call.name,
        argv=call.argv,
        state=call.state,
        grant=grant_to_proto(call.grant),
        cgroup_id=call.cgroup.id,
        cgroup_path=path_of(call) if admin else "",
        began_unix_usec=call.began_unix_usec,
        observed=call.observed,
        waited_usec=call.waited_usec,
        parent_call_id=call.parent.id if call.parent is not None else "",
        usage=usage_of(call.cgroup) if usage else None,
    )


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
        usage=usage_of(session.cgroup),
        not_enforced=not_enforced,
        opened_unix_usec=session.opened_unix_usec,
        owner_pid=session.owner.pid if session.owner is not None and admin else 0,
        cpu=cpu_to_proto(cpu) if cpu is not None else None,
        container=session.container if admin else "",
    )
