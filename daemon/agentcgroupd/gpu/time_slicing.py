"""Carries out the arbiter's time slices: freezes and thaws cgroups, by the event loop's clock.

The memory guard freezes as well. A cgroup is frozen while either of the two wants it so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from agentcgroupd.cgroup import knobs
from agentcgroupd.errors import KnobError
from agentcgroupd.gpu.arbiter import Arbiter, Settings, Tenant
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.state.session import boottime_usec

log = logging.getLogger(__name__)


class TimeSlicing:
    """Holds tenants back as the arbiter decides. Made and used on a running loop."""

    def __init__(self, settings: Settings, tenants: Mapping[str, GpuTenant]) -> None:
        """`tenants`: all there are, by id; those given to `add` are among them."""
        self.arbiter = Arbiter(settings)
        self._tenants = tenants
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.switches = 0

    def add(self, tenant: GpuTenant) -> None:
        """Slice time for a tenant from now on, once it has work."""
        devices = frozenset(device.uuid for device in tenant.devices)
        sliced = Tenant(tenant.id, tenant.percent, tenant.priority, devices)
        self.arbiter.add(sliced, boottime_usec())

    def remove(self, tenant: GpuTenant) -> None:
        """Let a tenant go, thawed; no error if it is unknown."""
        self.arbiter.remove(tenant.id, boottime_usec())
        self._release(tenant)
        self.apply()

    def change(self, tenant: GpuTenant) -> None:
        """Take over a tenant's new share and priority."""
        if tenant.id in self.arbiter.tenants:
            self.arbiter.change(tenant.id, tenant.percent, tenant.priority, boottime_usec())
            self.apply()

    def set_wants(self, tenant: GpuTenant, wants: bool) -> None:
        """Note whether a tenant has work for its devices."""
        known = tenant.id in self.arbiter.tenants
        if known and self.arbiter.set_wants(tenant.id, wants, boottime_usec()):
            self.apply()

    def apply(self) -> None:
        """Ask the arbiter and carry out what it decides. Those that go on are thawed before others
        are frozen, so that no device stands idle."""
        self._cancel_timer()
        now = boottime_usec()
        decided = self.arbiter.decide(now)
        for tenant_id in decided.run:
            if tenant_id in self._tenants:
                self._release(self._tenants[tenant_id])
        for tenant_id in decided.hold:
            if tenant_id in self._tenants:
                self._hold(self._tenants[tenant_id])
        if decided.until_usec is not None:
            self._timer = self._loop.call_later((decided.until_usec - now) / 1e6, self.apply)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hold(self, tenant: GpuTenant) -> None:
        """Freeze a tenant; no error if it is held already."""
        if tenant.held_since_usec is not None:
            return
        try:
            self._freeze(tenant, True)
        except KnobError as error:
            log.debug("%s: %s", tenant.name, error)
            return
        tenant.held_since_usec = boottime_usec()
        if tenant.call is not None:
            tenant.call.held_for_slice = True
        self.switches += 1

    def _release(self, tenant: GpuTenant) -> None:
        """Thaw a tenant; no error if it is not held."""
        if tenant.held_since_usec is None:
            return
        try:
            self._freeze(tenant, False)
        except KnobError as error:
            log.debug("%s: %s", tenant.name, error)
        held = boottime_usec() - tenant.held_since_usec
        tenant.held_usec += held
        tenant.held_since_usec = None
        if tenant.call is not None:
            tenant.call.held_for_slice = False
            tenant.call.sliced_usec += held

    @staticmethod
    def _freeze(tenant: GpuTenant, frozen: bool) -> None:
        """Freeze or thaw the cgroup, unless the memory guard holds it frozen. Raises KnobError."""
        call = tenant.call
        if call is None or (call.frozen_since_usec is None and call.operator_since_usec is None):
            tenant.cgroup.write(knobs.CGROUP_FREEZE, frozen)

    def stop(self) -> None:
        """Thaw everyone who is held back."""
        self._cancel_timer()
        for tenant in self._tenants.values():
            self._release(tenant)
