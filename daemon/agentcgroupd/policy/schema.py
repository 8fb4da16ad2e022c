"""Schema of policies: one TOML document, checked by pydantic models.

A policy is a list of rulesets, tried in order for every snapshot. Each has detectors, which must
all hold, and one action. A detector that has begun to hold goes on until its `until` is reached, so
that actions do not flap. What an action did is undone when its ruleset no longer holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from agentcgroupd.config import Section
from agentcgroupd.config_values import Duration, quantity
from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.cpu_class import CpuClasses
from agentcgroupd.units import parse_bytes, parse_priority, show_bytes

AMOUNT_ALLOWED = (
    "a part of the pool such as 6%, from 0.1% to 100%, a size such as 512M, or both as in "
    "6%, at most 512M"
)
AT_MOST = ", at most "
NOBODY = 101
"""Priority that no call and no session has."""


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount of memory: a part of the pool, a size, or a part but at most a size."""

    percent: float | None = None
    size_bytes: int | None = None

    def of(self, limit_bytes: int) -> int:
        """Return the amount in bytes, in a pool of this size."""
        share = limit_bytes if self.percent is None else int(limit_bytes * self.percent / 100)
        return share if self.size_bytes is None else min(self.size_bytes, share)

    def __str__(self) -> str:
        parts = [] if self.percent is None else [f"{self.percent:g}%"]
        if self.size_bytes is not None:
            parts.append(show_bytes(self.size_bytes))
        return AT_MOST.join(parts)

    def above(self, other: Amount) -> bool | None:
        """Tell whether this amount is more than another, if only in pools of some sizes; None where
        a part is compared with a size."""
        pairs = ((self.percent, other.percent), (self.size_bytes, other.size_bytes))
        known = [a > b for a, b in pairs if a is not None and b is not None]
        return any(known) if known else None


def parse_amount(field: str, text: str) -> Amount:
    """Return the amount that `6%`, `512M` or `6%, at most 512M` says. Raises InvalidField."""
    stripped = text.strip()
    first, separator, second = stripped.partition(AT_MOST)
    if separator:
        part, most = parse_amount(field, first), parse_amount(field, second)
        if part.percent is None or part.size_bytes or most.size_bytes is None:
            raise InvalidField(field, text, AMOUNT_ALLOWED)
        return Amount(part.percent, most.size_bytes)
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


def _spare_priority(field: str, text: str) -> int:
    return NOBODY if text.strip() == str(NOBODY) else parse_priority(field, text)


SparePriority = Annotated[int, quantity(_spare_priority, "priority")]


def _wrong(field: str, value: object, allowed: str) -> InvalidField:
    """Return the error of a key that contradicts another."""
    return InvalidField(field, str(value), allowed, "the policy contradicts itself")


# Detectors


class PoolFree(Section):
    """Detector: less of the pool is free than `below`, until `until` is free again."""

    detector: Literal["pool_free"]
    below: PoolAmount
    until: PoolAmount
    keep_room: bool = False
    """Whether the reserve has to be free as well, with which all calls can end in turn."""

    @model_validator(mode="after")
    def _ordered(self) -> PoolFree:
        if self.below.above(self.until):
            raise _wrong("until", self.until, f"at least below, which is {self.below}")
        return self


class PoolFills(Section):
    """Detector: at its present growth the pool would be full within this time."""

    detector: Literal["pool_fills"]
    within: Duration
    until: PoolAmount | None = None
    """The detector goes on holding until so much is free, because what is held back no longer
    grows; None: it holds only while the pool grows so fast."""


class Stalled(Section):
    """Detector: tasks stall on memory (PSI some) for more than this part of the time."""

    detector: Literal["stalled"]
    scope: Literal["pool", "important"] = "pool"
    """Tasks of the whole pool, or of the important session that stalls most."""
    above: Share
    until: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Stalled:
        if self.until >= self.above:
            raise _wrong("until", self.until, f"less than above, which is {self.above:g}")
        return self


class Growing(Section):
    """Detector: the pool grows by more than this amount a second."""

    detector: Literal["growing"]
    above: Annotated[Amount, BeforeValidator(_amount)]


