"""Counters of the kernel, read at each level where a limit can stand: in cgroups below a call, of
the call, and of everything above it up to the root.

`memory.events.local` and `pids.events.local` count what happened at a cgroup's own limit, while
`memory.events` also counts what happened below it (Documentation/admin-guide/cgroup-v2.rst).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agentcgroup.text import printable
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.facts import LimitHit
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.held import HeldKnob
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import KnobError
from agentcgroupd.state.ending import Baseline, Counts, Place
from agentcgroupd.state.records import sendable
from agentcgroupd.state.session import Call, Session

_LOCAL = {knobs.MEMORY_EVENTS_LOCAL.file, knobs.PIDS_EVENTS_LOCAL.file}
NESTED_MOST = 1000
"""How many cgroups that a tool made below its call are looked at: it can make any number."""
_SHOWN_CHARS = 96


def shown(path: str | Path) -> str:
    """A path as it can be sent and shown: whoever makes a cgroup chooses its name."""
    text = printable(sendable(str(path)))
    return text if len(text) <= _SHOWN_CHARS else f"...{text[-_SHOWN_CHARS:]}"


def places_above(session: Session, pool: Cgroup, call: Cgroup | None = None) -> list[Place]:
    """The cgroups above a call, or above a new call of a session, the nearest first: calls that it
    is in, the session, the pool, and those above. The root has no limits and is left out."""
    if not _LOCAL & session.offered:
        return []  # nothing is counted there
    if session.places is None:
        own = _held_place(pb.LEVEL_SESSION, session.cgroup, session.id)
        is_ours = session.cgroup.path.parent == pool.path
        session.places = (own, *(_from_pool(pool) if is_ours else _ancestors(session.cgroup)))
    outer = () if call is None else _outer_calls(session, call)
    return [*outer, *session.places]


@lru_cache(maxsize=1)
def _from_pool(pool: Cgroup) -> tuple[Place, ...]:
    """The pool and what lies above it: the same for all sessions in it, so it is held open once."""
    return (_held_place(pb.LEVEL_POOL, pool, "the pool"), *_ancestors(pool))


def _held_place(level: pb.Level.ValueType, cgroup: Cgroup, name: str) -> Place:
    """Make a place whose counters are read at the beginning and at the end of each call."""
    return Place(
        level,
        cgroup,
        name,
        HeldKnob(cgroup, knobs.MEMORY_EVENTS_LOCAL),
        HeldKnob(cgroup, knobs.PIDS_EVENTS_LOCAL),
    )


def _outer_calls(session: Session, call: Cgroup) -> Iterator[Place]:
    for path in call.path.parents:
        if path == session.cgroup.path or session.cgroup.path not in path.parents:
            return
        below = session.cgroup.child(str(path.relative_to(session.cgroup.path)))
        yield Place(pb.LEVEL_OUTER, below, path.name.removeprefix("call-"))


def _ancestors(cgroup: Cgroup) -> Iterator[Place]:
    """What lies above a cgroup whose directory is held open, through that directory."""
    up, path = "..", cgroup.path.parent
    while True:
        above = Cgroup(cgroup.dir_fd, up, path)
        # The root of the tree has no events file (kernel/cgroup/cgroup.c: CFTYPE_NOT_ON_ROOT).
        if not above.has(knobs.CGROUP_EVENTS):
            return
        yield _held_place(pb.LEVEL_HOST, above, shown(path))
        up, path = f"../{up}", path.parent


def _local(place: Place, offered: frozenset[str]) -> Counts:
    """Counters of a cgroup's own limits. `offered`: interface files of the session. Raises
    KnobError."""
    cgroup, memory, pids = place.cgroup, dict[str, int](), dict[str, int]()
    if knobs.MEMORY_EVENTS_LOCAL.file in offered:
        held = place.memory
        memory = (held.read_if() if held else cgroup.read_if(knobs.MEMORY_EVENTS_LOCAL)) or {}
    if knobs.PIDS_EVENTS_LOCAL.file in offered:
        held = place.pids
        pids = (held.read_if() if held else cgroup.read_if(knobs.PIDS_EVENTS_LOCAL)) or {}
    return _counts(memory, pids)


def _counts(memory: dict[str, int], pids: dict[str, int]) -> Counts:
    return Counts(
        memory.get("oom", 0),
        memory.get("oom_kill", 0),
        memory.get("oom_group_kill", 0),
        pids.get("max", 0),
    )


def counts_above(places: list[Place], offered: frozenset[str]) -> tuple[Counts, ...]:
    """Counters at the limits above a call, in the order of `places`. Raises KnobError."""
    return tuple(_local(place, offered) for place in places)


def baseline_of_new(session: Session, pool: Cgroup, outer: Call | None = None) -> Baseline:
    """The baseline of a call whose cgroup is new, in its session or in another call. Raises
    KnobError."""
    places = places_above(session, pool, None if outer is None else outer.cgroup)
    if outer is not None:
        places.insert(0, Place(pb.LEVEL_OUTER, outer.cgroup, outer.id))
    return Baseline(above=counts_above(places, session.offered))


def baseline_now(call: Call, pool: Cgroup) -> Baseline:
    """The counters of a call and of all above it as they are now. Raises KnobError."""
    offered = call.session.offered
    memory = call.cgroup.read(knobs.MEMORY_EVENTS) if _MEMORY in offered else {}
    pids = call.cgroup.read(knobs.PIDS_EVENTS) if knobs.PIDS_EVENTS.file in offered else {}
    return Counters.read(call, pool, memory, pids).now


_MEMORY = knobs.MEMORY_EVENTS.file


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted since a baseline."""

    below: Counts
    """In the call and all below it."""
    own: Counts
    """In the call's own cgroup."""
    above: tuple[tuple[Place, Counts], ...]
    """At the limits above it; none where they are not known for the baseline."""


