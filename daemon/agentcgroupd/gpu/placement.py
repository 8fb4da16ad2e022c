"""Devices for sessions that ask for a part, changes of a part in an open call, and what is left."""

from __future__ import annotations

from dataclasses import replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField, ResourceExhausted
from agentcgroupd.gpu import allocation
from agentcgroupd.gpu.activity import Activity
from agentcgroupd.gpu.enforcement import Enforcement
from agentcgroupd.gpu.resource import GpuResource, describe
from agentcgroupd.gpu.state import GpuState
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.intents.gpu_part import Part
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.session import Call
from agentcgroupd.units import show_bytes


class Grants:
    """Parts of the devices, as they are granted and changed."""

    def __init__(
        self, state: GpuState, resource: GpuResource, enforcement: Enforcement, activity: Activity
    ) -> None:
        self._state, self._resource = state, resource
        self._enforcement, self._activity = enforcement, activity

    def place_part(self, part: Part) -> tuple[str, ...]:
        """Find the devices for a session's part, by UUID. Raises ResourceExhausted when there is
        not enough of them now."""
        devices = allocation.place(
            part.devices,
            part.percent,
            part.memory_bytes,
            self._state.devices,
            self._resource.holdings(),
        )
        if devices is None:
            asked, there = describe(part.percent, part.memory_bytes), self._resource.allowed()
            sentence = f"gpu: {asked} is not there ({there})"
            raise ResourceExhausted(sentence, "gpu", f"{part.percent}%", there)
        return devices

    def regrant(self, call: Call, grant: Grant) -> Grant:
        """Change the part of an open call to that of its new grant, and give the grant with its
        environment. Raises RequestError, with nothing changed."""
        old = call.grant
        if call.parent is not None:
            return grant  # the part is that of the call around it
        part = grant.gpu_percent, grant.gpu_memory_bytes, grant.gpu_priority
        if part == (old.gpu_percent, old.gpu_memory_bytes, old.gpu_priority):
            return grant
        tenant = self._state.tenants.get(call.id)
        if tenant is None:
            allowed = "nothing in an open call that began without a part of a GPU"
            why = "begin another call for it"
            raise InvalidField("gpu", f"{grant.gpu_percent}%", allowed, why)
        self._check_free(tenant, grant)
        grant = self._resource.with_devices(grant, old.gpu_devices)
        if self._enforcement.mps is not None:
            later = "gpu: MPS gives the new share to processes that the call starts from now on."
            grant = replace(grant, advice=(*grant.advice, later))
        tenant.percent, tenant.priority = grant.gpu_percent or 0, grant.gpu_priority or 0
        tenant.memory_bytes = grant.gpu_memory_bytes or 0
        self._activity.set_quota(tenant)
        if self._enforcement.time_slicing is not None:
            self._enforcement.time_slicing.change(tenant)
        self._resource.freed()
        return grant

    def _check_free(self, tenant: GpuTenant, grant: Grant) -> None:
        """Refuse a part larger than what the others on its devices leave. Raises
        ResourceExhausted."""
        percent, memory = grant.gpu_percent or 0, grant.gpu_memory_bytes or 0
        others = [t.holding for t in self._state.tenants.values() if t is not tenant]
        for device in tenant.devices:
            free = allocation.free_of(device, others)
            if percent <= free.percent and memory <= free.memory_bytes:
                continue
            there = f"{self._resource.allowed()} beside what the call has"
            sentence = f"gpu: {describe(percent, memory)} is not there ({there})"
            allowed = f"{free.percent} %, {show_bytes(free.memory_bytes)}"
            raise ResourceExhausted(sentence, "gpu", f"{grant.gpu_percent}%", allowed)

    def budget(self) -> list[pb.GpuBudget]:
        """Say what of each device is granted to nobody."""
        holdings = self._resource.holdings()
        found = []
        for device in self._state.devices:
            free = allocation.free_of(device, holdings)
            budget = pb.GpuBudget(
                index=device.index,
                uuid=device.uuid,
                name=device.name,
                lost=device.lost,
                percent_available=free.percent,
                memory_total_bytes=device.memory_bytes,
                memory_available_bytes=free.memory_bytes,
            )
            found.append(budget)
        return found
