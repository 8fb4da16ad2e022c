"""Sessions and calls: what the daemon keeps of each."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.held import HeldKnob
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.clock import boottime_usec as boottime_usec
from agentcgroupd.clock import unix_usec as unix_usec
from agentcgroupd.intents.grant import Grant
from agentcgroupd.policy.learning import Learned
from agentcgroupd.state.ending import NOTHING_HELD, Account, Held, Place
from agentcgroupd.state.process import Process
from agentcgroupd.state.purpose import Purpose
from agentcgroupd.state.records import (
    RECORD_VERSION,
    cut_argv_of_record,
    encode,
    plain,
    sendable,
)

AGENT_LEAF = "agent"
CALL_PREFIX = "call-"
MAIN_LEAF = "main"
"""The cgroup of a call's own processes, below the call's, where that is split."""
HISTORY_KEPT = 16
INNER_IDS_MOST = 64


@dataclass(slots=True)
class HighBounds:
    """What holds a call's memory.high down beside its grant (enforce.memory_high). In bytes;
    None: it does not."""

    throttle_bytes: int | None = None
    credit_bytes: int | None = None
    """What it may reach without asking for more (guard.credit)."""
    brake_bytes: int | None = None
    written: tuple[int | None] | None = None
    """What was written last, `(None,)` for no limit; None: not known."""


@dataclass(slots=True)
class LoweredDisks:
    """What of a call's use of disks is held back now, beside its grant (enforce.disks)."""

    weight_since_usec: int | None = None
    """Since when its weight is lowered, since boot; None: it is not."""
    held_since_usec: int | None = None
    """Since when it is held to a rate, since boot; None: it is not."""
    held_devices: tuple[str, ...] = ()
    """Devices on which it is, by their numbers."""

    @property
    def is_lowered(self) -> bool:
        """Whether anything of it is held back."""
        return self.weight_since_usec is not None or self.held_since_usec is not None


