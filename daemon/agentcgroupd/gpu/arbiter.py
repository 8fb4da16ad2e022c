"""Whose turn it is: slices of time on the GPUs in proportion to shares. No I/O and no clock.

Every tenant that wants a device has a virtual time, which runs slower the larger its share; the one
with the least is next. A tenant that wants nothing is never held back, and with one tenant that
wants a device nobody is. An important one that begins to want gets its turn at once; while it goes
on wanting, the others keep a small part, so that they stay alive.

A tenant has all of its devices in a turn or none: whoever wants a device that somebody before it
has is held back.

Turns are counted, not use: what is queued at the end of a turn runs on into the next one, whose
owner makes up for it at its own end, so tenants that queue alike have what their turns say. The
driver's figures by process are not taken to correct that: it samples six times a second, and where
contexts alternate it was seen to give one a third of what it had.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from agentcgroupd.units import IMPORTANT_PRIORITY


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in microseconds."""

    period_usec: int = 200_000
    """In this time everyone who wants has had a turn, where turns are not too short for it."""
    least_turn_usec: int = 10_000
    """A switch costs about one millisecond."""
    least_percent: int = 5
    """Of a device's time for those who have to make room for an important one, together."""


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
        """Goes before those that are not."""
        return self.priority >= IMPORTANT_PRIORITY


@dataclass(frozen=True, slots=True)
class Turn:
    """Who goes on and who is held back, until a time (None: until something changes)."""

    run: frozenset[str] = frozenset()
    hold: frozenset[str] = frozenset()
    until_usec: int | None = None


@dataclass(slots=True)
class Arbiter:
    """The state. Times are those of the caller's clock, and never go back."""

    settings: Settings = field(default_factory=Settings)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    turn: Turn = field(default_factory=Turn)
    _since_usec: int = 0

    def add(self, tenant: Tenant, now_usec: int) -> None:
        """A new tenant; it begins where the others are."""
        self._account(now_usec)
        self.tenants[tenant.id] = tenant
        tenant.virtual_usec = self._level(tenant)

    def remove(self, tenant_id: str, now_usec: int) -> None:
        """It is gone; no error if it was not there."""
        self._account(now_usec)
        self.tenants.pop(tenant_id, None)

    def change(self, tenant_id: str, percent: int, priority: int, now_usec: int) -> None:
        """Another share from now on. KeyError."""
        self._account(now_usec)
        tenant = self.tenants[tenant_id]
        tenant.percent, tenant.priority = percent, priority

    def want(self, tenant_id: str, wants: bool, now_usec: int) -> bool:
        """It begins or stops to want its devices; whether that is new. KeyError."""
        tenant = self.tenants[tenant_id]
        if tenant.wants == wants:
            return False
        self._account(now_usec)
        if wants:
            # What it did not want is not owed to it; but what it has had counts.
            tenant.virtual_usec = max(tenant.virtual_usec, self._level(tenant))
            if tenant.important:
                tenant.virtual_usec = min(tenant.virtual_usec, self._level(tenant) - 1.0)
        tenant.wants = wants
        return True

    def decide(self, now_usec: int) -> Turn:
        """Who runs from now on."""
        self._account(now_usec)
        wanting = [t for t in self.tenants.values() if t.wants]
        claimed: set[str] = set()
        run: list[Tenant] = []
        hold: list[Tenant] = []
        for tenant in sorted(wanting, key=lambda t: (t.virtual_usec, -t.priority, t.id)):
            (hold if tenant.devices & claimed else run).append(tenant)
            if tenant in run:
                claimed |= tenant.devices
        until = None
        if hold:
            lengths = [self._length(t, hold) for t in run if any(t.devices & h.devices
                       for h in hold)]  # fmt: skip
            until = now_usec + min(lengths)
        idle = (t.id for t in self.tenants.values() if not t.wants)
        self.turn = Turn(
            frozenset((*(t.id for t in run), *idle)), frozenset(t.id for t in hold), until
        )
        return self.turn

    # Parts

    def _rivals(self, tenant: Tenant) -> list[Tenant]:
        return [t for t in self.tenants.values()
                if t.wants and t is not tenant and t.devices & tenant.devices]  # fmt: skip

    def _level(self, tenant: Tenant) -> float:
        """Where those that it shares a device with are."""
        return min((t.virtual_usec for t in self._rivals(tenant)), default=tenant.virtual_usec)

    def _weight(self, tenant: Tenant) -> float:
        """Its share against its rivals'. One that is important has more beside those that are not,
        which keep theirs: so what one of them has had weighs the same when the important is gone.
        """
        lower = sum(t.percent for t in self._rivals(tenant) if not t.important)
        if not tenant.important or not lower:
            return float(tenant.percent)
        upper = sum(t.percent for t in (tenant, *self._rivals(tenant)) if t.important)
        part = lower * (100 - self.settings.least_percent) / self.settings.least_percent
        return part * tenant.percent / upper

    def _length(self, tenant: Tenant, others: Iterable[Tenant]) -> int:
        """Of its turn."""
        rivals = [t for t in others if t.devices & tenant.devices]
        total = self._weight(tenant) + sum(map(self._weight, rivals))
        part = self.settings.period_usec * self._weight(tenant) / total
        return max(self.settings.least_turn_usec, int(part))

    def _account(self, now_usec: int) -> None:
        """Count the time since the last change for those who had it."""
        passed, self._since_usec = now_usec - self._since_usec, now_usec
        if not self.turn.hold or passed <= 0:
            return
        held = [self.tenants[i] for i in self.turn.hold if i in self.tenants]
        for tenant_id in self.turn.run:
            tenant = self.tenants.get(tenant_id)
            if tenant is None or not tenant.wants:
                continue
            if any(tenant.devices & other.devices for other in held):
                tenant.had_usec += passed
                tenant.virtual_usec += passed * 100 / self._weight(tenant)
