"""What a policy sees and what it may answer: plain values, the same for the kernel's truth and for
the simulator."""

from __future__ import annotations

import bisect
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

PEAKS_LEAST = 20
"""Fewer calls that got as far as this one tell nothing about how far one like it may go."""


class SignalKind(enum.Enum):
    """Why a decision is asked for."""

    TICK = "tick"
    MARK = "mark"
    """Use of the pool passed its mark."""
    PRESSURE = "pressure"
    """A PSI trigger fired."""
    BEGAN = "began"
    ENDED = "ended"
    OOM = "oom"
    URGENT = "urgent"
    """The program in the kernel has already denied growth for a stalled session."""
    RELOADED = "reloaded"
    """The policy is another than before."""


@dataclass(frozen=True, slots=True)
class Signal:
    """Something happened. `subject`: id of the call or session; empty: the pool."""

    kind: SignalKind
    subject: str = ""


TICK = Signal(SignalKind.TICK)


@dataclass(frozen=True, slots=True)
class CallView:
    """One open call as the policy sees it."""

    id: str
    name: str
    session_id: str
    priority: int
    began_usec: int
    memory_bytes: int
    growth_bytes_per_s: float
    cpu_usec: int
    """Work done so far, which is lost if the call is killed."""
    grew_usec: int = -(1 << 62)
    """When it last took memory fast enough to matter, on the snapshot's clock."""
    frozen_for_usec: int | None = None
    """None: it runs."""
    paused_usec: int = 0
    """For how long it has been paused in all."""
    denied_growth_bytes: int | None = None
    """How much it has grown since its growth was denied; None: it may grow."""
    refused_requests: int = 0
    """How often it was refused memory since its growth was denied."""
    throttled_growth_bytes: int | None = None
    """How much it has grown since it was throttled; None: it is not."""
    on_pressure: str = "freeze"
    expected_bytes: int = 0
    """What it will take: as its intent says, corrected by what the last ones like it took; 0: not
    known."""
    memory_max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session as the policy sees it."""

    id: str
    priority: int
    memory_bytes: int
    agent_bytes: int
    """What its agent leaf holds."""
    guarantee_bytes: int = 0
    waiting_usec: int = 0
    """For how long it has had no call and its agent next to no CPU: it waits for its model."""
    refaults_per_s: float = 0.0
    """Pages that had been reclaimed and were needed again."""
    stalled_share: float = 0.0
    """Part of the last moment in which some task of it stalled on memory, 0 to 1 (PSI some)."""
    slowed: bool = False
    """Its CPU weight is lowered."""
    reclaimed_usec: int | None = None
    """Time since memory was last reclaimed from it; None: not yet."""


@dataclass(frozen=True, slots=True)
class Host:
    """What this kernel and host can do, as far as decisions depend on it."""

    can_deny: bool = False
    can_penalize: bool = False
    """The CPU scheduler slows a call by how far it has grown above a mark."""
    can_reclaim: bool = False
    """memory.reclaim is there (Linux 5.19)."""
    swap_free_bytes: int = 0
    """0: anonymous memory can go nowhere, and throttling it by memory.high is a standstill."""
    swap_is_zram: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pool at one moment."""

    now_usec: int
    """A clock that never goes back (CLOCK_BOOTTIME)."""
    limit_bytes: int
    usage_bytes: int
    """Without cold file cache, which the kernel takes back by itself."""
    growth_bytes_per_s: float
    calls: tuple[CallView, ...]
    sessions: tuple[SessionView, ...] = ()
    host: Host = field(default_factory=Host)
    stalled_share: float | None = 0.0
    """As in SessionView, of the whole pool; None: this kernel does not tell."""
    cache_bytes: int = 0
    """Cold file cache in the pool, which is not counted in `usage_bytes`."""
    peaks_bytes: tuple[int, ...] = ()
    """What ended calls of this pool took at most, ascending."""

    @property
    def free_bytes(self) -> int:
        """What is left of the pool; negative when it is over."""
        return self.limit_bytes - self.usage_bytes

    def likely_peak(self, at_least: int, share: float) -> int | None:
        """What `share` of the calls that got beyond `at_least` bytes stayed below; None when too
        few did."""
        beyond = bisect.bisect_right(self.peaks_bytes, at_least)
        count = len(self.peaks_bytes) - beyond
        if count < PEAKS_LEAST:
            return None
        return self.peaks_bytes[beyond + min(count - 1, int(share * count))]


class Action(enum.Enum):
    """What can be done: to a call, or (RECLAIM, SLOW, RESTORE) to a session."""

    RECLAIM = "reclaim"
    THROTTLE = "throttle"
    UNTHROTTLE = "unthrottle"
    DENY = "deny"
    ALLOW = "allow"
    FREEZE = "freeze"
    THAW = "thaw"
    KILL = "kill"
    SLOW = "slow"
    """Less CPU."""
    RESTORE = "restore"
    """CPU as before."""


SESSION_ACTIONS = frozenset({Action.RECLAIM, Action.SLOW, Action.RESTORE})


@dataclass(frozen=True, slots=True)
class Decision:
    """One action and why, in words that the agent concerned will read."""

    action: Action
    subject: str
    """Id of a call; of a session for SESSION_ACTIONS, or nothing for the pool (RECLAIM)."""
    why: str
    ruleset: str = ""
    amount: int = 0
    """RECLAIM: bytes. THROTTLE: bytes that it may still grow by. SLOW: percent of its CPU
    weight."""
    by_cpu: bool = False
    """THROTTLE: by the CPU scheduler alone; else by memory.high, too."""
    calls: tuple[str, ...] = ()
    """RECLAIM: only from these calls of the session, paused ones; empty: from its agent leaf."""
    dry_run: bool = False
    """Only to be told."""


@dataclass(frozen=True, slots=True)
class RuleState:
    """What is remembered of one ruleset between looks."""

    holding: tuple[bool, ...] = ()
    """Each of its detectors: whether it held at the last look."""
    acted_usec: int | None = None
    """When it last decided something, on the snapshot's clock."""
    decisions: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """What the engine remembers between looks; it keeps nothing itself."""

    rules: Mapping[str, RuleState] = field(default_factory=dict)
    thawed_usec: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to do now, and what to hand in with the next snapshot."""

    decisions: tuple[Decision, ...]
    state: State
