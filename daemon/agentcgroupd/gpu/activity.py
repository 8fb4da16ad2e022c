"""Which tenants work on their devices: what probes and samples show, passed on to the time slices.

A tenant that rests is not held back, and the first work that it launches then is told by a probe.
The probe is armed together with the quota, so both are set here.
"""

from __future__ import annotations

import logging
from typing import Literal

from agentcgroupd.bpf import abi
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu.arbiter import Tenant
from agentcgroupd.gpu.enforcement import Enforcement
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.state.session import boottime_usec

log = logging.getLogger(__name__)


class Activity:
    """Keeps the quota, the launch probe and the time slices of each tenant in step."""

    def __init__(
        self, watch_launches: Literal["important", "all", "off"], enforcement: Enforcement
    ) -> None:
        """`watch_launches`: whose launches are probed (gpu.watch_launches)."""
        self._watch_launches, self._enforcement = watch_launches, enforcement

    def set_quota(self, tenant: GpuTenant) -> None:
        """Give the probes a tenant's quota, and have them tell its next launch where it rests.
        Raises BpfError."""
        vram = self._enforcement.vram
        if vram is not None:
            vram.set_quota(tenant.cgroup.id, tenant.quota_bytes, self._tells_next_launch(tenant))

    def account(self, tenant: GpuTenant) -> abi.VramAccount | None:
        """What probes have seen of a tenant; None where none are loaded. Raises BpfError."""
        vram = self._enforcement.vram
        return None if vram is None else vram.account(tenant.cgroup.id)

    def wants(self, tenant: GpuTenant) -> bool | None:
        """Whether a tenant has work for its devices; None where it is not time-sliced."""
        sliced = self._sliced(tenant)
        return None if sliced is None else sliced.wants

    def set_wants(self, tenant: GpuTenant, wants: bool) -> None:
        """Note that a tenant begins or stops to have work for its devices."""
        slicing = self._enforcement.time_slicing
        if slicing is None:
            return
        if wants:
            tenant.note_use(boottime_usec())
        slicing.set_wants(tenant, wants)
        if not wants and self._tells_next_launch(tenant):
            try:
                self.set_quota(tenant)
                account = self.account(tenant)
            except BpfError as error:
                log.error("%s: %s", tenant.name, error)
                return
            if account is not None and account.launches != tenant.launches:
                # Launched after the last sample, before the probe was armed.
                self.set_wants(tenant, True)

    def probes_launches(self, tenant: GpuTenant) -> bool:
        """Whether launches of a time-sliced tenant are to be probed."""
        sliced = self._sliced(tenant)
        if sliced is None or self._watch_launches == "off":
            return False
        return self._watch_launches == "all" or sliced.important

    def _tells_next_launch(self, tenant: GpuTenant) -> bool:
        """Whether a probe is to tell at once when a tenant launches something. A tenant that the
        arbiter does not know yet counts as important and at rest."""
        if self._enforcement.time_slicing is None or self._watch_launches == "off":
            return False
        sliced = self._sliced(tenant)
        if sliced is None:
            return True
        return self.probes_launches(tenant) and not sliced.wants

    def _sliced(self, tenant: GpuTenant) -> Tenant | None:
        """A tenant as the arbiter knows it."""
        slicing = self._enforcement.time_slicing
        return None if slicing is None else slicing.arbiter.tenants.get(tenant.id)
