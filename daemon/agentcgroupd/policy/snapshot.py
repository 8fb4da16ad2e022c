"""Snapshots of the pool, decisions and the engine's memory: plain values, which the guard fills
from the kernel and the simulator from its model."""

from __future__ import annotations

import bisect
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

CALLS_LEAST = 3
"""Least number of calls that got as far as a call, to tell how far that call may go."""
CALLS_ENOUGH = 20
"""Number of calls that tell any share of them."""
UNSURE = 2
"""Times the largest of a few calls, which their share says too little of."""


class SignalKind(enum.Enum):
    """Reason for which a decision is asked for."""

    TICK = "tick"
    MARK = "mark"
    """The pool's use passed its mark."""
    PRESSURE = "pressure"
    """A PSI trigger fired."""
    ENDED = "ended"
    """A call ended."""
    URGENT = "urgent"
    """The program in the kernel has already denied growth for a stalled session."""
    RELOADED = "reloaded"
    """The policy was replaced."""


@dataclass(frozen=True, slots=True)
class Signal:
    """An event in the pool. `subject`: id of the call or session; empty: the pool itself."""

    kind: SignalKind
    subject: str = ""


TICK = Signal(SignalKind.TICK)


@dataclass(frozen=True, slots=True)
class CallView:
    """An open call as the policy sees it."""

    id: str
    name: str
    session_id: str
    priority: int
    began_usec: int
    memory_bytes: int
    growth_bytes_per_s: float
    cpu_usec: int | None
    """CPU time so far: work that is lost if the call is killed. None: not known."""
    grew_usec: int = -(1 << 62)
    """Time of the last growth that was fast enough to matter, on the snapshot's clock."""
    frozen_for_usec: int | None = None
    """Time since the call was paused; None: it runs."""
    asks: bool = False
    """Whether the call is held at its credit and there is no more for it now."""
    starved: bool = False
    """Whether it asks, although it is the first to get more: for it the pool is full."""
    awaits_credit: bool = False
    """Whether it is paused, or denied growth, until there is credit for it."""
    stopped: bool = True
    """Of a paused call: whether all its tasks have stopped. One that is inside a system call may
    still take memory."""
    paused_usec: int = 0
    """Time for which the call has been paused in all."""
    paused_ago_usec: int | None = None
    """Time since the call was last paused; None: it never was."""
    resumed_ago_usec: int | None = None
    """Time since the call last went on after a pause; None: it never did."""
    denied_growth_bytes: int | None = None
    """Growth since growth was denied to the call; None: the call may grow."""
    refused_requests: int = 0
    """Number of refusals since growth was denied."""
    throttled_growth_bytes: int | None = None
    """Growth since the call was throttled; None: it is not throttled."""
    throttled_by_cpu: bool = False
    """The CPU scheduler alone slows it, and its memory.high is as granted."""
    on_pressure: str = "freeze"
    expected_bytes: int = 0
    """Memory that the call will take, by its intent, corrected by what the last calls like it took;
    0: not known."""
    memory_max_bytes: int | None = None
    """The call's own limit; None: it has none."""
    is_unused: bool = False
    """Whether no process has entered the call yet."""


@dataclass(frozen=True, slots=True)
class SessionView:
    """An open session as the policy sees it."""

    id: str
    priority: int
    memory_bytes: int
    agent_bytes: int
    """Memory of the agent leaf."""
    guarantee_bytes: int = 0
    waiting_usec: int = 0
    """Time without a call and with next to no CPU time of the agent: it waits for its model."""
    refaults_per_s: float = 0.0
    """Pages a second that had been reclaimed and were needed again."""
    stalled_share: float = 0.0
    """Part of the last moment in which some task stalled on memory, 0 to 1 (PSI some)."""
    sampled_usec: int = 0
    """When its share was measured, since boot."""
    slowed: bool = False
    """Whether the CPU weight is lowered (Action.SLOW)."""
    io_stalled_share: float = 0.0
    """Part of the last moment in which some task stalled on disks, 0 to 1 (PSI some); 0 as long as
    no ruleset asks for it."""
    reclaimed_usec: int | None = None
    """Time since memory was last reclaimed from the session; None: not yet."""


@dataclass(frozen=True, slots=True)
class CallIo:
    """An open call that uses disks, or whose use of them is held back."""

    id: str
    name: str
    session_id: str
    priority: int
    bytes_per_s: float
    """What it reads and writes, all disks together."""
    weight_lowered_usec: int | None = None
    """Time since its weight was lowered; None: it is as granted."""
    held_usec: int | None = None
    """Time since it was held to a part of what it did; None: it is not."""