class IoStalled(Section):
    """Detector: tasks stall on disks (PSI some) for more than this part of the time."""

    detector: Literal["io_stalled"]
    scope: Literal["pool", "important"] = "important"
    """Tasks of the whole pool, or of the important session that stalls most."""
    above: Share
    until: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> IoStalled:
        if self.until >= self.above:
            raise _wrong("until", self.until, f"less than above, which is {self.above:g}")
        return self


Detector = Annotated[
    PoolFree | PoolFills | Stalled | Growing | IoStalled, Field(discriminator="detector")
]


# Actions


class Reclaim(Section):
    """Action: take cold memory back (memory.reclaim), without stopping any call."""

    action: Literal["reclaim"]
    whom: Literal["waiting", "frozen", "cache"] = "waiting"
    """Whose memory: of agents that wait for their model, of paused calls, or the pool's cold file
    cache."""
    waiting_for: Duration = 1_000_000
    """Time after which an agent counts as waiting."""
    step: PoolAmount = Amount(percent=2.0)
    """Most that is taken at a time: of each waiting agent, of all paused calls, of the cache."""
    every: Duration = 2_000_000
    """Least time between two steps on the same session."""
    refaults_per_s: Annotated[float, Field(ge=0)] = 200.0
    """Pages a second; a session that needs more of them back is left alone."""


class Throttle(Section):
    """Action: set a mark just above what a growing call holds, beyond which it only grows slowly.
    memory.high does that where cold memory can be swapped out, and our CPU scheduler where it
    runs."""

    action: Literal["throttle"]
    slack: PoolAmount = Amount(size_bytes=16 << 20)
    """Distance of the mark from what the call holds."""
    needs_swap: bool = True
    """Whether memory.high is left alone where there is no swap: it would bring a program that
    allocates to a near standstill. The mark is then the CPU scheduler's alone, or there is none."""


class Deny(Section):
    """Action: refuse what a growing call asks for (ENOMEM), where the kernel lets us."""

    action: Literal["deny"]
    whom: Literal["willing", "all"] = "willing"
    """Calls whose intent says `on_pressure = "deny"`, or all."""


class Freeze(Section):
    """Action: pause growing calls, the least important first."""

    action: Literal["freeze"]


class Kill(Section):
    """Action: end one call, only when no call was throttled, denied or paused instead."""

    action: Literal["kill"]


class Slow(Section):
    """Action: give less CPU time to sessions that stall on memory: they would spend it on
    reclaim."""

    action: Literal["slow"]
    percent: Annotated[int, Field(ge=1, le=99)] = 25
    """Part of the session's CPU weight that is left to it."""
    above: Share = 0.2
    """Part of the time; sessions that stall for more than this are slowed."""


RATE_LEAST = 64 << 10
Rate = Annotated[int, quantity(partial(parse_bytes, least=RATE_LEAST), "size")]


class IoWeight(Section):
    """Action: give a smaller share of the disks to the least important calls that use them most."""

    action: Literal["io_weight"]
    percent: Annotated[int, Field(ge=1, le=99)] = 10
    """Part of the call's weight that is left to it."""
    least: Rate = 256 << 10
    """Bytes a second below which a call is left alone."""
    hold: Duration = 10_000_000
    """Least time for which that lasts."""


class IoMax(Section):
    """Action: hold the least important calls that use the disks most to a part of what they read
    and write now."""

    action: Literal["io_max"]
    percent: Annotated[int, Field(ge=1, le=99)] = 5
    """Part of the bytes a second that is left to the call."""
    floor: Rate = 256 << 10
    """Bytes a second of each disk that are left at least."""
    least: Rate = 256 << 10
    """Bytes a second below which a call is left alone."""
    hold: Duration = 10_000_000
    """Least time for which that lasts."""


AnyAction = Annotated[
    Reclaim | Throttle | Deny | Freeze | Kill | Slow | IoWeight | IoMax,
    Field(discriminator="action"),
]