@dataclass(slots=True, eq=False)
class Call:
    """An open call."""

    id: str
    session: Session
    name: str
    argv: tuple[str, ...]
    grant: Grant
    cgroup: Cgroup
    began_unix_usec: int
    began_boot_usec: int
    held: bool
    """Whether the owner holds the call open, so that it does not end when it is empty."""
    owner: Process | None = None
    one_command: bool = False
    """Whether it ends when its main process has ended with status 0 and left nothing running,
    although it is held open."""
    head_of_record: tuple[Grant, str] | None = None
    """The beginning of its record as it is for that grant."""
    line: Callable[[pb.Report], None] | None = None
    """Sends its report to whoever stays connected until its end; None: nobody does."""
    main: Process | None = None
    """The process that entered last; its wait status is the call's."""
    outsiders: list[Process] = field(default_factory=list)
    """Processes that the main process had started elsewhere when the end was asked for."""
    left_mains: list[Process] = field(default_factory=list)
    """Main processes of earlier commands that live outside of its cgroup."""
    cpus_seen: int | None = None
    """CPUs on which its main process may run, which is what nproc and its like say there."""
    entered: bool = False
    state: pb.CallState.ValueType = pb.CALL_STATE_PENDING
    account: Account = field(default_factory=Account)
    """What is known so far of how it ends."""
    purpose: Purpose | None = None
    """What it was begun for; None: no process has entered it while this daemon ran."""
    observed: bool = False
    """Whether the daemon itself began the call, because it saw an exec in the agent leaf."""
    exit_status: int | None = None
    """Wait status of the main process as its exit event told it."""
    client_status: int | None = None
    denied_at_bytes: int | None = None
    """Memory that the call held when its growth was denied; None: it may grow."""
    was_denied: bool = False
    """Whether the growth of the call was denied at some time."""
    refused_before: int = 0
    """How often it had been refused memory before its growth was denied."""
    throttled_at_bytes: int | None = None
    """Memory that it held when it was throttled; None: it is not throttled."""
    history: tuple[pb.Feedback, ...] = ()
    """The feedback that its agent was given last, oldest first; at most HISTORY_KEPT."""
    likely_bytes: int = 0
    """Memory that it is likely to take: what its intent says, corrected by what the last calls
    like it took; 0: nothing is known."""
    keeps_room: bool = True
    """Whether memory that it is expected to take is kept for it: while a process is in it, and for
    a moment when none is (calls.keep_room)."""
    waited_usec: int = 0
    """Time in queues before it began."""
    parent: Call | None = None
    """The call that it was begun in, whose limits hold for it as well."""
    inner: dict[str, Call] = field(default_factory=dict)
    """Open calls that were begun in this one and end with it, by id."""
    inner_ids: list[str] = field(default_factory=list)
    """Calls that were begun in this one, the first INNER_IDS_MOST."""
    ended_inside: list[str] = field(default_factory=list)
    """Calls that were begun in this one and were ended because it was: the first few of them."""
    ended_inside_count: int = 0
    inner_oom: Call | None = None
    """The call inside that reached its own limit of memory last; it has ended."""
    main_leaf: Cgroup | None = None
    """The cgroup of its own processes, where its cgroup is split for calls inside; None: it is
    not."""
    went_on_as: str = ""
    """The call that its main process has entered, and goes on as."""
    cut: tuple[str, ...] = ()
    """What it got less of than it asked for, because of the call that it is in; a sentence each."""
    grew_usec: int = -(1 << 62)
    """When a sample last saw it grow, since boot."""
    bounds: HighBounds = field(default_factory=HighBounds)
    frozen_since_usec: int | None = None
    frozen_usec: int = 0
    asks: bool = False
    """Whether it is held at its credit and there is no more for it now."""
    starved: bool = False
    """Whether it asks, although it is the first to get more."""
    awaits_credit: bool = False
    """Whether it is paused, or denied growth, until there is credit for it."""
    paused_at_usec: int | None = None
    """When it was last frozen, since boot; None: it never was."""
    resumed_at_usec: int | None = None
    """When it last went on, since boot; None: it never did."""
    stopped: bool = False
    """Whether the kernel has said, since it was paused, that all its tasks have stopped."""
    counted_late: bool = False
    """Whether the present pause is among `late_pauses`."""
    late_pauses: int = 0
    """Pauses that had not stopped all its tasks after `enforce.pause.LATE_USEC`."""
    lent_priority: int = 0
    """Priority of the most important one who waits for a file lock that it holds; 0: nobody."""
    session_frozen_usec: int = 0
    """For how long its session had been frozen when it began, as the kernel counts it."""
    sliced_usec: int = 0
    """For how long it was frozen while others had their time slice on a GPU."""
    held_for_slice: bool = False
    """Whether it is frozen while others have their time slice on a GPU (gpu.time_slicing),
    whatever else freezes it."""
    operator_since_usec: int | None = None
    """Since when the operator holds it paused, whatever else freezes it, since boot; None: nobody
    does (enforce.hold)."""
    operator_usec: int = 0
    """For how long the operator has held it so far, without the present pause."""
    disks: LoweredDisks = field(default_factory=LoweredDisks)
    disk_since_usec: int | None = None
    """Since when it is paused because a file system that it wrote to was filling, whatever else
    freezes it, since boot; None: it is not (guard.disks)."""
    disk_usec: int = 0
    """For how long it has been so paused so far, without the present pause."""
    disk_seen: tuple[int, int] = (0, 0)
    """When it was last looked how much it had written, since boot, and how much that was."""
    written_least: int = 0
    """The most that was ever seen of what its processes have written to disks: what an ended
    process has written is forgotten where nobody waits for it."""
    traffic: Callable[[], pb.NetUsage | None] | None = None
    """Reads what its sockets have received and sent; None: nobody counts it."""
    gpu_usage: pb.GpuUsage | None = None
    """Use of its part of a GPU; made when the call ends, None where it had none."""
    gpu_feedback: tuple[pb.Feedback, ...] = ()
    """The feedback that its agent was given about its part of a GPU."""
    watch: int | None = None
    timeout_late_usec: int = 0
    """For how long its timeout had passed when it was given that one."""
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    done: asyncio.Future[pb.Report] | None = None
    """The future of its report, made by the first who waits for it: a call that nobody waits for
    costs none."""

    @property
    def leaf(self) -> Cgroup:
        """The cgroup that its own processes are in."""
        return self.cgroup if self.main_leaf is None else self.main_leaf

    @property
    def cgroup_above(self) -> Cgroup:
        """The cgroup that its own lies in: that of the call that it is in, or of its session."""
        return self.session.cgroup if self.parent is None else self.parent.cgroup

    @property
    def priority(self) -> int:
        """The call's own priority, or that of a more important one whom it holds up."""
        return max(self.grant.priority, self.lent_priority)

    @property
    def throttled_by_cpu(self) -> bool:
        """Whether it is throttled by the CPU scheduler alone, with memory.high as granted."""
        return self.throttled_at_bytes is not None and self.bounds.throttle_bytes is None

    @property
    def held_frozen(self) -> bool:
        """Whether it stays frozen although the policy lets it go on."""
        held = (self.operator_since_usec, self.disk_since_usec)
        return self.held_for_slice or any(since is not None for since in held)

    @property
    def depth(self) -> int:
        """How many calls there are in one another down to this one; 1: it is in no other."""
        return 1 if self.parent is None else self.parent.depth + 1

    def record(self) -> bytes:
        """What is kept of the call on its cgroup."""
        return f"{self._record_head()},{self._record_rest()[1:]}".encode()

    def _record_head(self) -> str:
        """The part of the record that changes with the grant alone, without its last brace. A
        record is written several times for each call."""
        if self.head_of_record is None or self.head_of_record[0] is not self.grant:
            head = {
                "v": RECORD_VERSION,
                "kind": "call",
                "id": self.id,
                "name": self.name,
                "argv": cut_argv_of_record(self.argv),
                "grant": plain(self.grant),
            }
            self.head_of_record = self.grant, encode(head)[:-1]
        return self.head_of_record[1]

    def _record_rest(self) -> str:
        return encode(
            {
                "began_unix_usec": self.began_unix_usec,
                "began_boot_usec": self.began_boot_usec,
                "held": self.held,
                "one_command": self.one_command,
                "observed": self.observed,
                "owner": [self.owner.pid, self.owner.start_ticks] if self.owner else None,
                "main": [self.main.pid, self.main.start_ticks] if self.main else None,
                "left_mains": [[process.pid, process.start_ticks] for process in self.left_mains],
                "cpus_seen": self.cpus_seen,
                "entered": self.entered,
                "frozen_usec": self.frozen_usec,
                "frozen_since_usec": self.frozen_since_usec,
                "session_frozen_usec": self.session_frozen_usec,
                "sliced_usec": self.sliced_usec,
                "waited_usec": self.waited_usec,
                "split": self.main_leaf is not None,
                "inner_ids": self.inner_ids,
                "ended_inside": self.ended_inside,
                "ended_inside_count": self.ended_inside_count,
                "went_on_as": self.went_on_as,
                "status": [self.exit_status, self.client_status],
                "cut": self.cut,
                "account": self.account.plain(),
            }
        )

    @classmethod
    def from_record(cls, session: Session, cgroup: Cgroup, data: dict[str, Any]) -> Call:
        """Make a call that was found again from its record. Raises KeyError, TypeError or
        ValueError if the record is not ours, CgroupGone if its cgroup has gone."""
        grant = _grant_of_record(data["grant"])
        status, client_status = data.get("status", (None, None))
        call = cls(
            id=str(data["id"]),
            session=session,
            name=sendable(data["name"]),
            argv=tuple(map(sendable, data["argv"])),
            grant=grant,
            cgroup=cgroup,
            began_unix_usec=int(data["began_unix_usec"]),
            began_boot_usec=int(data["began_boot_usec"]),
            held=bool(data["held"]),
            one_command=bool(data.get("one_command")),
            entered=bool(data["entered"]),
            observed=bool(data.get("observed")),
            cpus_seen=data.get("cpus_seen"),
            frozen_usec=int(data["frozen_usec"]),
            frozen_since_usec=data.get("frozen_since_usec"),
            session_frozen_usec=int(data.get("session_frozen_usec", 0)),
            sliced_usec=int(data.get("sliced_usec", 0)),
            waited_usec=int(data.get("waited_usec", 0)),
            inner_ids=list(map(str, data.get("inner_ids", ()))),
            ended_inside=list(map(str, data.get("ended_inside", ()))),
            ended_inside_count=int(data.get("ended_inside_count", 0)),
            went_on_as=str(data.get("went_on_as", "")),
            exit_status=status,
            client_status=client_status,
            cut=tuple(map(str, data.get("cut", ()))),
            account=Account.from_plain(data.get("account", {})),
        )
        if data.get("split"):
            call.main_leaf = cgroup.child(MAIN_LEAF)
        call.owner = Process.find(*data["owner"]) if data["owner"] else None
        call.main = Process.find(*data["main"]) if data["main"] else None
        found = (Process.find(*each) for each in data.get("left_mains", ()))
        call.left_mains = [process for process in found if process is not None]
        if data["main"] and call.main is None and status is None:
            call.account.main_lost = True
        return call


