"""Whose time slice it is: slices of time on the GPUs in proportion to shares. No I/O and no clock.

Every tenant that wants a device has a virtual time, which runs slower the larger its share; the
tenant with the least virtual time is next. A tenant that wants nothing is never held back, and
where a single tenant wants a device nobody is. An important tenant that begins to want a device
gets it at once; while it goes on wanting, the others keep a small part, so that they stay alive.

A tenant has all of its devices in a slice or none: whoever wants a device that a tenant earlier in
the order has taken is held back.

Slices are counted, not use. What is queued at the end of a slice runs on into the next one, whose
owner's own queue runs on in the same way, so tenants that queue alike have what their slices say.
The driver's figures by process are not taken to correct that: it samples six times a second, and
where contexts alternate it was seen to show one with a third of what it had.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from agentcgroupd.units import IMPORTANT_PRIORITY


@dataclass(frozen=True, slots=True)
class Settings:
    """Lengths of slices, in microseconds, and the least part of a device's time."""

    period_usec: int = 200_000
    """Within this time every tenant that wants a device has a slice, unless that would make slices
    shorter than the shortest."""
    shortest_slice_usec: int = 10_000
    """A switch between tenants costs about one millisecond."""
    least_percent: int = 5
    """Percent of a device's time for all those together that make room for an important tenant."""


@dataclass(slots=True)
class Tenant:
    """Someone with a part of some devices."""

    id: str
    percent: int
    priority: int
    devices: frozenset[str]
    wants: bool = False
    virtual_usec: float = 0.0
    """Time had, in proportion to the share."""
    had_usec: int = 0
    """Time had while others wanted too; for reports and tests."""

    @property
    def important(self) -> bool:
        """Whether its work goes before that of tenants that are not important."""
        return self.priority >= IMPORTANT_PRIORITY


@dataclass(frozen=True, slots=True)
class TimeSlice:
    """Ids of the tenants that run and that are held back, until a time (None: until something
    changes)."""

    run: frozenset[str] = frozenset()
    hold: frozenset[str] = frozenset()
    until_usec: int | None = None


@dataclass(slots=True)
class Arbiter:
    """Decides who runs. Times are those of the caller's clock, and never go back."""

    settings: Settings = field(default_factory=Settings)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    slice: TimeSlice = field(default_factory=TimeSlice)
    _since_usec: int = 0

    def add(self, tenant: Tenant, now_usec: int) -> None:
        """Let a new tenant begin at the virtual time of the others."""
        self._account(now_usec)
        self.tenants[tenant.id] = tenant
        tenant.virtual_usec = self._level(tenant)

    def remove(self, tenant_id: str, now_usec: int) -> None:
        """Forget a tenant; no error if it is unknown."""
        self._account(now_usec)
        self.tenants.pop(tenant_id, None)

    def change(self, tenant_id: str, percent: int, priority: int, now_usec: int) -> None:
        """Give a tenant another share from now on. Raises KeyError."""
        self._account(now_usec)
        tenant = self.tenants[tenant_id]
        tenant.percent, tenant.priority = percent, priority

    def set_wants(self, tenant_id: str, wants: bool, now_usec: int) -> bool:
        """Note whether a tenant wants its devices; returns whether that is new. Raises KeyError."""
        tenant = self.tenants[tenant_id]
        if tenant.wants == wants:
            return False
        self._account(now_usec)
        if wants:
            # Time that it did not want is not owed to it; time that it had beyond the others'
            # still counts.
            tenant.virtual_usec = max(tenant.virtual_usec, self._level(tenant))
            if tenant.important:
                tenant.virtual_usec = min(tenant.virtual_usec, self._level(tenant) - 1.0)
        tenant.wants = wants
        return True

    def decide(self, now_usec: int) -> TimeSlice:
        """Choose who runs from now on, and how long that holds."""
        self._account(now_usec)
        wanting = [t for t in self.tenants.values() if t.wants]
        taken: set[str] = set()
        run: list[Tenant] = []
        hold: list[Tenant] = []
        for tenant in sorted(wanting, key=lambda t: (t.virtual_usec, -t.priority, t.id)):
            if tenant.devices & taken:
                hold.append(tenant)
            else:
                run.append(tenant)
                taken |= tenant.devices
        idle = [t.id for t in self.tenants.values() if not t.wants]
        self.slice = TimeSlice(
            run=frozenset([*(t.id for t in run), *idle]),
            hold=frozenset(t.id for t in hold),
            until_usec=now_usec + self._shortest(run, hold) if hold else None,
        )
        return self.slice

    def _rivals(self, tenant: Tenant) -> list[Tenant]:
        """Other tenants that want a device of this one's."""
        return [
            other
            for other in self.tenants.values()
            if other.wants and other is not tenant and other.devices & tenant.devices
        ]

    def _level(self, tenant: Tenant) -> float:
        """The least virtual time of a tenant's rivals; its own where it has none."""
        return min((t.virtual_usec for t in self._rivals(tenant)), default=tenant.virtual_usec)

    def _weight(self, tenant: Tenant) -> float:
        """A tenant's share against its rivals'. An important tenant weighs more beside those that
        are not, rather than those less: so the time that they had weighs the same once the
        important one has gone."""
        rivals = self._rivals(tenant)
        lower = sum(t.percent for t in rivals if not t.important)
        if not tenant.important or not lower:
            return float(tenant.percent)
        upper = sum(t.percent for t in (tenant, *rivals) if t.important)
        part = lower * (100 - self.settings.least_percent) / self.settings.least_percent
        return part * tenant.percent / upper

    def _shortest(self, run: Iterable[Tenant], hold: Iterable[Tenant]) -> int:
        """Length of the first slice to end of those that hold somebody back."""
        held_devices = frozenset[str]().union(*(t.devices for t in hold))
        return min(self._length(t, hold) for t in run if t.devices & held_devices)

    def _length(self, tenant: Tenant, others: Iterable[Tenant]) -> int:
        """Length of a tenant's slice: its part of the period."""
        rivals = [t for t in others if t.devices & tenant.devices]
        total = self._weight(tenant) + sum(map(self._weight, rivals))
        part = self.settings.period_usec * self._weight(tenant) / total
        return max(self.settings.shortest_slice_usec, int(part))

    def _account(self, now_usec: int) -> None:
        """Count the time since the last change for the tenants that had it."""
        passed, self._since_usec = now_usec - self._since_usec, now_usec
        if not self.slice.hold or passed <= 0:
            return
        held = [self.tenants[i] for i in self.slice.hold if i in self.tenants]
        for tenant_id in self.slice.run:
            tenant = self.tenants.get(tenant_id)
            if tenant is None or not tenant.wants:
                continue
            if any(tenant.devices & other.devices for other in held):
                tenant.had_usec += passed
                tenant.virtual_usec += passed * 100 / self._weight(tenant)
