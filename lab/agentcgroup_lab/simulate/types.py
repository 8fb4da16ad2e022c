"""What the simulator moves: calls, sessions, and what is assumed of the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentcgroup_lab.simulate.plans import Profile, Segment, Shape
from agentcgroupd.policy.snapshot import CallView

Strategy = Literal["ours", "none", "static", "reserve"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is assumed of the kernel and of agents; `simulate` says where the numbers are from."""

    zram_ratio: float | None = None
    """Bytes in for one byte kept; None: no swap at all."""
    zram_size: float = 2.0
    """Of the pool's limit: what zram takes in, before compression."""
    cold_share: float = 0.8
    """Of an agent's memory, what it does not touch when it wakes up."""
    call_cold_share: float = 0.5
    """The same of a paused call that goes on."""
    reclaimable_share: float = 0.95
    """Of what does not run, what can be taken from it at all."""
    page_in_s_per_byte: float = 2e-9
    throttled_bytes_per_s: float = 1.1e6
    zram_speed: float = 0.95
    agent_works_pct: float = 2.0
    """An agent that burns as much of a core touches what it uses."""


class Call:
    """One running call."""

    __slots__ = (
        "began_s",
        "capped",
        "cpu_s",
        "denied_bytes",
        "frozen_at_s",
        "grew_s",
        "growth",
        "held_bytes",
        "id",
        "lane",
        "left_s",
        "paused_s",
        "position",
        "seen_bytes",
        "seen_s",
        "segment",
        "shape",
        "since_s",
        "speed",
        "swapped_bytes",
        "throttled_bytes",
        "version",
        "view",
    )  # fmt: skip

    def __init__(self, name: str, lane: Lane, shape: Shape, now_s: float) -> None:
        self.id, self.lane, self.shape = name, lane, shape
        self.began_s = self.since_s = self.seen_s = now_s
        self.position = 0
        self.segment: Segment = shape.segments[0]
        self.left_s = self.segment.duration_s
        self.held_bytes = self.swapped_bytes = self.seen_bytes = 0.0
        self.grew_s = -1e9
        self.speed = self.growth = self.cpu_s = self.paused_s = 0.0
        self.version = 0
        self.capped = False
        """What it takes goes to zram."""
        self.frozen_at_s: float | None = None
        self.denied_bytes: float | None = None
        self.throttled_bytes: float | None = None
        self.view: CallView | None = None

    @property
    def resident_bytes(self) -> float:
        """As its memory.current says."""
        return self.held_bytes - self.swapped_bytes


class Lane:
    """One session at a time; where it repeats, another recording follows."""

    __slots__ = (
        "active_s", "agent_bytes", "agent_pct", "agent_swapped", "at_s", "begun_s", "calls",
        "done_s", "ended_s", "hit", "id", "important", "last_end_s", "lost", "next_call",
        "next_step", "open", "planned_s", "priority", "profile", "reclaimed_s", "refault_bytes",
        "refault_s", "since_s", "slowed", "spent_s", "state", "version",
    )  # fmt: skip

    def __init__(self, name: str, priority: int, important: bool) -> None:
        self.id, self.priority, self.important = name, priority, important
        self.profile: Profile | None = None
        self.at_s = self.since_s = self.last_end_s = self.begun_s = 0.0
        self.open: dict[Call, float] = {}
        """Calls that the agent waits for: their planned end."""
        self.calls: set[Call] = set()
        self.next_call = self.next_step = self.version = 0
        self.agent_bytes = self.agent_swapped = self.agent_pct = 0.0
        self.active_s = self.refault_s = self.refault_bytes = 0.0
        self.reclaimed_s: float | None = None
        self.slowed = False
        self.hit = False
        """A call of it was killed, or itself."""
        self.done_s = self.spent_s = 0.0
        """Plan time advanced, and real time, over all its sessions."""
        self.planned_s = 0.0
        self.ended_s: float | None = None
        self.lost = 0
        self.state: Literal["waits", "runs", "over"] = "waits"

    @property
    def agent_resident(self) -> float:
        """As its agent leaf's memory.current says."""
        return self.agent_bytes - self.agent_swapped
