"""The language of policies: one TOML document, checked by pydantic models.

A policy is a list of rulesets, tried in order on every look. Each has detectors, which must all
hold, and one action. A detector that has begun to hold goes on until its `until` is reached, so
that nothing flaps, and what an action did is undone when its ruleset no longer holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from agentcgroupd.config import Duration, Section, quantity
from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.cpu_class import CpuClasses
from agentcgroupd.units import parse_bytes, parse_priority, show_bytes

AMOUNT_ALLOWED = (
    "a part of the pool such as 6%, from 0.1% to 100%, a size such as 512M, or both as in "
    "6%, at most 512M"
)


AT_MOST = ", at most "


@dataclass(frozen=True, slots=True)
class Amount:
    """A part of the pool, or bytes, or a part but at most so many bytes."""

    percent: float | None = None
    size_bytes: int | None = None

    def of(self, limit_bytes: int) -> int:
        """In bytes, of a pool of this size."""
        share = limit_bytes if self.percent is None else int(limit_bytes * self.percent / 100)
        return share if self.size_bytes is None else min(self.size_bytes, share)

    def __str__(self) -> str:
        parts = [] if self.percent is None else [f"{self.percent:g}%"]
        if self.size_bytes is not None:
            parts.append(show_bytes(self.size_bytes))
        return ", at most ".join(parts)

    def above(self, other: Amount) -> bool | None:
        """Whether it is more than another, if only in some pools; None where that depends on the
        pool alone."""
        pairs = ((self.percent, other.percent), (self.size_bytes, other.size_bytes))
        known = [a > b for a, b in pairs if a is not None and b is not None]
        return any(known) if known else None


def parse_amount(field: str, text: str) -> Amount:
    """`6%`, `512M` or `6%, at most 512M`. Raises InvalidField."""
    stripped = text.strip()
    share, separator, most = stripped.partition(AT_MOST)
    if separator:
        both = parse_amount(field, share), parse_amount(field, most)
        if both[0].percent is None or both[0].size_bytes or both[1].size_bytes is None:
            raise InvalidField(field, text, AMOUNT_ALLOWED)
        return Amount(both[0].percent, both[1].size_bytes)
    if not stripped.endswith("%"):
        try:
            return Amount(size_bytes=parse_bytes(field, stripped))
        except InvalidField:
            raise InvalidField(field, text, AMOUNT_ALLOWED) from None
    try:
        percent = float(Decimal(stripped[:-1].strip()))
    except ArithmeticError:
        raise InvalidField(field, text, AMOUNT_ALLOWED) from None
    if not 0.1 <= percent <= 100:
        raise InvalidField(field, text, AMOUNT_ALLOWED)
    return Amount(percent=percent)


def _amount(value: object) -> object:
    if isinstance(value, Amount):
        return value
    if not isinstance(value, str):
        raise InvalidField("amount", repr(value), AMOUNT_ALLOWED)
    return parse_amount("amount", value)


PoolAmount = Annotated[Amount, BeforeValidator(_amount)]
Share = Annotated[float, Field(gt=0, le=1)]


NOBODY = 101
"""A priority that no call and no session has."""


def _spare_priority(field: str, text: str) -> int:
    return NOBODY if text.strip() == str(NOBODY) else parse_priority(field, text)


SparePriority = Annotated[int, quantity(_spare_priority, "priority")]


def _wrong(field: str, value: object, allowed: str) -> InvalidField:
    return InvalidField(field, str(value), allowed, "the policy contradicts itself")


# Detectors


class PoolFree(Section):
    """Less of the pool is free than `below`, until `until` is free again."""

    detector: Literal["pool_free"]
    below: PoolAmount
    until: PoolAmount
    keep_room: bool = False
    """Beside what the leader, the most important call that must get through, may still need."""

    @model_validator(mode="after")
    def _ordered(self) -> PoolFree:
        if self.below.above(self.until):
            raise _wrong("until", self.until, f"at least below, which is {self.below}")
        return self


class PoolFills(Section):
    """At its present growth the pool would be full within this time; and then until so much is
    free, because what is stopped no longer grows."""

    detector: Literal["pool_fills"]
    within: Duration
    until: PoolAmount | None = None


class Stalled(Section):
    """Tasks stall on memory (PSI some) for more than this part of the time."""

    detector: Literal["stalled"]
    scope: Literal["pool", "important"] = "pool"
    above: Share
    until: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Stalled:
        if self.until >= self.above:
            raise _wrong("until", self.until, f"less than above, which is {self.above:g}")
        return self


class Growing(Section):
    """The pool grows faster than this, in bytes a second."""

    detector: Literal["growing"]
    above: Annotated[Amount, BeforeValidator(_amount)]


Detector = Annotated[PoolFree | PoolFills | Stalled | Growing, Field(discriminator="detector")]


# Actions


class Reclaim(Section):
    """Take cold memory back (memory.reclaim) without stopping anyone."""

    action: Literal["reclaim"]
    whom: Literal["waiting", "frozen", "cache"] = "waiting"
    """Sessions whose agent waits for its model, the calls that are paused, or the pool's cold file
    cache."""
    waiting_for: Duration = 1_000_000
    step: PoolAmount = Amount(percent=2.0)
    """At most so much of one session at a time."""
    every: Duration = 2_000_000
    """Not more often from the same session."""
    refaults_per_s: Annotated[float, Field(ge=0)] = 200.0
    """A session that needs more of it back than this is left alone."""


class Throttle(Section):
    """A mark just above what a growing call holds: it goes on beyond, slowly. memory.high does it
    where its cold memory can be swapped out, and the CPU scheduler where that is ours."""

    action: Literal["throttle"]
    slack: PoolAmount = Amount(size_bytes=16 << 20)
    needs_swap: bool = True
    """Without swap, memory.high brings a program that allocates to a near standstill, so the mark
    is the CPU scheduler's alone, or there is none."""