@dataclass(frozen=True, slots=True)
class Counters:
    """The counters of a call and of everything above it, as they are now."""

    now: Baseline
    places: list[Place]

    @classmethod
    def read(
        cls, call: Call, pool: Cgroup, memory: dict[str, int], pids: dict[str, int]
    ) -> Counters:
        """`memory`, `pids`: the call's memory.events and pids.events now. Raises KnobError."""
        offered = call.session.offered
        below = _counts(memory, pids)
        # Whatever was counted in the call's own cgroup was counted in `below` as well.
        own = below
        if below != Counts():
            own = _local(Place(pb.LEVEL_CALL, call.cgroup, call.id), offered)
        places = places_above(call.session, pool, call.cgroup)
        return cls(Baseline(below, own, counts_above(places, offered)), places)

    def since(self, before: Baseline | None) -> Counted:
        """What was counted since a baseline; None: since the call's cgroup was made."""
        known = before or Baseline()
        above = zip(self.places, self.now.above, known.above, strict=False)
        if len(known.above) != len(self.places):
            above = zip((), (), (), strict=True)
        return Counted(
            self.now.below - known.below,
            self.now.own - known.own,
            tuple((place, now - then) for place, now, then in above),
        )


# Which limit it was


def memory_hits(call: Call, counted: Counted) -> list[LimitHit]:
    """The memory limits that were reached, the innermost first. Raises KnobError."""
    hits = []
    if counted.below.ooms > counted.own.ooms:
        times = counted.below.ooms - counted.own.ooms
        hits.append(_nested_memory(call, times))
    if counted.own.ooms:
        limit = call.grant.memory_max_bytes
        hits.append(LimitHit(pb.LEVEL_CALL, call.id, limit, counted.own.ooms))
    for place, counts in counted.above:
        if counts.ooms:
            limit = place.cgroup.read_if(knobs.MEMORY_MAX)
            hits.append(LimitHit(place.level, place.name, limit, counts.ooms))
    return hits


def pids_hits(call: Call, counted: Counted, peak: int | None) -> list[LimitHit]:
    """The limits of processes at which the kernel refused one, the innermost first. `peak`: the
    most that the call had. Raises KnobError."""
    refused = counted.below.pids_refused
    if knobs.PIDS_EVENTS_LOCAL.file not in call.session.offered:
        return _pids_hits_before_6_11(call, refused, peak)
    hits = []
    if refused > counted.own.pids_refused:
        times = refused - counted.own.pids_refused
        hits.append(_nested(call.cgroup, knobs.PIDS_EVENTS_LOCAL, "max", times))
    if counted.own.pids_refused:
        times = counted.own.pids_refused
        hits.append(LimitHit(pb.LEVEL_CALL, call.id, call.grant.pids_max, times))
    for place, counts in counted.above:
        if counts.pids_refused:
            limit = place.cgroup.read_if(knobs.PIDS_MAX)
            hits.append(LimitHit(place.level, place.name, limit, counts.pids_refused))
    return hits