def _grant_of_record(data: dict[str, Any]) -> Grant:
    """Read a grant, where lists stand for tuples. A record of an older daemon may lack fields that
    have a default by now, or have some that are gone. TypeError if it is not ours."""
    values = {f.name: data[f.name] for f in fields(Grant) if f.name in data}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return Grant(**values)


def lies_in(call: Call, outer: Call) -> bool:
    """Tell whether a call was begun in another one, at whatever depth."""
    above = call.parent
    while above is not None and above is not outer:
        above = above.parent
    return above is not None


def frozen_usec(call: Call, now_usec: int) -> int:
    """Time for which a call has been paused so far, by itself or with a call that it is in."""
    return call.frozen_usec + now_usec - _paused_since(call, now_usec)


def _paused_since(call: Call, now_usec: int) -> int:
    """Tell since when a call is paused, by whomever; now: it is not."""
    starts = (call.frozen_since_usec, call.operator_since_usec, call.disk_since_usec)
    return min((start for start in starts if start is not None), default=now_usec)


def count_pause(call: Call, since_usec: int, now_usec: int) -> None:
    """Add a pause that has just ended to those of a call, but for the time from which another one
    that goes on will be counted."""
    call.frozen_usec += max(0, _paused_since(call, now_usec) - since_usec)


