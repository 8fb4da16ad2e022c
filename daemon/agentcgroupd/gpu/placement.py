"""Devices for calls and sessions that ask for a part, their environment, and changes of a part in
an open call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField, ResourceExhausted
from agentcgroupd.gpu import allocation
from agentcgroupd.gpu.queue import describe, with_devices
from agentcgroupd.intents.gpu import Part, parse_device
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.session import Call
from agentcgroupd.units import show_bytes

if TYPE_CHECKING:
    from agentcgroupd.gpu.service import Gpus


class Grants:
    """Of what is free on the devices."""

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus

    def place(self, grant: Grant, call_id: str) -> Grant:
        """A grant with its devices; one that asks for none as it is. Raises ResourceExhausted when
        there is no room now."""
        if grant.gpu_percent is None:
            return grant
        memory = grant.gpu_memory_bytes or 0
        wanted = parse_device("gpu_device", grant.gpu_wanted)
        part = Part(grant.gpu_percent, memory, grant.gpu_priority or 0, wanted)
        devices = self._gpus.queue.placed(call_id) or self.place_part(part)
        return with_devices(grant, devices, self.environment(grant.gpu_percent, memory, devices))

    def place_part(self, part: Part) -> tuple[str, ...]:
        """Devices for a part. Raises ResourceExhausted when there is no room now."""
        devices = allocation.place(
            part.devices, part.percent, part.memory_bytes, self._gpus.ceiling.devices,
            self._gpus.queue.holdings(),
        )  # fmt: skip
        if devices is None:
            raise ResourceExhausted(
                f"gpu: {describe(part.percent, part.memory_bytes)} is not there "
                f"({self._gpus.queue.allowed()})", "gpu", f"{part.percent}%",
                self._gpus.queue.allowed(),
            )  # fmt: skip
        return devices

    def environment(self, percent: int, memory: int, devices: tuple[str, ...]) -> list[str]:
        """NAME=value for a tool: its devices by UUID and, where MPS works, what puts it there."""
        found = {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        if self._gpus.mps is not None and self._gpus.mps.works:
            found.update(self._gpus.mps.environment(percent, memory, len(devices)))
            if self._gpus.memory_held_by != "mps":
                del found["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]
        return [f"{name}={value}" for name, value in found.items()]

    def regrant(self, call: Call, grant: Grant) -> Grant:
        """The grant of an open call after a change of its part. Raises RequestError, with nothing
        changed."""
        tenant = self._gpus.tenants.get(call.id)
        old = call.grant
        same = (grant.gpu_percent, grant.gpu_memory_bytes, grant.gpu_priority) == (
            old.gpu_percent, old.gpu_memory_bytes, old.gpu_priority,
        )  # fmt: skip
        if same:
            return grant
        if tenant is None:
            raise InvalidField("gpu", f"{grant.gpu_percent}%", "nothing in an open call that began "
                               "without a part of a GPU", "begin another call for it")  # fmt: skip
        others = [t.holding for t in self._gpus.tenants.values() if t is not tenant]
        for device in tenant.devices:
            free = allocation.free_of(device, others)
            if (grant.gpu_percent or 0) > free.percent or (
                (grant.gpu_memory_bytes or 0) > free.memory_bytes
            ):
                raise ResourceExhausted(
                    f"gpu: {describe(grant.gpu_percent, grant.gpu_memory_bytes)} is not there "
                    f"({self._gpus.queue.allowed()} beside what the call has)", "gpu",
                    f"{grant.gpu_percent}%", f"{free.percent} %, {show_bytes(free.memory_bytes)}",
                )  # fmt: skip
        devices = old.gpu_devices
        grant = with_devices(grant, devices, self.environment(
            grant.gpu_percent or 0, grant.gpu_memory_bytes or 0, devices))  # fmt: skip
        if self._gpus.mps is not None:
            grant = replace(grant, advice=(*grant.advice, "gpu: MPS gives the new share to "
                            "processes that the call starts from now on."))  # fmt: skip
        tenant.percent, tenant.priority = grant.gpu_percent or 0, grant.gpu_priority or 0
        tenant.memory_bytes = grant.gpu_memory_bytes or 0
        self._gpus.set_quota(tenant)
        if self._gpus.turns is not None:
            self._gpus.turns.change(tenant)
        self._gpus.queue.look()
        return grant

    def budget(self) -> list[pb.GpuBudget]:
        """What of each device is granted to nobody."""
        holdings = self._gpus.queue.holdings()
        found = []
        for device in self._gpus.ceiling.devices:
            free = allocation.free_of(device, holdings)
            found.append(pb.GpuBudget(
                index=device.index, uuid=device.uuid, name=device.name, lost=device.lost,
                percent_available=free.percent, memory_total_bytes=device.memory_bytes,
                memory_available_bytes=free.memory_bytes,
            ))  # fmt: skip
        return found