class Deny(Section):
    """What a growing call asks for is refused (ENOMEM), where the kernel lets us."""

    action: Literal["deny"]
    whom: Literal["willing", "all"] = "willing"
    """Willing: calls whose intent says on_pressure = deny."""


class Freeze(Section):
    """Growing calls are paused, the least important first."""

    action: Literal["freeze"]


class Kill(Section):
    """One call is ended: only when nothing else could be done on this look."""

    action: Literal["kill"]


class Slow(Section):
    """Sessions that stall on memory get less CPU: more would only be spent on reclaim."""

    action: Literal["slow"]
    percent: Annotated[int, Field(ge=1, le=99)] = 25
    above: Share = 0.2
    """Stalled for more than this part of the time."""


AnyAction = Annotated[
    Reclaim | Throttle | Deny | Freeze | Kill | Slow, Field(discriminator="action")
]


class Ruleset(Section):
    """One rung: when, and what then."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    description: str = ""
    enabled: bool = True
    dry_run: bool = False
    """Decide and tell, but do nothing."""
    cooldown: Duration | None = None
    """Not again before this time has passed."""
    spare_priority: SparePriority = NOBODY
    """Calls and sessions of at least this priority are left alone; 101: none is."""
    when: Annotated[tuple[Detector, ...], Field(min_length=1)]
    do: AnyAction


class HeadroomSettings(Section):
    """What is kept free, and for whom."""

    lookahead: Duration = 250_000
    """Growth is assumed to go on this long."""
    leader_share: Share = 0.9
    """Room is kept for a call's growth up to what this part of the calls like it stayed
    below."""
    prior: PoolAmount = Amount(size_bytes=2 << 30)
    """As long as too few have got as far to tell, how far a growing call is taken to go: recorded
    tool calls rose by up to 1.9 GB (arXiv 2602.09345)."""
    leader_most: PoolAmount = Amount(percent=60.0)
    """But no call is taken to go further than this: others would wait for its end."""
    steady: Duration = 1_000_000
    """A call that has not grown for this long is taken to have all that it needs."""
    small: PoolAmount = Amount(percent=2.0, size_bytes=64 << 20)
    """A call that holds less keeps no room free, and is not stopped for another's room."""
    lease: Duration = 120_000_000
    """A paused call goes on after this time at the latest, as soon as there is any room."""
    thaw_every: Duration = 250_000
    """Its effect must be seen before the next is let go on."""


class Admission(Section):
    """Who may start."""

    enabled: bool = True
    small: PoolAmount = Amount(size_bytes=64 << 20)
    """A call that expects no more starts at once, and so does one that says nothing."""
    wait: Duration = 60_000_000
    """A call waits at most this long where its intent does not say; then it starts, and may be
    paused."""
    waiting_max: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """More are refused."""
    age_step: Duration = 5_000_000
    """Waiting this long counts as much as one step of priority in ten."""
    overcommit: Annotated[float, Field(ge=1, le=100)] = 1.0
    """What running calls are expected to take may add up to this times what is free."""


class Learning(Section):
    """What the last calls of the same shape took."""

    enabled: bool = True
    runs_least: Annotated[int, Field(ge=1, le=100)] = 2
    runs_kept: Annotated[int, Field(ge=1, le=1000)] = 8
    tell_ratio: Annotated[float, Field(gt=1)] = 4.0
    """An intent is called wrong when it is this many times off."""


class Policy(Section):
    """A whole document."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")] = "unnamed"
    description: str = ""
    dry_run: bool = False
    """Of all rulesets."""
    headroom: HeadroomSettings = HeadroomSettings()
    admission: Admission = Admission()
    cpu: CpuClasses = CpuClasses()
    learning: Learning = Learning()
    rulesets: tuple[Ruleset, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        names = [r.name for r in self.rulesets]
        twice = next((i for i, n in enumerate(names) if n in names[:i]), None)
        if twice is not None:
            raise _wrong(f"rulesets[{twice}].name", names[twice], "each name once")
        if self.cpu.batch_below > self.cpu.interactive_from:
            allowed = f"at most interactive_from, which is {self.cpu.interactive_from}"
            raise _wrong("cpu.batch_below", self.cpu.batch_below, allowed)
        kills = [i for i, r in enumerate(self.rulesets) if r.enabled and r.do.action == "kill"]
        stops = [i for i, r in enumerate(self.rulesets) if r.enabled and r.do.action == "freeze"]
        if kills and stops and min(kills) < max(stops):
            allowed = f"an order in which kill comes after {self.rulesets[max(stops)].name!r}"
            raise _wrong(f"rulesets[{min(kills)}]", self.rulesets[min(kills)].name, allowed)
        return self