def _pids_hits_before_6_11(call: Call, refused: int, peak: int | None) -> list[LimitHit]:
    """The same where pids.events does not tell at which limit: the call's own is the one only if
    the call has had as many as that."""
    if not refused:
        return []
    most = call.grant.pids_max
    if peak is None or most is None or peak >= most:
        return [LimitHit(pb.LEVEL_CALL, call.id, most, refused)]
    session = call.session
    return [LimitHit(pb.LEVEL_SESSION, session.id, session.limits.pids_max, refused)]


def _nested_memory(call: Call, times: int) -> LimitHit:
    """Find the limit of memory below a call that was reached: of a call inside that has ended, or
    of a cgroup that is still there."""
    inner = call.inner_oom
    if inner is None:
        return _nested(call.cgroup, knobs.MEMORY_EVENTS_LOCAL, "oom", times)
    name = inner.cgroup.path.name
    return LimitHit(pb.LEVEL_NESTED, name, inner.grant.memory_max_bytes, times)


def _nested(top: Cgroup, knob: Knob[dict[str, int]], key: str, times: int) -> LimitHit:
    """Find the cgroup below a call whose limit was reached, if it is still there; a tool can have
    removed it."""
    limits = knobs.MEMORY_MAX if knob is knobs.MEMORY_EVENTS_LOCAL else knobs.PIDS_MAX
    for cgroup in _below(top):
        try:
            counts = cgroup.read_if(knob)
            if counts is not None and counts[key]:
                name = shown(cgroup.path.relative_to(top.path))
                return LimitHit(pb.LEVEL_NESTED, name, cgroup.read_if(limits), times)
        except KnobError:
            continue  # removed meanwhile
    return LimitHit(pb.LEVEL_NESTED, "", None, times)


def _below(top: Cgroup) -> Iterator[Cgroup]:
    """The cgroups below one, a level after the other; at most NESTED_MOST."""
    waiting, found = [top], 0
    for cgroup in waiting:
        try:
            names = list(cgroup.children())
        except KnobError:
            continue  # removed meanwhile
        for name in names:
            try:
                child = cgroup.child(name)
            except (KnobError, OSError):
                continue  # as above, or so deep that its path is too long to be opened
            waiting.append(child)
            yield child
            found += 1
            if found >= NESTED_MOST:
                return


def swap_hit(call: Call, pool: Cgroup) -> LimitHit | None:
    """The limit of swap that kept memory of the call from being swapped out; None: there was none,
    or this kernel does not say. memory.swap.events counts a refusal where the memory was charged,
    at whatever level the limit stands: that level is the nearest one whose swap is full. Raises
    KnobError."""
    if knobs.MEMORY_SWAP_EVENTS.file not in call.session.offered:
        return None
    events = call.cgroup.read(knobs.MEMORY_SWAP_EVENTS)
    if not events.get("max", 0):
        return None
    own = Place(pb.LEVEL_CALL, call.cgroup, call.id)
    for place in (own, *places_above(call.session, pool, call.cgroup)):
        limit = place.cgroup.read_if(knobs.MEMORY_SWAP_MAX)
        if not limit:
            continue  # None is set, or no swap is wanted there: as on a host that has none.
        peak = place.cgroup.read_if(knobs.MEMORY_SWAP_PEAK)
        if peak is None or peak + os.sysconf("SC_PAGE_SIZE") * 64 >= limit:
            return LimitHit(place.level, place.name, limit, events["max"])
    return None


def ended_as_a_whole(call: Call, counted: Counted, hits: Sequence[LimitHit]) -> bool:
    """Whether the kernel's OOM killer ended all of a call at once, as memory.oom.group asks it to
    at the call's limit and at those above it. Raises KnobError."""
    if _group_kills_counted(call):
        groups = [counted.own, *(counts for _, counts in counted.above)]
        return any(counts.group_kills for counts in groups)
    # Before Linux 5.17 it is not counted; it was so if the limit is not one below the call.
    within = bool(hits) and all(hit.level == pb.LEVEL_NESTED for hit in hits)
    return not within and call.cgroup.read(knobs.MEMORY_OOM_GROUP)


def _group_kills_counted(call: Call) -> bool:
    return "oom_group_kill" in call.cgroup.read(knobs.MEMORY_EVENTS_LOCAL)
