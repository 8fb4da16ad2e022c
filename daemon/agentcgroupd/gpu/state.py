"""What is known of GPUs: the devices, and who has which part of them.

The other modules of this package are given this state; none of them knows the service that puts
them together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agentcgroupd.gpu.allocation import Holding
from agentcgroupd.gpu.tenant import GpuTenant, session_tenant_id
from agentcgroupd.intents.gpu import Device, GpuCeiling
from agentcgroupd.state.session import Session

CALL_LEAF = "call-"
"""Begins the name of a call's cgroup below its session's."""


class GpuState:
    """Devices and tenants, kept by the service, read by everyone else in this package."""

    def __init__(self, place_of: Callable[[int], tuple[Session, str] | None]) -> None:
        """`place_of`: from a pid to its session and the name of its leaf there, or None."""
        self._place_of = place_of
        self.ceiling = GpuCeiling(why_none="switched off in the configuration (gpu.enabled)")
        """What calls may ask for; without devices, why there are none."""
        self.tenants: dict[str, GpuTenant] = {}
        """Calls and sessions that have a part, by GpuTenant.id."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices to grant from, those that are lost among them."""
        return self.ceiling.devices

    def holdings(self) -> list[Holding]:
        """Parts that open calls and sessions have."""
        return [tenant.holding for tenant in self.tenants.values()]

    def owner(self, pid: int) -> GpuTenant | None:
        """The tenant that a process belongs to; None where that has no part of a GPU."""
        place = self._place_of(pid)
        if place is None:
            return None
        session, leaf = place
        if leaf.startswith(CALL_LEAF):
            return self.tenants.get(leaf.removeprefix(CALL_LEAF))
        return self.tenants.get(session_tenant_id(session))

    def device(self, uuid: str) -> Device:
        """The device of that UUID. Raises KeyError."""
        return {device.uuid: device for device in self.devices}[uuid]

    def tenants_on(self, uuid: str) -> list[GpuTenant]:
        """Tenants that have a part of a device."""
        return [t for t in self.tenants.values() if any(d.uuid == uuid for d in t.devices)]

    def mark_lost(self, uuid: str) -> bool:
        """Grant nothing more on a device; False where it is unknown or was marked before."""
        if all(device.lost for device in self.devices if device.uuid == uuid):
            return False
        self.ceiling = replace(
            self.ceiling,
            devices=tuple(
                replace(device, lost=True) if device.uuid == uuid else device
                for device in self.devices
            ),
        )
        return True
