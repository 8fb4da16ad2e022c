"""Things that the simulator moves: calls and sessions; and what is assumed of the kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from agentcgroup_lab.simulate.plans import CallProfile, Profile, Segment
from agentcgroupd.policy.snapshot import CallView

Strategy = Literal["ours", "none", "static", "reserve"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, slots=True)
class KernelModel:
    """Assumptions on the kernel and on agents; `simulate.run` says where the numbers are from."""

    zram_ratio: float | None = None
    """Bytes in for one byte kept; None: no swap at all."""
    zram_size: float = 2.0
    """Bytes that zram takes in, before compression, over the pool's limit."""
    cold_share: float = 0.8
    """Part of an agent's memory that it does not touch when it wakes up."""
    call_cold_share: float = 0.5
    """Part of a paused call's memory that it does not touch when it goes on."""
    reclaimable_share: float = 0.95
    """Part of the memory of what does not run that can be taken at all."""
    page_in_s_per_byte: float = 2e-9
    throttled_bytes_per_s: float = 1.1e6
    zram_speed: float = 0.95
    agent_works_pct: float = 2.0
    """An agent that burns as much of a core touches what it uses."""


@dataclass(slots=True, eq=False)
class SimulatedCall:
    """A running call."""

    id: str
    lane: Lane
    profile: CallProfile
    began_s: float
    segment: Segment
    left_s: float
    """Time to the segment's end, at full speed."""
    since_s: float
    """Time at which its memory and its work were last brought up to date."""
    position: int = 0
    """Index of the segment in the profile."""
    held_bytes: float = 0.0
    swapped_bytes: float = 0.0
    peak_bytes: float = 0.0
    """The most that was resident so far, as its memory.peak says."""
    speed: float = 0.0
    cpu_s: float = 0.0
    paused_s: float = 0.0
    """Length of all pauses that have ended."""
    version: int = 0
    capped: bool = False
    """Whether what it takes goes to zram."""
    frozen_at_s: float | None = None
    paused_at_s: float | None = None
    """When it was last paused; None: it never was."""
    resumed_at_s: float | None = None
    """When it last went on; None: it never did."""
    denied_bytes: float | None = None
    """Bytes that were resident when its growth was denied; None: it may grow."""
    throttled_bytes: float | None = None
    """Bytes that were resident when it was throttled; None: it is not."""
    grew_usec: int = -(1 << 62)
    view: CallView | None = None
    """View of it that the guard made, while nothing of it changes."""

    @property
    def resident_bytes(self) -> float:
        """Bytes that its memory.current shows."""
        return self.held_bytes - self.swapped_bytes


@dataclass(slots=True, eq=False)
class Lane:
    """A place for one session at a time; where sessions repeat, another recording follows."""

    id: str
    priority: int
    important: bool
    profile: Profile | None = None
    at_s: float = 0.0
    """Plan time."""
    since_s: float = 0.0
    """Time at which plan time was last brought up to date."""
    begun_s: float = 0.0
    last_end_s: float = 0.0
    """Planned end of the latest call that has ended."""
    open: dict[SimulatedCall, float] = field(default_factory=dict)
    """Calls that the agent waits for, and their planned ends."""
    calls: set[SimulatedCall] = field(default_factory=set)
    next_call: int = 0
    next_step: int = 0
    version: int = 0
    agent_bytes: float = 0.0
    agent_swapped: float = 0.0
    agent_pct: float = 0.0
    active_s: float = 0.0
    """Time at which its agent last worked, or a call of it began or ended."""
    refault_s: float = 0.0
    refault_bytes: float = 0.0
    reclaimed_s: float | None = None
    slowed: bool = False
    hit: bool = False
    """Whether a call of it was killed, or its agent."""
    done_s: float = 0.0
    """Plan time advanced over all its sessions."""
    spent_s: float = 0.0
    """Real time over all its sessions."""
    state: Literal["waits", "runs", "over"] = "waits"

    @property
    def agent_resident(self) -> float:
        """Bytes that its agent leaf's memory.current shows."""
        return self.agent_bytes - self.agent_swapped