class Ruleset(Section):
    """A rule: when to act, and what to do then."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    description: str = ""
    enabled: bool = True
    dry_run: bool = False
    """Whether decisions are only made and told, and nothing is done."""
    cooldown: Duration | None = None
    """Least time between two decisions; None: decide for every snapshot."""
    spare_priority: SparePriority = NOBODY
    """Priority from which calls and sessions are left alone; NOBODY: none is."""
    when: Annotated[tuple[Detector, ...], Field(min_length=1)]
    do: AnyAction


class HeadroomSettings(Section):
    """The policy's table `headroom`: what is kept free, and for which calls."""

    lookahead: Duration = 250_000
    """Time for which growth is assumed to go on."""
    leader_share: Share = 0.9
    """A call is taken to reach what this part of the calls like it stayed below."""
    prior: PoolAmount = Amount(size_bytes=2 << 30)
    """Size that a growing call is taken to reach as long as too few calls have got as far to tell:
    recorded tool calls rose by up to 1.9 GB (arXiv 2602.09345)."""
    typical: PoolAmount = Amount(percent=10.0, size_bytes=2 << 30)
    """Size that a growing call that does not go first is taken to reach, as long as too few calls
    have got as far to tell: what those before it are likely to need is there before it gets more.
    In a tenth of the pool several can grow at once, and so show how far calls like them go."""
    credit: PoolAmount = Amount(size_bytes=64 << 20)
    """Most that a call that begins, and least that one that grows, may take without asking."""
    credit_resting: PoolAmount = Amount(size_bytes=8 << 20)
    """Most that a call that has not grown for a while may take without asking."""
    leader_most: PoolAmount = Amount(percent=60.0)
    """Most that a call is taken to reach: all others would wait for its end."""
    steady: Duration = 1_000_000
    """Time without growth after which a call is taken to have all that it needs."""
    small: PoolAmount = Amount(percent=2.0, size_bytes=64 << 20)
    """Size below which a call has no claim on the reserve and is not held back for it."""
    lease: Duration = 120_000_000
    """Time after which a paused call goes on as soon as there is any room."""
    settle: Duration = 1_000_000
    """Time within which a call changes between paused and going on at most twice."""
    thaw_every: Duration = 250_000
    """Time until more calls go on: the effect of those before must be seen."""


class Admission(Section):
    """The policy's table `admission`: which calls may start."""

    enabled: bool = True
    small: PoolAmount = Amount(size_bytes=64 << 20)
    """Most that a call may expect to start at once. A call that says nothing does so, too."""
    wait: Duration = 60_000_000
    """Most time that a call waits where its intent does not say; then it starts, and may be
    paused."""
    waiting_max: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """Most calls that may wait; more are refused."""
    waiting_share: Share = 0.25
    """Part of the places that calls of other sessions leave, which one session may have."""
    age_step: Duration = 5_000_000
    """Time of waiting that counts as much as 10 of the 100 steps of priority."""
    overcommit: Annotated[float, Field(ge=1, le=100)] = 1.0
    """Divisor of what open calls are still expected to take: they do not all peak together."""


class Learning(Section):
    """The policy's table `learning`: when the last calls of a shape correct an intent."""

    enabled: bool = True
    runs_least: Annotated[int, Field(ge=1, le=100)] = 2
    """Runs of the same shape that are needed."""
    runs_kept: Annotated[int, Field(ge=1, le=1000)] = 8
    """Runs of the same shape that are remembered."""
    tell_ratio: Annotated[float, Field(gt=1)] = 4.0
    """Factor by which an intent must be off, up or down, to be called wrong."""


class Policy(Section):
    """A whole policy."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")] = "unnamed"
    description: str = ""
    dry_run: bool = False
    """Whether all rulesets only decide and tell."""
    headroom: HeadroomSettings = HeadroomSettings()
    admission: Admission = Admission()
    cpu: CpuClasses = CpuClasses()
    learning: Learning = Learning()
    rulesets: tuple[Ruleset, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        seen: set[str] = set()
        for index, ruleset in enumerate(self.rulesets):
            if ruleset.name in seen:
                raise _wrong(f"rulesets[{index}].name", ruleset.name, "each name once")
            seen.add(ruleset.name)
        if self.cpu.batch_below > self.cpu.interactive_from:
            allowed = f"at most interactive_from, which is {self.cpu.interactive_from}"
            raise _wrong("cpu.batch_below", self.cpu.batch_below, allowed)
        enabled = [(i, r) for i, r in enumerate(self.rulesets) if r.enabled]
        kills = [(i, r.name) for i, r in enabled if r.do.action == "kill"]
        freezes = [(i, r.name) for i, r in enabled if r.do.action == "freeze"]
        if kills and freezes and kills[0] < freezes[-1]:
            index, name = kills[0]
            allowed = f"an order in which kill comes after {freezes[-1][1]!r}"
            raise _wrong(f"rulesets[{index}]", name, allowed)
        return self