@dataclass(frozen=True, slots=True)
class Host:
    """Abilities of this kernel and host."""

    can_deny: bool = False
    """A program in the kernel can refuse what a call asks for."""
    can_penalize: bool = False
    """The CPU scheduler slows a call by how far it has grown above a mark."""
    can_hold: bool = False
    """Growth of a call that is not paused can be held back to what it was given (memory.high)."""
    has_io_weight: bool = False
    """Calls have a weight for disks (io.weight)."""
    has_io_max: bool = False
    """What calls read and write can be held to a rate (io.max)."""
    can_reclaim: bool = False
    """memory.reclaim is there (Linux 5.19)."""
    swap_free_bytes: int = 0
    """Swap space that is left. 0: anonymous memory can go nowhere, and a call that memory.high
    throttles comes to a standstill."""
    swap_is_zram: bool = False
    """Whether the swap space that is used first lies in memory. No decision depends on it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A view of the pool at one moment."""

    now_usec: int
    """Time of a clock that goes on while the machine sleeps (CLOCK_BOOTTIME)."""
    limit_bytes: int
    usage_bytes: int
    """Memory in use, without the file cache that the kernel takes back by itself before it ends
    anybody."""
    growth_bytes_per_s: float
    calls: tuple[CallView, ...]
    sessions: tuple[SessionView, ...] = ()
    host: Host = field(default_factory=Host)
    stalled_share: float | None = 0.0
    """Part of the last moment in which some task in the pool stalled on memory, 0 to 1 (PSI some);
    None: this kernel does not tell."""
    credit_bytes: int | None = None
    """What calls may take without asking; None: as much as they like."""
    cache_bytes: int = 0
    """Cold file cache in the pool: the part of what is not counted in `usage_bytes` that nobody
    misses."""
    io_stalled_share: float | None = 0.0
    """The same for disks; 0 as long as no ruleset asks for it."""
    io_calls: tuple[CallIo, ...] = ()
    """Calls that use disks, where a ruleset asks for it and disks are waited for."""
    peaks_bytes: tuple[int, ...] = ()
    """Peaks of the pool's ended calls, and what those hold that grew and do so no more,
    ascending."""

    active: tuple[CallView, ...] | None = None
    """Those of `calls` that may grow or are held back. The others do not grow, have not done so for
    `headroom.steady`, and nothing was done to them. None: any of `calls` may be one of these."""
    first: CallView | None = None
    """The most important one of `calls`, among equals the oldest; None: not found out yet."""

    @property
    def free_bytes(self) -> int:
        """Bytes that are left of the pool; negative when it is over its limit."""
        return self.limit_bytes - self.usage_bytes

    @property
    def active_calls(self) -> tuple[CallView, ...]:
        """Calls that may grow or are held back: what all others do is known without a look."""
        return self.calls if self.active is None else self.active

    def likely_peak(self, at_least: int, share: float) -> int | None:
        """Return the peak in bytes that `share` (0 to 1) of the calls stayed below that got beyond
        `at_least` bytes; None where too few calls got there."""
        beyond = bisect.bisect_right(self.peaks_bytes, at_least)
        count = len(self.peaks_bytes) - beyond
        if count < CALLS_LEAST:
            return None
        # With one more call that went further than all, so many leave that one out of the share.
        odds = share / (1.0 - share) if share < 1.0 else CALLS_ENOUGH
        if count < min(CALLS_ENOUGH, round(odds)):
            return UNSURE * self.peaks_bytes[-1]
        return self.peaks_bytes[beyond + min(count - 1, int(share * count))]


class Action(enum.Enum):
    """Actions on a call or, those in SESSION_ACTIONS, on a session."""

    RECLAIM = "reclaim"
    THROTTLE = "throttle"
    UNTHROTTLE = "unthrottle"
    DENY = "deny"
    ALLOW = "allow"
    FREEZE = "freeze"
    THAW = "thaw"
    KILL = "kill"
    SLOW = "slow"
    """Give less CPU time."""
    RESTORE = "restore"
    """Give CPU time as before."""
    IO_WEIGHT = "io_weight"
    """Give a smaller share of disks."""
    IO_UNWEIGHT = "io_unweight"
    IO_MAX = "io_max"
    """Hold to a rate on each disk."""
    IO_UNMAX = "io_unmax"


IO_ACTIONS = frozenset({Action.IO_WEIGHT, Action.IO_UNWEIGHT, Action.IO_MAX, Action.IO_UNMAX})
SESSION_ACTIONS = frozenset({Action.RECLAIM, Action.SLOW, Action.RESTORE})


@dataclass(frozen=True, slots=True)
class Decision:
    """An action and the reason for it, in words that the agent concerned will read."""

    action: Action
    subject: str
    """Id of a call, or of a session for SESSION_ACTIONS; empty: the pool (RECLAIM)."""
    why: str
    ruleset: str = ""
    amount: int = 0
    """RECLAIM: bytes. THROTTLE: bytes that the call may still grow by. SLOW: percent of the CPU
    weight. IO_WEIGHT: percent of the weight. IO_MAX: bytes a second."""
    by_cpu: bool = False
    """THROTTLE: by the CPU scheduler alone; else by memory.high as well."""
    calls: tuple[str, ...] = ()
    """RECLAIM: ids of the session's paused calls to take from; empty: from its agent leaf."""
    dry_run: bool = False
    """Whether the decision is only told, not carried out."""


@dataclass(frozen=True, slots=True)
class RuleState:
    """State of one ruleset between snapshots."""

    holding: tuple[bool, ...] = ()
    """For each detector, whether it held for the last snapshot."""
    acted_usec: int | None = None
    """Time of the last decision, on the snapshot's clock; None: there was none yet."""
    decisions: int = 0
    """Number of decisions so far."""


@dataclass(frozen=True, slots=True)
class State:
    """Memory of the engine between snapshots; the engine itself keeps nothing."""

    rules: Mapping[str, RuleState] = field(default_factory=dict)
    thawed_usec: int = 0
    """Time of the last snapshot for which a paused call was let go on, on the snapshot's clock."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Decisions for one snapshot, and the state to hand in with the next snapshot."""

    decisions: tuple[Decision, ...]
    state: State
