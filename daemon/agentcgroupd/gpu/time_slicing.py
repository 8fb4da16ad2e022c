"""Applies the arbiter's turns: cgroups are frozen and thawed, on the event loop, by its clock.

Freezing is the memory guard's tool too. A cgroup is frozen while either of the two wants it so.
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


class Turns:
    """The arbiter with hands. On a running loop."""

    def __init__(self, settings: Settings, tenants: Mapping[str, GpuTenant]) -> None:
        """`tenants`: all there are, by id; those added here are among them."""
        self.arbiter = Arbiter(settings)
        self._tenants = tenants
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.switches = 0

    def add(self, tenant: GpuTenant) -> None:
        """It may want its devices from now on."""
        devices = frozenset(d.uuid for d in tenant.devices)
        self.arbiter.add(
            Tenant(tenant.id, tenant.percent, tenant.priority, devices), boottime_usec()
        )

    def remove(self, tenant: GpuTenant) -> None:
        """It is gone, or no longer held back by us."""
        self.arbiter.remove(tenant.id, boottime_usec())
        self._release(tenant)
        self.look()

    def change(self, tenant: GpuTenant) -> None:
        """Its grant has changed."""
        if tenant.id in self.arbiter.tenants:
            self.arbiter.change(tenant.id, tenant.percent, tenant.priority, boottime_usec())
            self.look()

    def want(self, tenant: GpuTenant, wants: bool) -> None:
        """It begins or stops to use its devices."""
        known = tenant.id in self.arbiter.tenants
        if known and self.arbiter.want(tenant.id, wants, boottime_usec()):
            self.look()

    def look(self) -> None:
        """Decide, and do it: those that go on before those that stop, so that no device stands
        idle."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = boottime_usec()
        turn = self.arbiter.decide(now)
        for tenant_id in turn.run:
            tenant = self._tenants.get(tenant_id)
            if tenant is not None and tenant.held_since_usec is not None:
                self._release(tenant)
        for tenant_id in turn.hold:
            tenant = self._tenants.get(tenant_id)
            if tenant is not None and tenant.held_since_usec is None:
                self._hold(tenant)
        if turn.until_usec is not None:
            self._timer = self._loop.call_later((turn.until_usec - now) / 1e6, self.look)

    def _hold(self, tenant: GpuTenant) -> None:
        call = tenant.call
        try:
            if call is None or call.frozen_since_usec is None:
                tenant.cgroup.write(knobs.CGROUP_FREEZE, True)
        except KnobError as error:
            log.debug("%s: %s", tenant.name, error)
            return
        tenant.held_since_usec = boottime_usec()
        if call is not None:
            call.held_for_turn = True
        self.switches += 1

    def _release(self, tenant: GpuTenant) -> None:
        if tenant.held_since_usec is None:
            return
        call = tenant.call
        try:
            if call is None or call.frozen_since_usec is None:
                tenant.cgroup.write(knobs.CGROUP_FREEZE, False)
        except KnobError as error:
            log.debug("%s: %s", tenant.name, error)
        tenant.held_usec += boottime_usec() - tenant.held_since_usec
        tenant.held_since_usec = None
        if call is not None:
            call.held_for_turn = False

    def stop(self) -> None:
        """Hold nobody back any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for tenant in self._tenants.values():
            self._release(tenant)