def operator_usec(call: Call) -> int:
    """Time for which the operator has held a call paused so far."""
    since = call.operator_since_usec
    return call.operator_usec + (0 if since is None else boottime_usec() - since)


def disk_usec(call: Call) -> int:
    """Time for which a call has been paused so far because a file system was filling."""
    since = call.disk_since_usec
    return call.disk_usec + (0 if since is None else boottime_usec() - since)


def stands_for_disk(call: Call) -> bool:
    """Tell whether a call, or one that it is in, is paused because a file system is filling."""
    outer: Call | None = call
    while outer is not None and outer.disk_since_usec is None:
        outer = outer.parent
    return outer is not None


def held_around(call: Call) -> Call | None:
    """Give the call that the operator holds paused, this one or one that it is in; None: none
    is."""
    outer: Call | None = call
    while outer is not None and outer.operator_since_usec is None:
        outer = outer.parent
    return outer


def all_inside(call: Call) -> list[Call]:
    """List the open calls inside a call, at whatever depth, each after the one that it is in."""
    found = list(call.inner.values())
    for each in found:
        found += each.inner.values()
    return found


def path_of(call: Call) -> str:
    """The call's cgroup below the cgroup2 mount, as /proc/<pid>/cgroup shows it."""
    above = call.session.cgroup_path if call.parent is None else path_of(call.parent)
    return f"{above}/{call.cgroup.path.name}"


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """A session's own limits. None: none of its own."""

    memory_low_bytes: int | None
    memory_high_bytes: int | None
    memory_max_bytes: int | None
    cpu_weight: int
    cpu_max_millicores: int | None
    pids_max: int | None
    priority: int
    calls_max: int
    gpu_percent: int | None = None
    """Share of each of `gpu_devices` for the agent itself; calls ask for their own."""
    gpu_memory_bytes: int | None = None
    gpu_priority: int | None = None
    gpu_devices: tuple[str, ...] = ()
    cgroups_max: int | None = None
    """Cgroups below its own, those of its calls among them."""
    cgroup_depth_max: int | None = None
    swap_max_bytes: int | None = None
    """What of it may be swapped out: nothing of an important session, because what comes back from
    swap is time that it loses."""
    exec_is_call: bool = False
    """Whether a program that is executed in the session from outside is a call."""
    io_weight: int = 100
    io_latency_usec: int | None = None
    """How long its requests to block devices may take before others have to wait for it."""


@dataclass(slots=True, eq=False)
class Session:
    """An open session."""

    id: str
    cgroup: Cgroup
    agent: Cgroup
    cgroup_path: str
    """Below the cgroup2 mount, as /proc/<pid>/cgroup shows it."""
    limits: SessionLimits
    opened_unix_usec: int
    labels: Mapping[str, str] = field(default_factory=dict)
    """What its use is added up by (history.usage)."""
    adopted: bool = False
    found: dict[str, str] = field(default_factory=dict)
    """Interface files of an adopted cgroup as they were before, to be put back."""
    written: dict[str, str] = field(default_factory=dict)
    """What was written to them: what has another value now was changed by its runtime since."""
    container: str = ""
    """Runtime and id of the container that it was made of, as `docker:ID`; empty: of none that a
    runtime has told of."""
    offered: frozenset[str] = frozenset()
    """Interface files that a leaf of this session has, so that those it lacks are not asked for."""
    calls: dict[str, Call] = field(default_factory=dict)
    reports: deque[pb.Report] = field(default_factory=deque)
    told: set[str] = field(default_factory=set)
    """Calls whose reports a hook has told of after their tool, as long as they are kept."""
    told_of_all: set[str] = field(default_factory=set)
    """The same for hooks that tell of all calls since the last time."""
    stops_delayed: int = 0
    """How often in a row an agent that was about to stop was told of some, and so went on."""
    learned: Learned = field(default_factory=Learned)
    traffic: Callable[[], pb.NetUsage | None] | None = None
    """Reads what its sockets have received and sent; None: nobody counts it."""
    calls_ended: int = 0
    connections: int = 0
    closing: bool = False
    environment: tuple[str, ...] = ()
    """`NAME=value` for processes that are started in its agent leaf."""
    slowed: bool = False
    """Whether its cpu.weight is lowered."""
    reclaimed_at_usec: int | None = None
    """When memory was last reclaimed from it, since boot."""
    watch: int | None = None
    owner: Process | None = None
    """The process that the session ends with; None: it ends with none, or with one that is gone."""
    is_orphan: bool = False
    """Whether the process that it ends with is gone, so that it is to be closed."""
    changing: bool = False
    """Whether its limits are being written."""
    places: tuple[Place, ...] | None = None
    """The session's cgroup and those above it, the nearest first; None: not found out yet."""
    frozen_file: HeldKnob[dict[str, int]] | None = None
    """The cgroup.stat.local of it, which is read when a call begins; None: not read yet."""
    held: Held = NOTHING_HELD
    """What its agent and files without a call held at `held_at` (time.monotonic)."""
    held_at: float = float("-inf")

    @property
    def turns_key(self) -> str:
        """Whose turn on the loop it is when something is done for this session (turns.Turns)."""
        return f"session {self.id}"

    def record(self) -> bytes:
        """What is kept of the session on its cgroup."""
        return json.dumps(
            {
                "v": RECORD_VERSION,
                "kind": "session",
                "id": self.id,
                "limits": plain(self.limits),
                "opened_unix_usec": self.opened_unix_usec,
                "adopted": self.adopted,
                "found": self.found,
                "written": self.written,
                "labels": dict(self.labels),
                "owner": [self.owner.pid, self.owner.start_ticks] if self.owner else None,
            },
            separators=(",", ":"),
        ).encode()

    def report(self, call_id: str) -> pb.Report | None:
        """The kept report of an ended call, or the newest one for an empty id."""
        if not call_id:
            return self.reports[-1] if self.reports else None
        return next((r for r in reversed(self.reports) if r.call_id == call_id), None)
